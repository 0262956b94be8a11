"""Merge a LoRA adapter, PEFT's or our own, into its model, and write the whole as a Hugging Face folder."""

from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from deepseek_jax.checkpoint.adapters import load_adapter
from deepseek_jax.checkpoint.files import refuse_existing
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.distributed import printable
from deepseek_jax.model.lora import merge


def main(
    model: Path, adapter: Path, out: Path, /, *, dtype: Literal["stored", "bfloat16", "float32"] = "stored"
) -> None:
    """Write MODEL with ADAPTER merged into it to OUT.

    Args:
        model: Hugging Face or converted folder, or a name on the hub; FP8 weights are unpacked to bfloat16.
        adapter: folder with adapter_config.json and adapter_model.safetensors, or a name on the hub.
        out: folder to make; it must not exist, and it appears only when it is whole.
        dtype: of the weights, as stored or another; sums are rounded to it.
    """
    for source in (model, adapter):
        refuse_existing(out, source)
    folder, of_adapter = map(model_folder, (model, adapter))
    loaded = load_model(folder, dtype=None if dtype == "stored" else jnp.dtype(dtype))
    lora, matrices = load_adapter(of_adapter, loaded.config)
    save_model(loaded._replace(weights=merge(loaded.weights, matrices, lora)), out, source=folder)
    print(printable(f"wrote {out}"))
