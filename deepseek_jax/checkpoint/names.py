"""The one table between our weights' paths and Hugging Face's tensor names, used for loading and for export."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
from flax import nnx

Path = tuple[str | int, ...]

_MODEL = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "attention.q": "self_attn.q_proj.weight",
    "attention.q_a": "self_attn.q_a_proj.weight",
    "attention.q_norm": "self_attn.q_a_layernorm.weight",
    "attention.q_b": "self_attn.q_b_proj.weight",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b": "self_attn.kv_b_proj.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.v_bias": "self_attn.v_proj.bias",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "mlp.router": "mlp.gate.weight",
    "mlp.bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared.gate": "mlp.shared_experts.gate_proj.weight",
    "mlp.shared.up": "mlp.shared_experts.up_proj.weight",
    "mlp.shared.down": "mlp.shared_experts.down_proj.weight",
    "mlp.experts.gate": "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.up": "mlp.experts.{}.up_proj.weight",
    "mlp.experts.down": "mlp.experts.{}.down_proj.weight",
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint and where it lies in ours.

    `shape` is the file's. `transposed`: the file holds [out, in], we hold [in, out]. `expert`: the row of our
    stacked array that this tensor is, or None.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    transposed: bool
    expert: int | None


def tensors(abstract: nnx.State) -> list[Tensor]:
    """Every tensor that a checkpoint of these weights holds, in the order of the layers.

    Args:
        abstract: weights, or their shapes as `model.decoder.abstract_weights` gives them.
    """
    found = []
    for path, leaf in nnx.to_flat_state(abstract):
        found += _tensors_of(path, leaf.get_raw_value().shape)
    return found


def _tensors_of(path: Path, shape: tuple[int, ...]) -> Iterator[Tensor]:
    if path[0] == "layers":
        template = f"model.layers.{path[1]}." + _LAYER[".".join(map(str, path[2:]))]
    else:
        template = _MODEL[".".join(map(str, path))]
    stacked = "{}" in template
    of_one = shape[1:] if stacked else shape
    transposed = len(of_one) == 2 and path[-1] != "embed"
    in_file = of_one[::-1] if transposed else of_one
    for expert in range(shape[0]) if stacked else [None]:
        yield Tensor(name=template.format(expert), path=path, shape=in_file, transposed=transposed, expert=expert)


def key(path: Path) -> str:
    """A path as one word, as Orbax folders name it: layers.3.attention.q_a."""
    return ".".join(map(str, path))


def flat(weights: nnx.State) -> dict[str, jax.Array]:
    """Weights as a flat dictionary by `key`."""
    return {key(path): leaf.get_raw_value() for path, leaf in nnx.to_flat_state(weights)}


def unflat(arrays: dict[str, jax.Array], like: nnx.State) -> nnx.State:
    """The inverse of `flat`: the same variables as `like`, holding `arrays`."""
    return nnx.from_flat_state([(path, leaf.replace(arrays[key(path)])) for path, leaf in nnx.to_flat_state(like)])
