"""A model folder, Hugging Face's or converted, checked by its headers and ready to be read in the format asked for."""

import json
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.checkpoint import files, names
from deepseek_jax.checkpoint.files import TensorFolder
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.orbax_layers import ConvertedFolder, is_converted
from deepseek_jax.checkpoint.quantised import refuse_other_quantisation
from deepseek_jax.checkpoint.recast import Format, recast
from deepseek_jax.checkpoint.sidecars import copy_sidecars
from deepseek_jax.checkpoint.stored_arrays import StoredArray, TensorSource, arrays
from deepseek_jax.config import PRESETS, ModelConfig, from_hf, preset
from deepseek_jax.config.hf import write_quantization
from deepseek_jax.model.decoder import abstract_weights

DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json, by transformers' newer and its older name


class ModelFolder(NamedTuple):
    """What `open_folder` found.

    `stored` is the folder as it is, `source` the same in the format `to`, which `config` and `arrays` describe.
    """

    folder: Path
    to: Format
    config: ModelConfig
    stored: TensorFolder | ConvertedFolder
    source: TensorSource
    arrays: list[StoredArray]

    @property
    def nbytes(self) -> int:
        return sum(self.source.entries[name].nbytes for name in self.tensor_names())

    def tensor_names(self) -> set[str]:
        return {tensor.name for array in self.arrays for tensor in array.tensors}

    def write_sidecars(self, target: Path) -> None:
        """Copy configuration and tokenizer files, the configuration as the format wants it."""
        copy_sidecars(self.folder, target)
        if self.to == "stored":
            return
        values = files.read_json(self.folder / "config.json")
        values.pop("quantization_config", None)
        for key in DTYPE_KEYS:
            if key in values and not self.to.startswith("fp8"):
                values[key] = self.to
        if self.config.quantization is not None:
            values["quantization_config"] = write_quantization(self.config.quantization)
        files.write_whole(target / "config.json", json.dumps(values, indent=2).encode())


def named_dtype(folder: Path) -> str | None:
    """The dtype that a model folder's configuration names for its weights, if it names one."""
    values = files.read_json(folder / "config.json")
    return next((values[key] for key in DTYPE_KEYS if values.get(key)), None)


def load_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder, Hugging Face's or converted. ValueError names file and key."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; wanted a Hugging Face or converted model folder")
    values = files.read_json(folder / "config.json")
    refuse_other_quantisation(folder)
    try:
        return from_hf(values)
    except ValueError as problem:
        raise ValueError(f"{folder}: {problem}") from None


def named_config(model: str) -> ModelConfig:
    """A configuration by the name of a published one, by a folder, or by a name on the hub; ValueError for others."""
    if model in PRESETS:
        return preset(model)
    if "/" in model or Path(model).is_dir():
        return load_config(model_folder(model, weights=False))
    raise ValueError(f"model: got {model!r}, wanted a folder with config.json or one of {', '.join(PRESETS)}")


def open_folder(folder: str | Path, *, to: Format = "stored") -> ModelFolder:
    """Open a folder and check it against its configuration, before any weight is read.

    A configuration may promise MTP modules that the folder lacks altogether, because transformers drops them on save;
    the configuration of the result has those that are there.

    Args:
        folder: with config.json and weights, or the name of a model on the hub.
        to: the format that the result gives the weights in.

    Raises:
        ValueError: an unsupported configuration, a damaged header, or tensors that are missing, unexpected or
            misshapen.
    """
    folder = model_folder(folder)
    config = load_config(folder)
    stored = ConvertedFolder(folder) if is_converted(folder) else TensorFolder(folder)
    config = names.with_held_modules(config, stored.entries)
    _, abstract = abstract_weights(config)
    found = arrays(stored, config, abstract)
    if isinstance(stored, ConvertedFolder):
        stored.open(found)
    source, wanted = recast(stored, config, names.tensors(names.packed(config), abstract), to)
    wanted_arrays = found if to == "stored" else arrays(source, wanted, abstract)
    return ModelFolder(folder, to, wanted, stored, source, wanted_arrays)
