"""What a model weighs: every weight as the model declares it, its parameters, and its bytes in every format.

Shapes and axes are those of `model.decoder`; nothing here declares a weight again.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from flax import nnx

from deepseek_jax.checkpoint.names import Path, is_float32
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.packing import is_packable, packing_of
from deepseek_jax.sharding import Layout

DType = Literal["f32", "bf16", "fp8", "int8", "int4"]
DTYPES: tuple[str, ...] = get_args(DType)

Kind = Literal[
    "embedding",
    "head",
    "attention",
    "dense_mlp",
    "router",
    "router_bias",
    "shared_experts",
    "routed_experts",
    "norms",
    "indexer",
    "mtp_projection",
]
# By the last word of a weight's path, else by the module that it lies in.
_NAMED: dict[str, Kind] = {
    "embed": "embedding",
    "head": "head",
    "router": "router",
    "bias": "router_bias",
    "project": "mtp_projection",
}
_WITHIN: dict[str, Kind] = {
    "attention": "attention",
    "mlp": "dense_mlp",
    "shared": "shared_experts",
    "experts": "routed_experts",
    "indexer": "indexer",
}


class Weight(NamedTuple):
    """`count` arrays of one shape, [in, out] where they are matrices ([V, D] for the embedding, [E, in, out] experts).

    axes: logical ones as the model gives them, which `sharding` knows. float32: a checkpoint stores it in float32
    whatever the rest is in. module: it belongs to an MTP module.
    """

    path: Path
    kind: Kind
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    count: int
    float32: bool
    module: bool

    @property
    def size(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def packable(self) -> bool:
        """An FP8 checkpoint stores it in FP8."""
        return is_packable(self.path, len(self.shape))


@lru_cache(maxsize=256)
def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of a model in memory, its MTP modules' and the router biases among them."""
    _, declared = abstract_weights(config, layout=Layout(scan_layers=True))  # one of each kind of layer
    found = []
    for path, leaf in nnx.to_flat_state(declared):
        stacked = path[0] == "stacks"
        count, shape = (1, leaf.get_raw_value().shape) if not stacked else _unstacked(leaf.get_raw_value().shape)
        found.append(
            Weight(
                path=path,
                kind=_kind(path),
                shape=shape,
                axes=leaf.get_metadata()["axes"][stacked:],
                count=count,
                float32=is_float32(config, path, len(shape)),
                module=path[0] == "mtp",
            )
        )
    return tuple(found)


def _unstacked(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return shape[0], shape[1:]


def _kind(path: tuple[str | int, ...]) -> Kind:
    name, module = path[-1], path[-2] if len(path) > 1 else ""
    if module == "indexer":
        return "indexer"
    return "norms" if name.endswith("norm") else _NAMED[name] if name in _NAMED else _WITHIN[module]


@lru_cache(maxsize=256)
def moe_layers(config: ModelConfig, *, modules: bool = False) -> int:
    """How many of the model's layers, and of its MTP modules with `modules`, are mixtures of experts."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if modules else 0)
    return sum(map(config.is_moe_layer, range(layers)))


# --- parameters ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Trained numbers by kind; `mtp` is all that the MTP modules have of their own. Router biases are not trained."""

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    router: int
    shared_experts: int
    routed_experts: int
    norms: int
    indexer: int
    mtp: int

    @property
    def main(self) -> int:
        """Without the MTP modules: what a published size counts."""
        return self.total - self.mtp

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def parameters(config: ModelConfig) -> Parameters:
    """Every trained number of a model.

    >>> from deepseek_jax.config import preset
    >>> parameters(preset("r1-671b")).main
    671026404352
    """
    counts = dict.fromkeys((field.name for field in fields(Parameters)), 0)
    for weight in weights(config):
        if weight.kind != "router_bias":
            counts["mtp" if weight.module else weight.kind] += weight.size
    return Parameters(**counts)


def active_parameters(config: ModelConfig) -> int:
    """Parameters of the main model that one token meets: its own experts alone, and one row of the embedding."""
    p = parameters(config)
    idle = 0
    if config.moe is not None:
        idle = p.routed_experts // config.moe.n_routed_experts * inactive_experts(config)
    rows = 0 if config.tie_word_embeddings else p.embedding - config.hidden_size
    return p.main - idle - rows


def inactive_experts(config: ModelConfig) -> int:
    """Routed experts of a layer that a token does not meet."""
    return 0 if config.moe is None else config.moe.n_routed_experts - config.moe.num_experts_per_tok


# --- bytes ---------------------------------------------------------------------------------------


def weight_bytes(config: ModelConfig, dtype: DType, *, mtp: bool = False) -> int:
    """Bytes of a model's weights in memory, over all chips, nothing held twice.

    Args:
        config: the architecture.
        dtype: "bf16" and "f32": all in it but router biases, which are float32. "fp8", "int8", "int4": projections
            packed as `load_model` packs them (`model.packing.packing_of`, `ops.packed`), the rest bfloat16.
        mtp: with the MTP modules' own weights. Embedding and head are the model's.

    >>> from deepseek_jax.config import preset
    >>> weight_bytes(preset("r1-671b"), "fp8")
    673150611808
    """
    return sum(weight_bytes_by_kind(config, dtype, mtp=mtp).values())


def weight_bytes_by_kind(config: ModelConfig, dtype: DType, *, mtp: bool = False) -> dict[Kind, int]:
    """The same by kind; a module's weights are counted with their kind."""
    found: dict[Kind, int] = {}
    for weight in weights(config):
        if mtp or not weight.module:
            found[weight.kind] = found.get(weight.kind, 0) + stored_bytes(config, weight, dtype)
    return found


def checkpoint_bytes(config: ModelConfig, dtype: DType) -> int:
    """Bytes of tensors in a published checkpoint: MTP modules bring copies of embedding and head.

    >>> from deepseek_jax.config import preset
    >>> checkpoint_bytes(preset("r1-671b"), "fp8")
    688574839360
    """
    copies = 2 * config.num_nextn_predict_layers * config.vocab_size * config.hidden_size * _rest_bytes(dtype)
    return weight_bytes(config, dtype, mtp=True) + copies


def stored_bytes(config: ModelConfig, weight: Weight, dtype: DType) -> int:
    """Bytes of one entry of `weights`, scales among them."""
    _check_dtype(dtype)
    if weight.float32:
        return 4 * weight.size
    if not weight.packable or dtype in ("f32", "bf16"):
        return _rest_bytes(dtype) * weight.size
    return weight.count * packing_of(config, dtype, weight.path, len(weight.shape)).like(weight.shape).nbytes


def _rest_bytes(dtype: DType) -> int:
    return 4 if dtype == "f32" else 2


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
