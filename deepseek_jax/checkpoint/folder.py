"""Models in memory, from folders and back: Hugging Face's, and converted ones, onto one device or a mesh."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from deepseek_jax.checkpoint import files, names, writer
from deepseek_jax.checkpoint.convert import THREADS, write_hf
from deepseek_jax.checkpoint.headers import DTYPES, NAMES, Entry
from deepseek_jax.checkpoint.layout import Array, Source, part, units
from deepseek_jax.checkpoint.opened import Opened, open_folder
from deepseek_jax.checkpoint.shelves import ConvertedFolder
from deepseek_jax.config import ModelConfig, to_hf
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.ops.fp8 import dequantize
from deepseek_jax.sharding import weight_sharding


class Model(NamedTuple):
    """A model in memory: its configuration, NNX's static description, and the weights."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    weights: nnx.State


def load_model(folder: Path, *, dtype: jnp.dtype | None = jnp.float32, mesh: Mesh | None = None) -> Model:
    """A model from a Hugging Face folder or a converted one, layer by layer.

    FP8 weights are unpacked on the devices. Every process reads the bytes that its own devices hold, and no more.

    Args:
        folder: with config.json and weights.
        dtype: to compute in; None keeps the stored one, and bfloat16 for FP8 weights. Router biases stay float32.
        mesh: to lay the weights on, of `sharding.make_mesh`; None takes the first device.

    Returns:
        The model. Its configuration has the MTP modules that the folder holds, and no `quantization`.

    Raises:
        ValueError: damaged, missing, unknown or misshapen tensors, an unsupported configuration, or a mesh that does
            not divide the weights.
    """
    opened = open_folder(folder)
    _check_copies(opened)
    config = opened.config
    graphdef, abstract = abstract_weights(config)
    leaves = {names.key(path): leaf for path, leaf in nnx.to_flat_state(abstract)}
    place = {key: _placed(key, leaf, mesh) for key, leaf in leaves.items()}
    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for members in units([array for array in opened.arrays if not array.copy]).values():
            raw = dict(zip(members, pool.map(lambda a: _read(opened.source, a, place[_key(a)]), members), strict=True))
            arrays |= _settled(raw, place, config, lambda array: _computed_in(leaves[_key(array)], array, dtype))
    return Model(dataclasses.replace(config, quantization=None), graphdef, names.unflat(arrays, abstract))


def cast(weights: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """All weights in one dtype, router biases excepted."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    to = lambda leaf: leaf.replace(leaf[...].astype(jnp.float32 if isinstance(leaf, RouterBias) else dtype))
    return jax.tree.map(to, weights, is_leaf=is_variable)


def _key(array: Array) -> str:
    """The key of the weight that an array is, or is the scale of."""
    return names.key(array.path[:-1] if array.path[-1] == "scale" else array.path)


def _placed(key: str, leaf: nnx.Variable, mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return weight_sharding(mesh, leaf.get_raw_value().shape, leaf.get_metadata()["axes"], key)


def _computed_in(leaf: nnx.Variable, array: Array, dtype: jnp.dtype | None) -> jnp.dtype:
    if isinstance(leaf, RouterBias):
        return jnp.dtype(jnp.float32)
    stored = jnp.dtype(jnp.bfloat16) if array.dtype == "F8_E4M3" else DTYPES[array.dtype]
    return stored if dtype is None else jnp.dtype(dtype)


def _read(source: Source, array: Array, place: Sharding) -> jax.Array:
    """An array as stored, in the file's orientation, on the devices that will hold the weight."""
    read: dict[str, np.ndarray] = {}

    def once(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in read:  # replicas ask for the same part
            read[str(index)] = part(source, array, index)
        return read[str(index)]

    return jax.make_array_from_callback(array.shape, _as_filed(array, place), once)


def _as_filed(array: Array, place: Sharding) -> Sharding:
    """The sharding of the stored array for that of the weight. Scales are cut by expert alone, being small."""
    if not isinstance(place, NamedSharding):
        return place
    spec = list(place.spec)
    if array.path[-1] == "scale":
        spec = [spec[0] if array.stacked else None] + [None] * (len(spec) - 1)
    elif array.transposed:
        spec[-2:] = spec[:-3:-1]
    return NamedSharding(place.mesh, PartitionSpec(*spec))


def _settled(
    raw: Mapping[Array, jax.Array],
    place: Mapping[str, Sharding],
    config: ModelConfig,
    computed_in: Callable[[Array], jnp.dtype],
) -> dict[str, jax.Array]:
    """The weights of one unit from its stored arrays, by one compiled call."""
    scales = {_key(array): value for array, value in raw.items() if array.path[-1] == "scale"}
    weights = {array: value for array, value in raw.items() if array.path[-1] != "scale"}
    plan = tuple((array.transposed, computed_in(array)) for array in weights)
    block = config.quantization.weight_block_size if scales else None
    settle = _settler(plan, block, tuple(place[_key(array)] for array in weights))
    values = settle([(value, scales.get(_key(array))) for array, value in weights.items()])
    return dict(zip(map(_key, weights), values, strict=True))


@functools.lru_cache(maxsize=64)
def _settler(plan: tuple[tuple[bool, jnp.dtype], ...], block: tuple[int, int] | None, shardings: tuple[Sharding, ...]):
    """Stored arrays to weights: unpacked, cast and turned to [in, out]."""

    def settle(pairs):
        values = []
        for (value, scale), (transposed, dtype) in zip(pairs, plan, strict=True):
            value = value.astype(dtype) if scale is None else dequantize(value, scale, block, dtype)
            values.append(jnp.swapaxes(value, -1, -2) if transposed else value)
        return tuple(values)

    return jax.jit(settle, out_shardings=shardings)


def _check_copies(opened: Opened) -> None:
    """The MTP module shares the main model's embedding and head; say so if the folder's copies are others."""
    by_path = {array.path: array for array in opened.arrays}
    for array in opened.arrays:
        if not array.copy or jax.process_index() != 0:
            continue
        main = by_path.get(array.path[2:], by_path[("embed",)])
        if not _same(opened.source, main.tensors[0].name, array.tensors[0].name):
            warnings.warn(
                f"{opened.source.folder}: {array.tensors[0].name} is not the copy of {main.tensors[0].name} that it is "
                "in DeepSeek's checkpoints; the MTP module in memory shares the latter",
                stacklevel=3,
            )


def _same(source: Source, one: str, other: str) -> bool:
    if source.entries[one][:2] != source.entries[other][:2]:
        return False
    if isinstance(source, ConvertedFolder):
        return source.hashes[one] == source.hashes[other]
    pairs = zip(writer.parts(source, one), writer.parts(source, other), strict=True)
    return all(a.tobytes() == b.tobytes() for (_, a), (_, b) in pairs)


def save_hf(
    model: Model, target: Path, *, source: Path | None = None, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Write a model from memory as a Hugging Face folder, in the dtypes it has.

    Args:
        model: to write.
        target: folder to make; it appears when it is whole.
        source: folder whose configuration and tokenizer files go with it; None writes config.json from the model.
        tokenizer: further files by name, such as `Tokenizer.files`.
    """
    with files.new_folder(target) as partial:
        values = to_hf(model.config)
        if source is not None:
            files.copy_sidecars(source, partial)
            values = files.read_json(partial / "config.json")
            values.pop("quantization_config", None)  # what is in memory is unpacked
        files.write_whole(partial / "config.json", json.dumps(values, indent=2).encode())
        for name, content in (tokenizer or {}).items():
            (partial / name).write_bytes(content)
        memory = _InMemory(model, target)
        write_hf(memory, partial, writer.plan(memory))


class _InMemory:
    """A model's weights as the tensors of a checkpoint."""

    def __init__(self, model: Model, folder: Path):
        self.folder = folder
        self._arrays = names.flat(model.weights)
        self._tensors = {tensor.name: tensor for tensor in names.tensors(model.config, model.weights)}
        dtype = lambda tensor: NAMES[np.dtype(self._arrays[self._held_by(tensor)].dtype)]
        self.entries = {name: Entry(dtype(tensor), tensor.shape, 0) for name, tensor in self._tensors.items()}

    def _held_by(self, tensor: names.Tensor) -> str:
        """The key of the weight that a tensor is, or is a copy of; a tied head is the embedding."""
        key = names.key(tensor.path[2:] if tensor.copy else tensor.path)
        return key if key in self._arrays else "embed"

    def where(self, name: str) -> str:
        return str(self.folder)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        tensor = self._tensors[name]
        key = self._held_by(tensor)
        value = self._arrays[key]
        if tensor.expert is not None:  # a dynamic index: a static one would compile once an expert
            value = jax.lax.dynamic_index_in_dim(value, np.int32(tensor.expert), keepdims=False)
        value = np.asarray(value)
        value = value.T if tensor.transposed and key != "embed" else value
        return value[(rows, columns)[: value.ndim]]
