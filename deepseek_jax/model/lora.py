"""LoRA: matrices of low rank beside frozen weights, in one tree with them, and summed into them for an export.

An adapter is a tree of its own. Where the weights have a matrix at a path, it has two below that path, `a` [in, rank]
and `b` [rank, out], with the leading axes of a stack or of experts in front. `with_adapter` joins the two trees; of the
joined one `decoder_of` makes a decoder that computes x W + s (x A) B, `ops.low_rank` says how. Sampler and trainer both
run it, each with the tree as it lies there. W + s A B is formed for exports alone.

Source: arXiv 2106.09685 section 4.1.
"""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.config.model import check_whole
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.packing import refuse_packed
from deepseek_jax.model.scan_layers import Path, members
from deepseek_jax.ops.low_rank import LowRank
from deepseek_jax.sharding import LOCAL, Layout, weight_sharding

M = TypeVar("M", bound=nnx.Module)
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter's size, strength and place.

    Args:
        rank: columns of A and rows of B.
        alpha: strength; A B counts alpha / rank times, or with `rslora` alpha / sqrt(rank) times.
        targets: Hugging Face's names of the modules to adapt, without the layer, or "all-linear"; see
            `checkpoint.adapters.adapted_paths`.
        rslora: rank-stabilised (arXiv 2312.03732): the strength of a large rank does not fade.

    Raises:
        ValueError: a rank below 1, an alpha that is no number above 0, or no target.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | Literal["all-linear"]
    rslora: bool = False

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < 1e9:
            raise ValueError(f"alpha: got {self.alpha!r:.80}, wanted a number above 0 and below 1e9")
        named = isinstance(self.targets, tuple) and self.targets and all(isinstance(of, str) for of in self.targets)
        if self.targets != ALL_LINEAR and not named:
            raise ValueError(f"targets: got {self.targets!r}, wanted a tuple of module names or {ALL_LINEAR!r}")

    @property
    def scale(self) -> float:
        """How many times A B counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def abstract_adapter(
    config: ModelConfig,
    lora: LoRAConfig,
    paths: Collection[Path],
    *,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout = LOCAL,
) -> nnx.State:
    """An adapter's shapes: leaves are jax.ShapeDtypeStruct, with shardings on a layout with a mesh.

    Args:
        config: the model's architecture.
        lora: for the rank.
        paths: of the matrices to adapt, by layer.
        dtype: of A and B.
        layout: of the model. A is cut as the rows of its matrix are, B as the columns.

    Raises:
        ValueError: the mesh does not divide the model.
    """
    found, adapts = [], frozenset(paths)
    for path, leaf in nnx.to_flat_state(abstract_weights(config, layout=layout)[1]):
        of = [member in adapts for member in members(path, config)]
        assert all(of) or not any(of), f"{path}: some layers of a stack are adapted, others not"
        if not of[0]:
            continue
        (*lead, rows, columns), (*kinds, inner, outer) = leaf.get_raw_value().shape, leaf.get_metadata()["axes"]
        for name, shape, axes in (
            ("a", (*lead, rows, lora.rank), (*kinds, inner, None)),
            ("b", (*lead, lora.rank, columns), (*kinds, None, outer)),
        ):
            place = None
            if layout.mesh is not None:
                place = weight_sharding(layout, shape, axes, ".".join(map(str, (*path, name))))
            found.append(((*path, name), nnx.Param(jax.ShapeDtypeStruct(shape, dtype, sharding=place), axes=axes)))
    return nnx.from_flat_state(found)


def first_adapter(
    config: ModelConfig,
    lora: LoRAConfig,
    paths: Collection[Path],
    *,
    seed: int,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout = LOCAL,
) -> nnx.State:
    """An adapter that changes nothing yet: A is uniform within 1 / sqrt(in), B is 0.

    A matrix's first values depend on its path by layer and on the seed, not on the layout.

    Args:
        config, lora, paths, dtype, layout: as for `abstract_adapter`, which says what it raises.
        seed: of A.

    Source: PEFT's src/peft/tuners/lora/layer.py, Kaiming's uniform distribution with a = sqrt(5).
    """

    def first(path: Path, shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] == "b":
            return np.zeros(shape, dtype)
        random = np.random.default_rng((seed, zlib.crc32(".".join(map(str, path)).encode())))
        return ((2 * random.random(shape) - 1) / math.sqrt(shape[-2])).astype(dtype)

    like = abstract_adapter(config, lora, paths, dtype=dtype, layout=layout)
    arrays = {}
    for path, leaf in nnx.to_flat_state(like):
        shape = leaf.get_raw_value().shape
        arrays |= {of: first(of, shape[1:] if path[0] == "stacks" else shape) for of in members(path, config)}
    return adapter_from_arrays(arrays, like, config)


def adapter_from_arrays(arrays: Mapping[Path, np.ndarray], like: nnx.State, config: ModelConfig) -> nnx.State:
    """An adapter from its matrices by layer, which every process holds, as `like` of `abstract_adapter` lies."""

    def filled(path: Path, leaf: nnx.Variable) -> tuple[Path, nnx.Variable]:
        parts = [arrays[of] for of in members(path, config)]
        value, place = np.stack(parts) if path[0] == "stacks" else parts[0], leaf.get_raw_value().sharding
        if place is None:
            return path, leaf.replace(jnp.asarray(value))
        return path, leaf.replace(jax.make_array_from_callback(value.shape, place, lambda index: value[index]))

    return nnx.from_flat_state([filled(path, leaf) for path, leaf in nnx.to_flat_state(like)])


class Adapted(nnx.Module):
    """Takes the place of a frozen matrix in a module, with the two of low rank beside it."""

    def __init__(self, weight: nnx.Variable, a: nnx.Variable, b: nnx.Variable):
        self.weight, self.a, self.b, self.scale = weight, a, b, b.get_metadata(_SCALE)

    def __getitem__(self, everything) -> LowRank:
        """What `[...]` of a plain matrix is."""
        return LowRank(w=self.weight[...], a=self.a[...], b=self.b[...], scale=self.scale)


_SCALE = "scale"


def with_adapter(weights: nnx.State, adapter: nnx.State, lora: LoRAConfig) -> nnx.State:
    """One tree of frozen weights and an adapter: at an adapted matrix's path are `weight`, `a` and `b`.

    Each is a variable with logical axes of its own, so that what casts, moves or stacks weights path by path does so
    with these. No array is touched; the leaves may be shapes.

    Args:
        weights: of a decoder, by layer or in stacks.
        adapter: made for the same layout.
        lora: for the scale, which becomes metadata of each `b`.

    Raises:
        ValueError: the adapter has a path that the weights lack.
    """
    parts, joined = dict(nnx.to_flat_state(adapter)), []
    for path, leaf in nnx.to_flat_state(weights):
        if (*path, "a") in parts:
            a, b = (parts.pop((*path, name)) for name in ("a", "b"))
            joined += [((*path, "weight"), leaf), ((*path, "a"), a), ((*path, "b"), b.replace(**{_SCALE: lora.scale}))]
        else:
            joined.append((path, leaf))
    _check_used(parts)
    return nnx.from_flat_state(joined)


def is_adapted(weights: nnx.State) -> bool:
    """Whether a tree is one of `with_adapter`."""
    return any(_SCALE in leaf.get_metadata() for _, leaf in nnx.to_flat_state(weights))


def decoder_of(graphdef: nnx.GraphDef[M], weights: nnx.State) -> M:
    """The module of a tree of weights, plain ones or those of `with_adapter`.

    Args:
        graphdef: of the module without an adapter.
        weights: for it.
    """
    flat = dict(nnx.to_flat_state(weights))
    paths = [path[:-1] for path, leaf in flat.items() if _SCALE in leaf.get_metadata()]
    adapters = {path: [flat.pop((*path, name)) for name in ("weight", "a", "b")] for path in paths}
    plain = nnx.from_flat_state([*flat.items(), *((path, parts[0]) for path, parts in adapters.items())])
    model = nnx.merge(graphdef, plain)
    for path, parts in adapters.items():
        setattr(_at(model, path[:-1]), path[-1], Adapted(*(part.replace() for part in parts)))
    return model


def _at(module: Any, path: Path) -> Any:
    for name in path:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    return module


def _check_used(left: Mapping[Path, nnx.Variable]) -> None:
    if left:
        name = ".".join(map(str, min(left, key=str)))
        raise ValueError(
            f"adapter: got {name}, for which there is no weight; wanted one made for this model and layout"
        )


def adapted(weights: nnx.State, adapter: nnx.State, lora: LoRAConfig) -> nnx.State:
    """The weights W + scale A B where there is an adapter, and the very same ones elsewhere.

    The product is of numbers in the weight's dtype, added up in float32; the sum is rounded to that dtype once. So an
    adapter whose B is 0 gives the weights themselves.

    Args:
        weights: of a decoder, by layer or in stacks; matrices [in, out], [L, in, out], [E, in, out], [L, E, in, out].
        adapter: made for the same layout.
        lora: for the scale.

    Raises:
        ValueError: the adapter has a path that the weights lack, or the weights are packed.
    """
    refuse_packed(weights, "to sum an adapter into; beside packed ones it runs by with_adapter")
    parts = dict(nnx.to_flat_state(adapter))
    summed = []
    for path, leaf in nnx.to_flat_state(weights):
        if (*path, "a") in parts:
            a, b = (parts.pop((*path, name)).get_raw_value() for name in ("a", "b"))
            leaf = leaf.replace(_sum(leaf.get_raw_value(), a, b, lora.scale))
        summed.append((path, leaf))
    _check_used(parts)
    return nnx.from_flat_state(summed)


def _sum(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    product = jnp.matmul(a.astype(weight.dtype), b.astype(weight.dtype), preferred_element_type=jnp.float32)
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)


def merge(weights: nnx.State, adapter: nnx.State, lora: LoRAConfig) -> nnx.State:
    """`adapted`, compiled: what an export writes.

    Weights without an adapter are the very same arrays, where one compiled call for all would copy them.
    """
    adapts = {path[:-1] for path, _ in nnx.to_flat_state(adapter)}
    summed, others = nnx.split_state(weights, lambda path, _: path in adapts, ...)
    return nnx.merge_state(_compiled(summed, adapter, lora), others)


_compiled = partial(jax.jit, static_argnames="lora")(adapted)
