"""Logits of a model for given tokens, float32, from one full forward pass."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.model.precision import Precision, dtype_of


def main(model: Path, tokens: Path, logits: Path, /, *, dtype: Precision = "float32") -> None:
    """Compute the logits of MODEL for TOKENS.

    Args:
        model: Hugging Face or converted folder, or a name on the hub.
        tokens: .npy file, int32 [B, T].
        logits: .npy file to write, float32 [B, T, V].
        dtype: of weights and activations; auto is bfloat16 on accelerators and float32 on the CPU.
    """
    ids = _read_tokens(tokens)
    config, graphdef, weights = load_model(model, dtype=dtype_of(dtype))
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"{tokens}: token {ids.max()}: wanted 0 to {config.vocab_size - 1}, the vocabulary")
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(f"{tokens}: {ids.shape[1]} tokens, more than the context of {config.max_position_embeddings}")

    @jax.jit
    def forward(weights, ids):
        module = nnx.merge(graphdef, weights)
        return module.logits(module(ids).x_BTD)

    with logits.open("wb") as file:  # not np.save(path), which would add a suffix
        np.save(file, np.asarray(forward(weights, ids)))


def _read_tokens(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as problem:
        raise ValueError(f"{path}: not a .npy file of numbers ({problem})") from None
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise ValueError(f"{path}: got {ids.dtype} {list(ids.shape)}, wanted integers [B, T]")
    return ids.astype(np.int32)
