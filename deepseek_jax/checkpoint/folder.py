"""Models in memory, from folders and back: Hugging Face's, and converted ones, onto one device or a mesh."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from deepseek_jax import distributed
from deepseek_jax.checkpoint import files, names, writer
from deepseek_jax.checkpoint.convert import THREADS, write_hf
from deepseek_jax.checkpoint.finite import check_finite
from deepseek_jax.checkpoint.headers import DTYPES, NAMES, Entry
from deepseek_jax.checkpoint.model_folder import DTYPE_KEYS, ModelFolder, open_folder
from deepseek_jax.checkpoint.orbax_layers import ConvertedFolder
from deepseek_jax.checkpoint.sidecars import copy_sidecars, drop_missing_code
from deepseek_jax.checkpoint.stored_arrays import StoredArray, TensorSource, by_unit, read_part
from deepseek_jax.config import ModelConfig, to_hf
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.scan_layers import members, stack_layers
from deepseek_jax.ops.fp8 import dequantize
from deepseek_jax.sharding import LOCAL, Layout


class Model(NamedTuple):
    """A model in memory: its configuration, NNX's static description, and the weights."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    weights: nnx.State


def load_model(folder: str | Path, *, dtype: jnp.dtype | None = jnp.float32, layout: Layout = LOCAL) -> Model:
    """A model from a Hugging Face folder or a converted one, layer by layer.

    FP8 weights are unpacked on the devices. Every process reads the bytes that its own devices hold, and no more. For
    a stacked layout the layers are joined at the end; until then the devices hold both forms.

    Args:
        folder: with config.json and weights, or the name of a model on the hub.
        dtype: to compute in; None keeps the stored one, and bfloat16 for FP8 weights. Router biases stay float32.
        layout: how the model lies and runs; without a mesh it lies on the first device.

    Returns:
        The model. Its configuration has the MTP modules that the folder holds, and no `quantization`.

    Raises:
        ValueError: damaged, missing, unknown or misshapen tensors, an unsupported configuration, or a mesh that does
            not divide the model; that is said before any weight is read.
    """
    opened = open_folder(folder)
    config = dataclasses.replace(opened.config, quantization=None)
    graphdef, _ = abstract_weights(config, layout=layout)
    _check_copies(opened)
    if layout.scan_layers:
        return Model(config, graphdef, stack_layers(_read_by_layer(opened, dtype, layout), config, layout))
    return Model(config, graphdef, _read_by_layer(opened, dtype, layout))


def lay_out(model: Model, layout: Layout) -> Model:
    """A model that every process holds, all the same, by layer and on a device of its own, under another layout.

    Raises:
        ValueError: a mesh that does not divide the model.
    """
    graphdef, _ = abstract_weights(model.config, layout=layout)
    weights = model.weights
    if layout.mesh is not None:
        _, like = abstract_weights(model.config, layout=_by_layer(layout))
        weights = jax.tree.map(_divided, weights, like)
    return Model(model.config, graphdef, stack_layers(weights, model.config, layout) if layout.scan_layers else weights)


def _divided(value: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    held = np.asarray(value)
    return jax.make_array_from_callback(held.shape, like.sharding, lambda index: held[index])


def _by_layer(layout: Layout) -> Layout:
    return dataclasses.replace(layout, scan_layers=False)


def _read_by_layer(opened: ModelFolder, dtype: jnp.dtype | None, layout: Layout) -> nnx.State:
    _, abstract = abstract_weights(opened.config, layout=_by_layer(layout))
    leaves = {names.key(path): leaf for path, leaf in nnx.to_flat_state(abstract)}
    place = {key: _placed(leaf) for key, leaf in leaves.items()}
    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for unit in by_unit([array for array in opened.arrays if array.copy_of is None]).values():
            raw = dict(zip(unit, pool.map(lambda a: _read(opened.source, a, place[_key(a)]), unit), strict=True))
            computed_in = lambda array: _computed_in(leaves[_key(array)], array, dtype)
            arrays |= _settled(raw, place, opened.config, computed_in)
    return names.unflat(arrays, abstract)


def _key(array: StoredArray) -> str:
    """The key of the weight that an array is, or is the scale of."""
    return names.key(array.path[:-1] if array.path[-1] == "scale" else array.path)


def _placed(leaf: nnx.Variable) -> Sharding:
    return leaf.get_raw_value().sharding or SingleDeviceSharding(jax.local_devices()[0])


def _computed_in(leaf: nnx.Variable, array: StoredArray, dtype: jnp.dtype | None) -> jnp.dtype:
    if isinstance(leaf, RouterBias):
        return jnp.dtype(jnp.float32)
    stored = jnp.dtype(jnp.bfloat16) if array.dtype == "F8_E4M3" else DTYPES[array.dtype]
    return stored if dtype is None else jnp.dtype(dtype)


def _read(source: TensorSource, array: StoredArray, place: Sharding) -> jax.Array:
    """An array as stored, in the file's orientation, on the devices that will hold the weight."""
    read: dict[str, np.ndarray] = {}

    def once(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in read:  # replicas ask for the same part
            read[str(index)] = read_part(source, array, index)
        return read[str(index)]

    return jax.make_array_from_callback(array.shape, _as_filed(array, place), once)


def _as_filed(array: StoredArray, place: Sharding) -> Sharding:
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
    raw: Mapping[StoredArray, jax.Array],
    place: Mapping[str, Sharding],
    config: ModelConfig,
    computed_in: Callable[[StoredArray], jnp.dtype],
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
            if scale is None:
                value = value.astype(dtype)
            else:
                value = dequantize(value, scale.astype(jnp.float32), block, dtype)
            values.append(jnp.swapaxes(value, -1, -2) if transposed else value)
        return tuple(values)

    return jax.jit(settle, out_shardings=shardings)


def _check_copies(opened: ModelFolder) -> None:
    """What repeats another weight must: a tied head the embedding; of an MTP module it is said if it does not."""
    by_path = {array.path: array for array in opened.arrays}
    for array in opened.arrays:
        if array.copy_of is None or jax.process_index() != 0:
            continue
        copy, main = array.tensors[0].name, by_path[array.copy_of].tensors[0].name
        if _same(opened.source, main, copy):
            continue
        if array.path == ("head",):
            raise ValueError(
                f"{opened.source.where(copy)}: tensor {copy!r} is not equal to {main!r}, though config.json says that "
                "they are tied; set tie_word_embeddings to false there if the head is meant, or remove the tensor"
            )
        warnings.warn(
            f"{opened.source.folder}: {copy} is not the copy of {main} that it is in DeepSeek's checkpoints; the MTP "
            "module in memory shares the latter",
            stacklevel=3,
        )


def _same(source: TensorSource, one: str, other: str) -> bool:
    if source.entries[one][:2] != source.entries[other][:2]:
        return False
    if isinstance(source, ConvertedFolder):
        return source.hashes[one] == source.hashes[other]
    pairs = zip(writer.parts(source, one), writer.parts(source, other), strict=True)
    return all(a.tobytes() == b.tobytes() for (_, a), (_, b) in pairs)


def save_hf(
    model: Model, target: Path, *, source: Path | None = None, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Write a model from memory as a Hugging Face folder, in the dtypes it has, under whatever layout it lies.

    Several processes all call this. The main one writes; one weight of one layer at a time is gathered for it, whole
    on every device and in the main memory of every process.

    Args:
        model: to write.
        target: folder to make; it appears when it is whole.
        source: folder whose configuration and tokenizer files go with it; None writes config.json from the model.
        tokenizer: further files by name, such as `Tokenizer.files`.

    Raises:
        ValueError: the target exists, or the weights are not finite.
    """
    files.refuse_existing(target, source)
    check_finite(model.weights, target)
    with files.shared_folder(target) as partial:
        distributed.on_main(lambda: _write_sidecars(model, partial, source, tokenizer or {}))
        memory = _InMemory(model, target)
        if distributed.process_count() == 1:
            write_hf(memory, partial, writer.plan(memory))
        else:
            _write_together(memory, partial)


def _write_sidecars(model: Model, folder: Path, source: Path | None, tokenizer: Mapping[str, bytes]) -> None:
    values = to_hf(model.config)
    if source is not None:
        copy_sidecars(source, folder)
        values = files.read_json(folder / "config.json")
        values.pop("quantization_config", None)  # what is in memory is unpacked
        params, _ = nnx.split_state(model.weights, nnx.Param, ...)
        values |= {key: jax.tree.leaves(params)[0].dtype.name for key in DTYPE_KEYS if key in values}
    files.write_whole(folder / "config.json", json.dumps(values, indent=2).encode())
    for name, content in tokenizer.items():
        files.write_whole(folder / name, content)
    drop_missing_code(folder)


def _write_together(memory: "_InMemory", folder: Path) -> None:
    """The tensors as safetensors. All processes gather them, in the same order; the main one writes."""
    with distributed.together():
        shards = writer.ShardWriter(folder, writer.plan(memory)) if distributed.is_main() else None
    writes: list[Future] = []
    # what goes wrong in writing is kept to the end: until then the other processes wait for this one in every gather
    with ThreadPoolExecutor(1) as pool:
        for name in memory.entries:
            value = memory.read(name)
            if shards is not None:
                wait(writes[-1:])
                writes.append(pool.submit(shards.write, name, 0, value))
    if shards is not None:
        shards.close()
    for write in writes:
        write.result()


class _InMemory:
    """A model's weights as the tensors of a checkpoint, whether they lie by layer or in stacks."""

    def __init__(self, model: Model, folder: Path):
        self.folder = folder
        self._held: dict[str, tuple[jax.Array, int | None]] = {}  # by layer: an array, and the place if it is a stack
        for path, leaf in nnx.to_flat_state(model.weights):
            for place, member in enumerate(members(path, model.config)):
                self._held[names.key(member)] = leaf.get_raw_value(), place if path[0] == "stacks" else None
        self._gathered: tuple[str, np.ndarray] = "", np.empty(0)
        table = names.tensors(model.config, abstract_weights(model.config)[1])
        self._tensors = {tensor.name: tensor for tensor in table}
        dtype = lambda tensor: NAMES[np.dtype(self._held[self._key(tensor)][0].dtype)]
        self.entries = {name: Entry(dtype(tensor), tensor.shape, 0) for name, tensor in self._tensors.items()}

    def _key(self, tensor: names.Tensor) -> str:
        """The key of the weight that a tensor is, or is a copy of; a tied head is the embedding."""
        key = names.key(tensor.copy_of or tensor.path)
        return key if key in self._held else "embed"

    def where(self, name: str) -> str:
        return str(self.folder)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        tensor = self._tensors[name]
        key = self._key(tensor)
        array, place = self._held[key]
        if array.is_fully_addressable:
            value = _entry(array, place, tensor.expert)
        else:
            value = self._whole(key)
            value = value if tensor.expert is None else value[tensor.expert]
        value = np.asarray(value)
        value = value.T if tensor.transposed and key != "embed" else value
        return value[(rows, columns)[: value.ndim]]

    def _whole(self, key: str) -> np.ndarray:
        """A weight from all processes, which all ask for it; the last is kept, for its experts follow each other."""
        if self._gathered[0] != key:
            array, place = self._held[key]
            self._gathered = key, multihost_utils.process_allgather(_entry(array, place, None), tiled=True)
        return self._gathered[1]


def _entry(array: jax.Array, *places: int | None) -> jax.Array:
    """The entry at these places along the first axes; None is no axis."""
    given = tuple(np.int32(place) for place in places if place is not None)
    return _taken(array, given) if given else array


@jax.jit
def _taken(array: jax.Array, places: tuple[np.int32, ...]) -> jax.Array:
    """By dynamic indices: static ones would compile once an expert."""
    for place in places:
        array = jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
    return array
