"""Random Hugging Face folders of every form that is read, for the tests of this room."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from deepseek_jax.checkpoint import files, names
from deepseek_jax.checkpoint.headers import DTYPES
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.config import FP8Config, GQAConfig, IndexerConfig, MLAConfig, ModelConfig, RopeConfig, preset, to_hf
from deepseek_jax.model.decoder import abstract_weights

V3 = dataclasses.replace(preset("tiny"), hidden_size=16, intermediate_size=24, num_hidden_layers=2)
V2 = dataclasses.replace(
    V3,
    model_type="deepseek_v2",
    attention=dataclasses.replace(V3.attention, q_lora_rank=None),
    moe=dataclasses.replace(V3.moe, topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False),
)
QWEN2 = dataclasses.replace(
    V3,
    model_type="qwen2",
    attention=GQAConfig(num_key_value_heads=2, head_dim=4, qkv_bias=True),
    rope=RopeConfig(theta=1e4),
    moe=None,
)
QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    attention=GQAConfig(num_key_value_heads=2, head_dim=6, qkv_bias=False, qk_norm=True),  # 4 heads of 6 beside 16
)
LLAMA_TIED = dataclasses.replace(
    QWEN2,
    model_type="llama",
    tie_word_embeddings=True,
    attention=GQAConfig(num_key_value_heads=4, head_dim=4, qkv_bias=False),
)
# Widths that blocks do not divide: of 128 (136, 200, 152) and of the small blocks of the second.
R1 = dataclasses.replace(
    V3,
    hidden_size=136,
    intermediate_size=200,
    moe=dataclasses.replace(V3.moe, moe_intermediate_size=152),
    num_nextn_predict_layers=1,
    quantization=FP8Config(),
)
SMALL_BLOCKS = dataclasses.replace(
    V3, num_nextn_predict_layers=2, quantization=FP8Config(weight_block_size=(5, 7), scale_fmt="ue8m0")
)
KIMI = dataclasses.replace(
    V3,
    model_type="kimi_k2",
    attention=MLAConfig(q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=dataclasses.replace(V3.moe, n_routed_experts=6, n_group=1, topk_group=1, routed_scaling_factor=2.827),
    quantization=FP8Config(weight_block_size=(16, 8)),
)
V32 = dataclasses.replace(
    R1,
    model_type="deepseek_v32",
    attention=MLAConfig(
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        indexer=IndexerConfig(index_n_heads=3, index_head_dim=6, index_topk=4),
    ),
)


def random_folder(
    folder: Path, config: ModelConfig, dtype: str | None = None, shards: int = 1
) -> dict[str, np.ndarray]:
    """Make a Hugging Face folder; returns its tensors, zeros of both signs, subnormals and the largest among them.

    The MTP modules' copies of embedding and head are copies.

    Args:
        folder: to make.
        config: architecture, MTP modules and FP8 blocks.
        dtype: of all weights but router biases; None takes the dtypes of the published checkpoints, FP8 and all.
        shards: number of files.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    (folder / "tokenizer.json").write_text('{"à": "la lettre"}\n')
    rng = np.random.RandomState(0)
    abstract = abstract_weights(config)[1]
    rows = names.published(config, abstract) if dtype is None else names.tensors(config, abstract)
    tensors = {}
    for row in rows:
        biased = row.name.endswith("e_score_correction_bias")
        kind = DTYPES[row.dtype] if dtype is None else np.dtype(np.float32 if biased else dtype)
        tensors[row.name] = random_values(rng, row.shape, kind, positive=row.name.endswith(names.SCALE))
        if row.copy_of:
            tensors[row.name] = tensors["lm_head.weight" if row.copy_of == ("head",) else "model.embed_tokens.weight"]
    write_folder(folder, tensors, shards)
    return tensors


def random_values(rng: np.random.RandomState, shape: tuple[int, ...], kind: np.dtype, *, positive: bool) -> np.ndarray:
    if kind.itemsize == 1:  # every code but the two of NaN
        codes = rng.randint(0, 254, shape)
        return (codes + (codes >= 0x7F)).astype(np.uint8).view(kind)
    value = rng.standard_normal(shape).astype(kind)
    if positive:
        return np.abs(value) + kind.type(0.01)
    kinds = {"float32": (1e-45, 3.4028235e38), "float16": (6e-8, 65504), "bfloat16": (9.2e-41, 3.3895314e38)}
    if value.size >= 4:
        value.flat[:4] = [-0.0, 0.0, *kinds[kind.name]]
    return value


def write_folder(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / files.SINGLE)
        return
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stored_at(folder: Path, name: str) -> tuple[list[tuple[Path, int]], bytes]:
    """The files of a converted folder in which a tensor's bytes lie, with their offsets, and those bytes.

    All of them: a file of weights may keep a copy that nothing refers to any more.
    """
    value = open_folder(folder).source.read(name).tobytes()
    places = []
    for path in (path for path in (folder / "weights").rglob("*") if path.is_file()):
        raw, start = path.read_bytes(), 0
        while (start := raw.find(value, start)) >= 0:
            places.append((path, start))
            start += len(value)
    assert places, f"{name} lies nowhere below {folder}"
    return places, value


def flip_a_bit(folder: Path, name: str) -> None:
    """Change the last bit of a number in the middle of a tensor of a converted folder, wherever it is stored."""
    places, value = stored_at(folder, name)
    for path, start in places:
        raw = bytearray(path.read_bytes())
        raw[start + len(value) // 8 * 4] ^= 1
        path.write_bytes(raw)
