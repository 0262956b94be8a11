"""The one table between our weights' paths and Hugging Face's tensor names, used for loading and for export."""

import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import jax
from flax import nnx

from deepseek_jax.config import FP8Config, ModelConfig
from deepseek_jax.model.packing import is_packable
from deepseek_jax.ops.fp8 import blocks

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
    "attention.indexer.q": "self_attn.indexer.wq_b.weight",
    "attention.indexer.k": "self_attn.indexer.wk.weight",
    "attention.indexer.norm": "self_attn.indexer.k_norm.weight",
    "attention.indexer.shift": "self_attn.indexer.k_norm.bias",
    "attention.indexer.weights": "self_attn.indexer.weights_proj.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.v_bias": "self_attn.v_proj.bias",
    "attention.q_head_norm": "self_attn.q_norm.weight",
    "attention.k_head_norm": "self_attn.k_norm.weight",
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


# The MTP module lies where the next layer would: its decoder layer has the names above, the rest these.
_MTP = {
    "token_norm": "enorm.weight",
    "hidden_norm": "hnorm.weight",
    "project": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
    # Copies of the main model's two, which the module shares (DeepSeek-V3 README_WEIGHTS.md).
    "embed": "embed_tokens.weight",
    "head": "shared_head.head.weight",
}
_COPIES = ("embed", "head")
SCALE = "_scale_inv"
_NUMBERED = re.compile(r"model\.layers\.([0-9]{1,9})\.")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint and where it lies in ours.

    `shape` and `dtype` are the file's, dtype as safetensors spells it. `transposed`: the file holds [out, in], we hold
    [in, out]. `expert`: the row of our stacked array that this tensor is, or None. `copy_of`: the path of the weight
    that this one repeats; the model in memory has no weight of its own for it, and a folder may lack it.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    expert: int | None
    copy_of: Path | None = None

    def scale(self, block: tuple[int, int]) -> "Tensor":
        """The scales of this tensor where it is stored in FP8; they lie beside it as `.scale`."""
        return dataclasses.replace(
            self, name=self.name + SCALE, path=(*self.path, "scale"), shape=blocks(self.shape, block), dtype="F32"
        )


def tensors(config: ModelConfig, abstract: nnx.State) -> list[Tensor]:
    """Every tensor that a checkpoint of these weights holds, FP8 scales excepted, in the order of the layers.

    Args:
        config: the architecture. Tensors have the dtypes of the published checkpoints: bfloat16, float32 for router
            biases and V3.2's norms, and FP8 for projections where `quantization` says so.
        abstract: weights, or their shapes as `model.decoder.abstract_weights` gives them.
    """
    shapes = {path: leaf.get_raw_value().shape for path, leaf in nnx.to_flat_state(abstract)}
    found = []
    for path, shape in shapes.items():
        found += _tensors_of(config, path, shape)
    for depth in range(config.num_nextn_predict_layers):
        for name in _COPIES:
            # a tied head has no weight of its own, and is the embedding as the file has it
            source = (name,) if (name,) in shapes else ("embed",)
            shape = shapes[source] if name == source[0] else shapes[source][::-1]
            found += _tensors_of(config, ("mtp", depth, name), shape, source)
    return found


def tied_head(config: ModelConfig, table: list[Tensor]) -> Tensor | None:
    """The head that a checkpoint of tied weights may store although it is the embedding; None where nothing is tied.

    PEFT, and DeepSpeed's conversion, write it. An export does not.
    """
    if not config.tie_word_embeddings:
        return None
    (embed,) = (tensor for tensor in table if tensor.path == ("embed",))
    return dataclasses.replace(embed, name=_MODEL["head"], path=("head",), copy_of=embed.path)


def packed(config: ModelConfig) -> ModelConfig:
    """The configuration of the same model in FP8."""
    return config if config.quantization else dataclasses.replace(config, quantization=FP8Config())


def with_held_modules(config: ModelConfig, held: Collection[str]) -> ModelConfig:
    """The configuration without the MTP modules of which a checkpoint holds no tensor at all.

    transformers drops them on save and leaves their number in config.json.
    """
    layers = (_NUMBERED.match(name) for name in held)
    last = max((int(layer[1]) for layer in layers if layer), default=0)
    count = max(0, last + 1 - config.num_hidden_layers)
    return dataclasses.replace(config, num_nextn_predict_layers=min(count, config.num_nextn_predict_layers))


def published(config: ModelConfig, abstract: nnx.State) -> list[Tensor]:
    """The same with the scales: what the published checkpoint of this configuration holds, to the byte."""
    found = []
    for tensor in tensors(config, abstract):
        found.append(tensor)
        if tensor.dtype == "F8_E4M3":
            found.append(tensor.scale(config.quantization.weight_block_size))
    return found


def _tensors_of(
    config: ModelConfig, path: Path, shape: tuple[int, ...], copy_of: Path | None = None
) -> Iterator[Tensor]:
    template = _template(config, path)
    stacked = "{}" in template
    of_one = shape[1:] if stacked else shape
    transposed = len(of_one) == 2 and path[-1] != "embed"
    in_file = of_one[::-1] if transposed else of_one
    for expert in range(shape[0]) if stacked else [None]:
        yield Tensor(
            name=template.format(expert),
            path=path,
            shape=in_file,
            dtype=_dtype(config, path, in_file),
            transposed=transposed,
            expert=expert,
            copy_of=copy_of,
        )


def _template(config: ModelConfig, path: Path) -> str:
    words = ".".join(map(str, path[2:]))
    if path[0] == "layers":
        return f"model.layers.{path[1]}." + _LAYER[words]
    if path[0] == "mtp":
        layer = config.num_hidden_layers + path[1]
        return f"model.layers.{layer}." + (_MTP[words] if words in _MTP else _LAYER[words.removeprefix("layer.")])
    return _MODEL[".".join(map(str, path))]


def _dtype(config: ModelConfig, path: Path, shape: tuple[int, ...]) -> str:
    if is_float32(config, path, len(shape)):
        return "F32"
    return "F8_E4M3" if config.quantization is not None and is_packable(path, len(shape)) else "BF16"


def is_float32(config: ModelConfig, path: Path, rank: int) -> bool:
    """Whether published checkpoints have a weight in float32: router biases, and all vectors of V3.2."""
    return path[-2:] == ("mlp", "bias") or (rank == 1 and config.model_type == "deepseek_v32")


def key(path: Path) -> str:
    """A path as one word, as Orbax folders name it: layers.3.attention.q_a."""
    return ".".join(map(str, path))


def flat(weights: nnx.State) -> dict[str, jax.Array]:
    """Weights as a flat dictionary by `key`."""
    return {key(path): leaf.get_raw_value() for path, leaf in nnx.to_flat_state(weights)}


def unflat(arrays: dict[str, jax.Array], like: nnx.State) -> nnx.State:
    """The inverse of `flat`: the same variables as `like`, holding `arrays`."""
    return nnx.from_flat_state([(path, leaf.replace(arrays[key(path)])) for path, leaf in nnx.to_flat_state(like)])
