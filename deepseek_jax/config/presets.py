"""Published configurations by name, and a tiny one with every part of R1's architecture."""

import dataclasses

from deepseek_jax.config.model import (
    FP8Config,
    GQAConfig,
    IndexerConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
)


def _r1_671b() -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        attention=MLAConfig(
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        rope=_yarn(mscale=1.0),
        moe=MoEConfig(
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            topk_method="noaux_tc",
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        num_nextn_predict_layers=1,
        quantization=FP8Config(),
    )


def _v3_2_671b() -> ModelConfig:
    r1 = _r1_671b()
    indexer = IndexerConfig(index_n_heads=64, index_head_dim=128, index_topk=2048)
    return dataclasses.replace(
        r1,
        model_type="deepseek_v32",
        attention=dataclasses.replace(r1.attention, indexer=indexer),
        quantization=FP8Config(scale_fmt="ue8m0"),
    )


def _yarn(mscale: float) -> YarnConfig:
    return YarnConfig(
        theta=10000.0,
        factor=40.0,
        beta_fast=32.0,
        beta_slow=1.0,
        original_max_position_embeddings=4096,
        mscale=mscale,
        mscale_all_dim=mscale,
    )


def _kimi_k2() -> ModelConfig:
    """DeepSeek V3's architecture with more experts in one group, half the heads and one dense layer."""
    r1 = _r1_671b()
    return dataclasses.replace(
        r1,
        model_type="kimi_k2",
        vocab_size=163840,
        num_attention_heads=64,
        max_position_embeddings=131072,
        bos_token_id=163584,
        eos_token_id=163585,
        rope=dataclasses.replace(r1.rope, theta=50000.0, factor=32.0, beta_fast=1.0),
        moe=dataclasses.replace(
            r1.moe,
            n_routed_experts=384,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.827,
        ),
        num_nextn_predict_layers=0,
    )


def _v2_lite() -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=100000,
        eos_token_id=100001,
        attention=MLAConfig(
            q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        rope=_yarn(mscale=0.707),
        moe=MoEConfig(
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
        ),
    )


def _distill(hidden, intermediate, layers, heads, **rest) -> ModelConfig:
    """A dense model that R1's answers were distilled into."""
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        moe=None,
        **rest,
    )


def _distill_qwen(hidden, intermediate, layers, heads, kv_heads, eps, theta, vocab) -> ModelConfig:
    attention = GQAConfig(num_key_value_heads=kv_heads, head_dim=hidden // heads, qkv_bias=True)
    tokens = dict(vocab_size=vocab, bos_token_id=151643, eos_token_id=151643)
    rest = dict(model_type="qwen2", rms_norm_eps=eps, attention=attention, rope=RopeConfig(theta=theta), **tokens)
    return _distill(hidden, intermediate, layers, heads, **rest)


def _distill_qwen3_8b() -> ModelConfig:
    attention = GQAConfig(num_key_value_heads=8, head_dim=128, qkv_bias=False, qk_norm=True)
    longer = dict(factor=4.0, original_max_position_embeddings=32768)
    rope = dataclasses.replace(_yarn(mscale=1.0), theta=1e6, mscale_all_dim=0.0, **longer)
    tokens = dict(vocab_size=151936, bos_token_id=151643, eos_token_id=151645)
    rest = dict(model_type="qwen3", rms_norm_eps=1e-6, attention=attention, rope=rope, **tokens)
    return _distill(4096, 12288, 36, 32, **rest)


def _distill_llama(hidden, intermediate, layers, heads, eos) -> ModelConfig:
    attention = GQAConfig(num_key_value_heads=8, head_dim=hidden // heads, qkv_bias=False)
    smoothing = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    rope = Llama3RopeConfig(theta=5e5, **smoothing)
    tokens = dict(vocab_size=128256, bos_token_id=128000, eos_token_id=eos)
    rest = dict(model_type="llama", rms_norm_eps=1e-5, attention=attention, rope=rope, **tokens)
    return _distill(hidden, intermediate, layers, heads, **rest)


def _tiny() -> ModelConfig:
    """R1's architecture, every part of it, at 0.6 million parameters: what a laptop trains in minutes."""
    r1 = _r1_671b()
    return dataclasses.replace(
        r1,
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        attention=MLAConfig(q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24),
        rope=RopeConfig(theta=10000.0),
        initializer_range=0.08,  # about width**-0.5; the published 0.02 leaves so narrow a model standing still
        moe=dataclasses.replace(
            r1.moe,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.0,
        ),
        num_nextn_predict_layers=0,
        quantization=None,
    )


_PRESETS = {
    "r1-671b": _r1_671b,
    "v3.2-671b": _v3_2_671b,
    "v2-lite": _v2_lite,
    "kimi-k2": _kimi_k2,
    "distill-qwen-1.5b": lambda: _distill_qwen(1536, 8960, 28, 12, 2, 1e-6, 1e4, 151936),
    "distill-qwen-7b": lambda: _distill_qwen(3584, 18944, 28, 28, 4, 1e-6, 1e4, 152064),
    "distill-qwen-14b": lambda: _distill_qwen(5120, 13824, 48, 40, 8, 1e-5, 1e6, 152064),
    "distill-qwen-32b": lambda: _distill_qwen(5120, 27648, 64, 40, 8, 1e-5, 1e6, 152064),
    "distill-qwen3-8b": _distill_qwen3_8b,
    "distill-llama-8b": lambda: _distill_llama(4096, 14336, 32, 32, 128001),
    "distill-llama-70b": lambda: _distill_llama(8192, 28672, 80, 64, (128001, 128008, 128009)),
    "tiny": _tiny,
}
PRESETS: tuple[str, ...] = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """A published configuration by name, one of `PRESETS`. Source: the hub's config.json of each model.

    >>> preset("r1-671b").attention_scale.__round__(7)
    0.1352338
    """
    if name not in _PRESETS:
        raise ValueError(f"preset: got {name!r}, wanted one of {', '.join(PRESETS)}")
    return _PRESETS[name]()
