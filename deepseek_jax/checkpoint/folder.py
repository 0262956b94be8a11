"""Models from folders, Hugging Face's and converted ones, onto one device or a mesh."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from deepseek_jax.checkpoint import names, writer
from deepseek_jax.checkpoint.convert import THREADS
from deepseek_jax.checkpoint.headers import DTYPES
from deepseek_jax.checkpoint.model_folder import ModelFolder, open_folder
from deepseek_jax.checkpoint.orbax_layers import ConvertedFolder
from deepseek_jax.checkpoint.stored_arrays import StoredArray, TensorSource, by_unit, read_part
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.scan_layers import stack_layers
from deepseek_jax.ops.fp8 import dequantize
from deepseek_jax.sharding import LOCAL, Layout, module_layout


class Model(NamedTuple):
    """A model in memory: its configuration, NNX's static description, and the weights."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    weights: nnx.State

    @property
    def layout(self) -> Layout:
        """How it lies on devices and runs there."""
        return module_layout(self.graphdef)


def load_model(model: str | Path, *, dtype: jnp.dtype | None = jnp.float32, layout: Layout = LOCAL) -> Model:
    """A model from a Hugging Face folder or a converted one, layer by layer.

    In this order: the configuration and the headers of the weights, checked against each other; the layout, which
    may not divide the model; the bytes of each device.

    FP8 weights are unpacked on the devices. Every process reads the bytes that its own devices hold, and no more. For
    a stacked layout the layers are joined at the end; until then the devices hold both forms.

    Args:
        model: a folder with config.json and weights, or a name on the hub.
        dtype: to compute in; None keeps the stored one, and bfloat16 for FP8 weights. Router biases stay float32.
        layout: how the model lies and runs; without a mesh it lies on the first device.

    Returns:
        The model. Its configuration has the MTP modules that the folder holds, and no `quantization`.

    Raises:
        ValueError: damaged, missing, unknown or misshapen tensors, an unsupported configuration, or a mesh that does
            not divide the model; that is said before any weight is read.
    """
    opened = open_folder(model)
    config = dataclasses.replace(opened.config, quantization=None)
    graphdef, _ = abstract_weights(config, layout=layout)
    _check_copies(opened)
    read = functools.partial(_read_by_layer, opened, dtype, layout)
    return Model(config, graphdef, stack_layers(read(), config, layout) if layout.scan_layers else read())


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
