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
from deepseek_jax.model.packing import Quantization, packed_like, packing_of
from deepseek_jax.model.scan_layers import stack_layers
from deepseek_jax.ops.fp8 import dequantize
from deepseek_jax.ops.packed import Packed, Packing
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


def load_model(
    model: str | Path,
    *,
    dtype: jnp.dtype | None = jnp.float32,
    layout: Layout = LOCAL,
    quantization: Quantization = "none",
) -> Model:
    """A model from a Hugging Face folder or a converted one, layer by layer.

    In this order: the configuration and the headers of the weights, checked against each other; the layout, which
    may not divide the model; the bytes of each device.

    FP8 weights are unpacked on the devices, but for `quantization` "fp8", which keeps their codes and scales. Every
    process reads the bytes that its own devices hold, and no more. For a stacked layout the layers are joined
    at the end; until then the devices hold both forms.

    Args:
        model: a folder with config.json and weights, or a name on the hub.
        dtype: to compute in; None keeps the stored one, and bfloat16 for FP8 weights. Router biases stay float32.
        layout: how the model lies and runs; without a mesh it lies on the first device.
        quantization: projections in fp8, int8 or int4, to be served; see `model.packing.packing_of`.

    Returns:
        The model. Its configuration has the MTP modules that the folder holds, and no `quantization`.

    Raises:
        ValueError: damaged, missing, unknown or misshapen tensors, an unsupported configuration, a mesh that does not
            divide the model, or a quantization that is unknown or on a mesh to train on; that is said before any weight
            is read.
    """
    opened = open_folder(model)
    config = dataclasses.replace(opened.config, quantization=None)
    graphdef, _ = abstract_weights(config, layout=layout)
    _, like = abstract_weights(opened.config, layout=_by_layer(layout))
    like = packed_like(opened.config, like, quantization, layout)
    _check_copies(opened)
    read = functools.partial(_read_by_layer, opened, dtype, quantization, like)
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


def _read_by_layer(
    opened: ModelFolder, dtype: jnp.dtype | None, quantization: Quantization, like: nnx.State
) -> nnx.State:
    leaves = {names.key(path): leaf for path, leaf in nnx.to_flat_state(like)}
    place = {key: jax.tree.map(_placed, leaf.get_raw_value()) for key, leaf in leaves.items()}
    arrays: dict[str, jax.Array | Packed] = {}

    def becomes(array: StoredArray, leaf: nnx.Variable) -> _Becomes:
        packing = packing_of(opened.config, quantization, array.path, len(array.shape))
        return _Becomes(array.transposed, _computed_in(leaf, array, dtype), packing)

    with ThreadPoolExecutor(THREADS) as pool:
        for unit in by_unit([array for array in opened.arrays if array.copy_of is None]).values():
            raw = dict(zip(unit, pool.map(lambda a: _read(opened.source, a, place[_key(a)]), unit), strict=True))
            arrays |= _settled(raw, place, opened.config, lambda array: becomes(array, leaves[_key(array)]))
    return names.unflat(arrays, like)


def _key(array: StoredArray) -> str:
    """The key of the weight that an array is, or is the scale of."""
    return names.key(array.path[:-1] if array.path[-1] == "scale" else array.path)


def _placed(shape: jax.ShapeDtypeStruct) -> Sharding:
    return shape.sharding or SingleDeviceSharding(jax.local_devices()[0])


class _Becomes(NamedTuple):
    """What a stored array becomes: turned to [in, out] if it is `transposed`, then packed, or cast to a dtype."""

    transposed: bool
    dtype: jnp.dtype
    packing: Packing | None


def _computed_in(leaf: nnx.Variable, array: StoredArray, dtype: jnp.dtype | None) -> jnp.dtype:
    if isinstance(leaf, RouterBias):
        return jnp.dtype(jnp.float32)
    stored = jnp.dtype(jnp.bfloat16) if array.dtype == "F8_E4M3" else DTYPES[array.dtype]
    return stored if dtype is None else jnp.dtype(dtype)


def _read(source: TensorSource, array: StoredArray, place: Sharding | Packed) -> jax.Array:
    """An array as stored, in the file's orientation, on the devices that will hold the weight."""
    read: dict[str, np.ndarray] = {}

    def once(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in read:  # replicas ask for the same part
            read[str(index)] = read_part(source, array, index)
        return read[str(index)]

    place = place.codes if isinstance(place, Packed) else place
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
    place: Mapping[str, Sharding | Packed],
    config: ModelConfig,
    becomes: Callable[[StoredArray], _Becomes],
) -> dict[str, jax.Array | Packed]:
    """The weights of one unit from its stored arrays, by one compiled call."""
    scales = {_key(array): value for array, value in raw.items() if array.path[-1] == "scale"}
    weights = {array: value for array, value in raw.items() if array.path[-1] != "scale"}
    block = config.quantization.weight_block_size if scales else None
    settle = _settler(tuple(map(becomes, weights)), block, tuple(place[_key(array)] for array in weights))
    values = settle([(value, scales.get(_key(array))) for array, value in weights.items()])
    return dict(zip(map(_key, weights), values, strict=True))


@functools.lru_cache(maxsize=64)
def _settler(plan: tuple[_Becomes, ...], block: tuple[int, int] | None, places: tuple[Sharding | Packed, ...]):
    """Stored arrays to weights."""

    def settled(value: jax.Array, scale: jax.Array | None, to: _Becomes) -> jax.Array | Packed:
        turned = (lambda a: jnp.swapaxes(a, -1, -2)) if to.transposed else lambda a: a
        scale = None if scale is None else scale.astype(jnp.float32)
        if to.packing is not None and to.packing.scheme == "fp8" and scale is not None:
            return Packed(codes=turned(value), scale=turned(scale), block=to.packing.block)  # as they are stored
        dtype = to.dtype if to.packing is None else jnp.float32
        value = turned(value.astype(dtype) if scale is None else dequantize(value, scale, block, dtype))
        return value if to.packing is None else to.packing.pack(value)

    settle = lambda pairs: tuple(settled(*pair, to) for pair, to in zip(pairs, plan, strict=True))
    return jax.jit(settle, out_shardings=places)


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
