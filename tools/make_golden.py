"""Write tests/golden: logits of transformers' own models, so that parity is tested where transformers is not installed.

A golden file holds no weights. Both sides make them from (seed, tensor name) by `tensor_of`, write them as a
Hugging Face folder, and load that folder. The file holds what is left: config.json, seed, tokens, logits, and how
it was made. Needs the `oracle` extra: pip install -e '.[oracle]'.
"""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import dataclasses
import json
import random
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from deepseek_jax.checkpoint import names
from deepseek_jax.cli import run
from deepseek_jax.config import from_hf
from deepseek_jax.model.decoder import abstract_weights

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"

# --- tiny architectures, as transformers' config objects -----------------------------------------
# What a builder is not given it draws, so that many seeds cover many combinations. The epsilon is far from 1e-6
# at times, because the latents' norms keep 1e-6 whatever it says.


def deepseek_v3(rng: random.Random, **fixed: Any):
    """R1's family: noaux_tc routing in groups, plain or YaRN rope, with q_lora or without."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(**_noaux_tc(rng, fixed))


def deepseek_v32(rng: random.Random, **fixed: Any):
    """V3.2: the same, with an indexer that leaves most keys of a long sequence out.

    Not fewer than 16 indexer heads: where relu leaves several keys a score of 0 torch and jax break the tie
    differently, and with 16 heads a key that none of them likes is one in 65,536.
    """
    from transformers import DeepseekV32Config

    indexer = {
        "index_n_heads": rng.choice([16, 24]),
        "index_head_dim": rng.choice([16, 24]),
        "index_topk": rng.choice([5, 9, 16]),
        "q_lora_rank": 24,
    }
    return DeepseekV32Config(**_noaux_tc(rng, indexer | fixed))


def _noaux_tc(rng: random.Random, fixed: dict[str, Any]) -> dict[str, Any]:
    fixed = dict(fixed)
    groups = fixed.pop("n_group", rng.choice([1, 2, 4]))
    kept = fixed.pop("topk_group", rng.randint(1, groups))
    experts = fixed.pop("n_routed_experts", groups * rng.choice([2, 4]))
    drawn = _latent_attention(rng) | {
        "n_group": groups,
        "topk_group": kept,
        "n_routed_experts": experts,
        "num_experts_per_tok": rng.randint(1, kept * experts // groups),
        "n_shared_experts": rng.choice([1, 2]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "norm_topk_prob": rng.choice([True, False]),
        "rope_parameters": rng.choice([plain_rope(), yarn(1.0), yarn(0.7)]),
    }
    return drawn | fixed


def deepseek_v2(rng: random.Random, **fixed: Any):
    """V2's family: softmax routing, greedy or limited to groups, no renormalisation."""
    from transformers import DeepseekV2Config

    method = fixed.pop("topk_method", rng.choice(["greedy", "group_limited_greedy"]))
    groups, kept = (1, 1) if method == "greedy" else (4, 2)
    drawn = _latent_attention(rng) | {
        "topk_method": method,
        "n_group": groups,
        "topk_group": kept,
        "n_routed_experts": groups * 4,
        "num_experts_per_tok": rng.randint(1, 4),
        "n_shared_experts": rng.choice([1, 2]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "routed_scaling_factor": rng.choice([1.0, 4.0]),
        "rope_parameters": rng.choice([plain_rope(), yarn(0.707)]),
    }
    return DeepseekV2Config(**drawn | fixed)


def kimi_k2(rng: random.Random, **fixed: Any):
    """Kimi K2: DeepSeek V3 without groups, and with a ramp of YaRN that starts and ends at the same number of turns.

    transformers has no class of its own for it; see `OWN_NAMES`.
    """
    rope = yarn(1.0) | {"rope_theta": 5e4, "factor": 32.0, "beta_fast": 1.0}
    own = {"n_group": 1, "topk_group": 1, "n_routed_experts": 12, "n_shared_experts": 1, "first_k_dense_replace": 1}
    own |= {"routed_scaling_factor": 2.827, "norm_topk_prob": True, "q_lora_rank": 24, "rope_parameters": rope}
    return deepseek_v3(rng, **own | fixed)


def qwen2(rng: random.Random, **fixed: Any):
    """The Qwen distills' family."""
    from transformers import Qwen2Config

    return Qwen2Config(**_grouped_attention(rng) | {"rope_parameters": plain_rope(rng.choice([1e4, 1e6]))} | fixed)


def qwen3(rng: random.Random, **fixed: Any):
    """The family of R1-0528-Qwen3-8B: normed queries and keys, heads as wide as they like, and no biases."""
    from transformers import Qwen3Config

    drawn = {"head_dim": rng.choice([8, 16, 24]), "rope_parameters": plain_rope(rng.choice([1e4, 1e6]))}
    return Qwen3Config(**_grouped_attention(rng) | drawn | fixed)


def llama(rng: random.Random, **fixed: Any):
    """The Llama distills' family, with Llama 3's frequency smoothing."""
    from transformers import LlamaConfig

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    return LlamaConfig(**_grouped_attention(rng) | {"rope_parameters": rope} | fixed)


def plain_rope(theta: float = 1e4) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def yarn(mscale_all_dim: float, mscale: float | None = None) -> dict[str, Any]:
    """YaRN whose ramp lies inside the tiny models' few frequencies; mscale equals mscale_all_dim unless given."""
    mscale = mscale_all_dim if mscale is None else mscale
    kind = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 256}
    return kind | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": mscale_all_dim}


def short_yarn(**further: Any) -> dict[str, Any]:
    """YaRN as Qwen's model cards give it, without what transformers fills in."""
    kind = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    return kind | further


def _latent_attention(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([2, 4])
    return {
        "vocab_size": 61,
        "hidden_size": rng.choice([32, 48]),
        "intermediate_size": rng.choice([40, 96]),
        "moe_intermediate_size": rng.choice([16, 24]),
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice([None, 24]),
        "kv_lora_rank": rng.choice([16, 20]),
        "qk_nope_head_dim": rng.choice([8, 16]),
        "qk_rope_head_dim": rng.choice([4, 8, 16]),
        "v_head_dim": rng.choice([8, 12]),
        "max_position_embeddings": 2048,
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "tie_word_embeddings": False,
    }


def _grouped_attention(rng: random.Random) -> dict[str, Any]:
    return {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": rng.choice([80, 96]),
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": rng.choice([1, 2, 4]),
        "max_position_embeddings": 512,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "tie_word_embeddings": rng.choice([False, True]),
    }


# Every part of the architectures occurs in one of these.
GOLDENS: dict[str, Callable[[random.Random], Any]] = {
    "v3-groups-yarn": lambda rng: deepseek_v3(
        rng, q_lora_rank=24, n_group=4, topk_group=2, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1,
        first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True, rope_parameters=yarn(1.0),
        rms_norm_eps=1e-3,
    ),
    "v3-full-query": lambda rng: deepseek_v3(
        rng, q_lora_rank=None, n_group=1, topk_group=1, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=2,
        first_k_dense_replace=0, norm_topk_prob=False, rope_parameters=plain_rope(),
    ),
    "v2-lite": lambda rng: deepseek_v2(
        rng, q_lora_rank=None, topk_method="greedy", n_shared_experts=2, first_k_dense_replace=1,
        rope_parameters=yarn(0.707),
    ),
    "v2-groups": lambda rng: deepseek_v2(
        rng, q_lora_rank=24, topk_method="group_limited_greedy", num_experts_per_tok=3, routed_scaling_factor=4.0,
        rope_parameters=yarn(0.5, mscale=1.0),
    ),
    "qwen2": lambda rng: qwen2(rng, num_key_value_heads=2, tie_word_embeddings=False),
    "llama3-tied": lambda rng: llama(rng, num_key_value_heads=2, tie_word_embeddings=True),
    "v32-yarn": lambda rng: deepseek_v32(
        rng, index_topk=6, qk_rope_head_dim=8, index_head_dim=24, n_group=4, topk_group=2, n_routed_experts=16,
        num_experts_per_tok=4, first_k_dense_replace=1, rope_parameters=yarn(1.0),
    ),
    # with the key of R1-0528-Qwen3-8B that transformers passes over
    "qwen3-yarn": lambda rng: qwen3(
        rng, head_dim=16, num_key_value_heads=2, rms_norm_eps=1e-3, tie_word_embeddings=False,
        rope_parameters=short_yarn(attn_factor=0.8782488562869419),
    ),
    "kimi-k2": lambda rng: kimi_k2(rng, num_experts_per_tok=4, rms_norm_eps=1e-3),
}  # fmt: skip

# Families that transformers has under another one's model_type, and what the hub calls them.
OWN_NAMES = {"kimi-k2": "kimi_k2"}

# --- weights that both sides make ----------------------------------------------------------------


def tensor_of(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a random checkpoint, float32, large enough to matter in the logits.

    NumPy promises that RandomState's stream never changes (NEP 19). Routing biases are mostly negative.
    """
    noise = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        noise = 0.5 * noise - 0.8
    elif len(shape) >= 2:
        noise = 0.15 * noise
    else:
        noise = 0.1 * noise + name.endswith("norm.weight")
    return noise.astype(np.float32)


def write_folder(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Make a Hugging Face folder of a config.json and the weights of `tensor_of`, without the MTP modules.

    transformers leaves their number in config.json, and has no weights for them.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    architecture = dataclasses.replace(from_hf(config), num_nextn_predict_layers=0)
    table = names.tensors(architecture, abstract_weights(architecture)[1])
    save_file({t.name: tensor_of(seed, t.name, t.shape) for t in table}, folder / "model.safetensors")


def main(target: Path = GOLDEN) -> None:
    """Make every golden file anew.

    Args:
        target: folder to write NAME.npz files to.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise ValueError("golden files are made with torch and transformers: pip install -e '.[oracle]'")
    target.mkdir(parents=True, exist_ok=True)
    for seed, (name, build) in enumerate(GOLDENS.items()):
        file = target / f"{name}.npz"
        np.savez_compressed(file, **_golden(build(random.Random(seed)), seed, OWN_NAMES.get(name)))
        print(f"{file}: {file.stat().st_size} bytes")


def _golden(config: Any, seed: int, own_name: str | None) -> dict[str, np.ndarray]:
    import tempfile

    import torch
    import transformers

    tokens = np.random.RandomState(seed).randint(0, config.vocab_size, (2, 24))
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        values = json.loads((Path(scratch) / "config.json").read_text(encoding="utf-8"))
        values |= {"model_type": own_name} if own_name else {}
        write_folder(Path(scratch) / "model", values, seed)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, report = load(Path(scratch) / "model", config=config, dtype=torch.float32, output_loading_info=True)
        unfilled = [problem for problem in report.values() if problem]
        assert not unfilled, f"transformers and the names table disagree: {unfilled}"
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    made = f"tools/make_golden.py, transformers {transformers.__version__}, torch {torch.__version__}, float32 on CPU"
    return {
        "made": np.array(made),
        "config": np.array(json.dumps(values, sort_keys=True)),
        "seed": np.array(seed),
        "tokens": tokens.astype(np.int32),
        "logits": logits,
    }


if __name__ == "__main__":
    run(main)
