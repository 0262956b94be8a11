"""Which of a model's matrices are packed, and how: what loading, sharding and planning go by."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, get_args

import jax
from flax import nnx

from deepseek_jax.config import FP8Config, ModelConfig
from deepseek_jax.model.scan_layers import Path
from deepseek_jax.ops.packed import Packed, Packing
from deepseek_jax.sharding import LOCAL, Layout, weight_sharding

Quantization = Literal["none", "fp8", "int8", "int4"]

# Matrices that the published FP8 checkpoints keep in bfloat16, and those of an adapter.
_NEVER = ("embed", "head", "router", "project", "weights", "a", "b")


def is_packable(path: Path, rank: int) -> bool:
    """Whether published FP8 checkpoints have a weight in FP8.

    Args:
        path: of the weight; beside an adapter's two it is "weight" below the matrix's.
        rank: of one layer's.
    """
    name = path[-2] if path[-1] == "weight" else path[-1]
    return rank > 1 and name not in _NEVER


def packing_of(config: ModelConfig, quantization: Quantization, path: Path, rank: int) -> Packing | None:
    """How a weight is packed; None where it stays.

    Args:
        config: of the model; where it is in FP8, for the blocks and the scales of those.
        quantization: "int4" packs routed experts so, in a model without experts every projection; other projections
            beside experts are fp8 then.
        path, rank: as for `is_packable`.

    Raises:
        ValueError: an unknown quantization.
    """
    if quantization not in get_args(Quantization):
        raise ValueError(f"quantization: got {quantization!r}, wanted one of {', '.join(get_args(Quantization))}")
    if quantization == "none" or not is_packable(path, rank):
        return None
    of_file = config.quantization or FP8Config()
    scheme = "fp8" if quantization == "int4" and config.moe is not None and "experts" not in path else quantization
    return Packing(scheme=scheme, block=of_file.weight_block_size[::-1], scale_fmt=of_file.scale_fmt)


def packed_like(
    config: ModelConfig, abstract: nnx.State, quantization: Quantization, layout: Layout = LOCAL
) -> nnx.State:
    """The shapes of weights, and their shardings, as they are packed.

    Args:
        config: the architecture.
        abstract: of `model.decoder.abstract_weights`, for the same layout.
        quantization: of which format.
        layout: of the model. Codes lie as the weight does. So do scales, but for an axis whose parts hold no whole
            number of blocks: along that one they are whole everywhere.

    Raises:
        ValueError: an unknown quantization, or a mesh to train on.
    """
    _refuse_training(quantization, layout)

    def of(path: Path, leaf: nnx.Variable) -> tuple[Path, nnx.Variable]:
        value, axes = leaf.get_raw_value(), leaf.get_metadata()["axes"]
        packing = packing_of(config, quantization, path, _rank(path, value))
        if packing is None:
            return path, leaf
        like = packing.like(value.shape)
        if layout.mesh is not None:
            put = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
            like = jax.tree.map(put, like, places(layout, like, axes, _name(path)))
        return path, leaf.replace(like)

    return nnx.from_flat_state([of(path, leaf) for path, leaf in nnx.to_flat_state(abstract)])


def places(layout: Layout, like: Packed, axes: tuple[str | None, ...], name: str) -> Packed:
    """How codes and scales lie on the mesh of a layout; see `packed_like`."""
    whole_blocks = [
        axis if side == 1 or size // layout.parts(axis) % side == 0 else None
        for axis, size, side in zip(axes[-2:], like.shape[-2:], like.block, strict=True)
    ]
    return Packed(
        codes=weight_sharding(layout, like.shape, axes, name),
        scale=layout.sharding(*axes[:-2], *whole_blocks),
        block=like.block,
    )


def packed_weights(
    config: ModelConfig, weights: nnx.State, quantization: Quantization, layout: Layout = LOCAL
) -> nnx.State:
    """Weights in memory, by layer or in stacks, packed one after another; what stays are the very same arrays.

    Args:
        config: their architecture.
        weights: plain ones, or with an adapter beside them, which is not packed.
        quantization: of which format; those that are so packed already stay as they are.
        layout: of the weights.

    Raises:
        ValueError: as `packed_like`; or weights are packed in another way.
    """
    if quantization == "none":
        return weights
    _refuse_training(quantization, layout)
    done = []
    for path, leaf in nnx.to_flat_state(weights):
        value = leaf.get_raw_value()
        packing = packing_of(config, quantization, path, _rank(path, value))
        if isinstance(value, Packed):
            if packing.like(value.shape).codes.dtype != value.codes.dtype:
                raise ValueError(
                    f"quantization: got {quantization!r} for weights that are packed already, {_name(path)} as "
                    f"{value.codes.dtype}; wanted those of a model loaded without quantization"
                )
        elif packing is not None:
            where = None
            if layout.mesh is not None:
                where = places(layout, packing.like(value.shape), leaf.get_metadata()["axes"], _name(path))
            leaf = leaf.replace(_packer(packing, where)(value))
        done.append((path, leaf))
    return nnx.from_flat_state(done)


@lru_cache(maxsize=64)
def _packer(packing: Packing, where: Packed | None) -> Callable[[jax.Array], Packed]:
    return jax.jit(packing.pack, out_shardings=where)


def refuse_packed(weights: nnx.State, what: str) -> None:
    """Refuse what is packed where numbers of the weights' own are wanted, in one line that says for what."""
    for path, leaf in nnx.to_flat_state(weights):
        if isinstance(leaf.get_raw_value(), Packed):
            wanted = f"wanted a model without quantization {what}"
            raise ValueError(f"weights: got packed ones, {_name(path)} among them, {wanted}")


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _rank(path: Path, value: Any) -> int:
    return len(value.shape) - (path[0] == "stacks")


def _refuse_training(quantization: Quantization, layout: Layout) -> None:
    if quantization != "none" and layout.mesh is not None and layout.workload != "serve":
        raise ValueError(f'quantization: got {quantization!r} on a mesh to train on, wanted "none" or one to serve')
