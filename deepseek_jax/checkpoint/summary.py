"""What a checkpoint is, or should be, from its configuration and headers alone."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.files import TensorFolder
from deepseek_jax.checkpoint.headers import Entry
from deepseek_jax.checkpoint.hub import hub_headers, model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.checkpoint.orbax_layers import ConvertedFolder, is_converted
from deepseek_jax.checkpoint.stored_arrays import differences
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import abstract_weights


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of a checkpoint.

    `parameters` counts every stored weight but not FP8 scales; those of the MTP modules, the copies of embedding and
    head among them, are also given alone. `bytes_by_dtype` uses safetensors' names. `missing` and `unexpected` name
    tensors as a loader would; `mtp_promised` is what config.json says, `mtp_held` what is there.
    """

    architecture: str
    tensors: int
    bytes: int
    parameters: int
    mtp_parameters: int
    bytes_by_dtype: dict[str, int]
    mtp_promised: int
    mtp_held: int
    missing: list[str]
    unexpected: list[str]


def of_preset(config: ModelConfig) -> Summary:
    """What the published checkpoint of a configuration holds."""
    table = names.published(config, abstract_weights(config)[1])
    entries = {tensor.name: Entry(tensor.dtype, tensor.shape, 0) for tensor in table}
    return _summary(config, config.num_nextn_predict_layers, entries, {"missing": [], "unexpected": []})


class _OnHub(NamedTuple):
    """The tensors of a model whose files are not here."""

    folder: Path
    entries: dict[str, Entry]

    def where(self, name: str) -> str:
        return str(self.folder)


def of_model(model: str | Path) -> Summary:
    """What a Hugging Face or converted folder holds, or a name on the hub: where the cache has none of its weights, the
    headers alone are fetched. ValueError for damaged headers or configuration."""
    folder = model_folder(model, weights=False)
    promised = load_config(folder)
    if is_converted(folder):
        source = ConvertedFolder(folder)
    elif os.path.lexists(model) or any(folder.glob("*.safetensors")):
        source = TensorFolder(folder)
    else:
        source = _OnHub(folder, hub_headers(model))
    config = names.with_held_modules(promised, source.entries)
    table = names.tensors(config, abstract_weights(config)[1])
    return _summary(config, promised.num_nextn_predict_layers, source.entries, differences(source, config, table))


def _summary(config: ModelConfig, promised: int, entries: dict[str, Entry], differ: dict[str, list[str]]) -> Summary:
    by_dtype: Counter[str] = Counter()
    parameters: Counter[bool] = Counter()
    mtp = tuple(f"model.layers.{config.num_hidden_layers + depth}." for depth in range(config.num_nextn_predict_layers))
    for name, entry in entries.items():
        by_dtype[entry.dtype] += entry.nbytes
        if not name.endswith(names.SCALE):
            parameters[name.startswith(mtp)] += math.prod(entry.shape)
    return Summary(
        architecture=config.model_type,
        tensors=len(entries),
        bytes=by_dtype.total(),
        parameters=parameters.total(),
        mtp_parameters=parameters[True],
        bytes_by_dtype=dict(by_dtype.most_common()),
        mtp_promised=promised,
        mtp_held=config.num_nextn_predict_layers,
        **differ,
    )
