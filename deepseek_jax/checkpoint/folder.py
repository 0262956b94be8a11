"""Model folders: Hugging Face's, and ours (Orbax) with the same configuration and tokenizer files beside it."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from deepseek_jax.checkpoint import files, names
from deepseek_jax.config import ModelConfig, from_hf, to_hf
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import RouterBias

WEIGHTS = "weights"


class Model(NamedTuple):
    """A model in memory: its configuration, NNX's static description, and the weights."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    weights: nnx.State


def is_converted(folder: Path) -> bool:
    return (folder / WEIGHTS).is_dir()


def load_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder, Hugging Face's or converted. ValueError names file and key."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; wanted a Hugging Face or converted model folder")
    values = files.read_json(folder / "config.json")
    try:
        return from_hf(values)
    except ValueError as problem:
        raise ValueError(f"{folder}: {problem}") from None


def load_model(folder: Path, *, dtype: jnp.dtype | None = jnp.float32) -> Model:
    """A model from an HF folder or a converted one.

    Args:
        folder: with config.json and weights.
        dtype: to compute in; None keeps every tensor as stored. Router biases stay float32.

    Raises:
        ValueError: damaged, missing, unknown or misshapen tensors, or an unsupported configuration.
    """
    config = load_config(folder)
    graphdef, abstract = abstract_weights(config)
    weights = _load_orbax(folder, abstract) if is_converted(folder) else _load_hf(folder, abstract)
    if dtype is not None:
        weights = cast(weights, dtype)
    return Model(config, graphdef, weights)


def cast(weights: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """All weights in one dtype, router biases excepted."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    to = lambda leaf: leaf.replace(leaf[...].astype(jnp.float32 if isinstance(leaf, RouterBias) else dtype))
    return jax.tree.map(to, weights, is_leaf=is_variable)


def convert_hf(source: Path, target: Path) -> None:
    """Write a Hugging Face folder as a converted one, every tensor as stored; `target` appears when whole."""
    model = load_model(source, dtype=None)
    with files.new_folder(target) as partial:
        files.copy_sidecars(source, partial)
        ocp.save((partial / WEIGHTS).absolute(), names.flat(model.weights))


def export_hf(source: Path, target: Path) -> None:
    """Write a converted folder as a Hugging Face one, every tensor as stored; `target` appears when whole."""
    model = load_model(source, dtype=None)
    with files.new_folder(target) as partial:
        files.copy_sidecars(source, partial)
        _write_hf(model.weights, partial)


def save_hf(
    model: Model, target: Path, *, source: Path | None = None, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Write a model from memory as a Hugging Face folder.

    Args:
        model: to write.
        target: folder to make; it appears when whole.
        source: folder whose configuration and tokenizer files go with it; None writes config.json from the model.
        tokenizer: further files by name, such as `Tokenizer.files`.
    """
    with files.new_folder(target) as partial:
        if source is None:
            text = json.dumps(to_hf(model.config), indent=2)
            (partial / "config.json").write_text(text, encoding="utf-8")
        else:
            files.copy_sidecars(source, partial)
        for name, content in (tokenizer or {}).items():
            (partial / name).write_bytes(content)
        _write_hf(model.weights, partial)


def _write_hf(weights: nnx.State, folder: Path) -> None:
    arrays = names.flat(weights)

    def named() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in names.tensors(weights):
            value = np.asarray(arrays[names.key(tensor.path)])
            value = value if tensor.expert is None else value[tensor.expert]
            yield tensor.name, value.T if tensor.transposed else value

    files.write_tensors(folder, named(), sum(a.nbytes for a in arrays.values()))


def _load_hf(folder: Path, abstract: nnx.State) -> nnx.State:
    source = files.TensorFolder(folder)
    table = names.tensors(abstract)
    _check_table(source, table)
    parts: dict[names.Path, list[np.ndarray]] = {}
    for tensor in table:
        value = source.read(tensor.name)
        parts.setdefault(tensor.path, []).append(value.T if tensor.transposed else value)
    arrays = {}
    for tensor in table:
        if tensor.path in parts:
            values = parts.pop(tensor.path)
            kinds = sorted({value.dtype.name for value in values})
            if len(kinds) > 1:
                raise ValueError(f"{folder}: tensors like {tensor.name!r}: got {' and '.join(kinds)}, wanted one dtype")
            arrays[names.key(tensor.path)] = jnp.asarray(values[0] if tensor.expert is None else np.stack(values))
    return names.unflat(arrays, abstract)


def _check_table(source: files.TensorFolder, table: list[names.Tensor]) -> None:
    """Names and shapes from the headers, before any weight is read."""
    wanted = {tensor.name: tensor for tensor in table}
    # rotary tables that old exports stored; they follow from the configuration
    held = {name for name in source.file_of if not name.endswith("rotary_emb.inv_freq")}
    for problem, these in (("missing", wanted.keys() - held), ("unexpected", held - wanted.keys())):
        if these:
            more = f" (and {len(these) - 1} more)" if len(these) > 1 else ""
            raise ValueError(f"{source.folder}: {problem} tensor {sorted(these)[0]!r}{more} for its config.json")
    for name, tensor in wanted.items():
        if source.shape(name) != tensor.shape:
            raise ValueError(
                f"{source.file_of[name]}: tensor {name!r}: got shape {list(source.shape(name))}, "
                f"wanted {list(tensor.shape)} by config.json"
            )


def _load_orbax(folder: Path, abstract: nnx.State) -> nnx.State:
    path = (folder / WEIGHTS).absolute()
    wanted = names.flat(abstract)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    held = _whole(path, lambda: ocp.metadata(path).metadata)
    _check_arrays(path, held, wanted)
    like = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for name, a in held.items()}
    return names.unflat(_whole(path, lambda: ocp.load(path, like)), abstract)


def _whole(path: Path, read: Callable[[], dict]) -> dict:
    try:
        return read()
    except Exception as problem:  # Orbax raises a bare Exception, among others, for damaged files
        raise ValueError(f"{path}: not a whole Orbax checkpoint ({problem!s:.200})") from None


def _check_arrays(path: Path, held: dict, wanted: dict) -> None:
    """Names and shapes from the metadata, before any weight is read."""
    for name in sorted(wanted.keys() ^ held.keys()):
        state = "missing" if name in wanted else "unexpected"
        raise ValueError(f"{path}: {state} array {name!r} for its config.json")
    for name, array in held.items():
        if array.shape != wanted[name].shape:
            raise ValueError(
                f"{path}: array {name!r}: got shape {list(array.shape)}, "
                f"wanted {list(wanted[name].shape)} by config.json"
            )
