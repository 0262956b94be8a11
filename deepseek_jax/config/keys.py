"""config.json's keys: which say nothing about the forward pass, and a reader that takes each of the others once."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.config.model import shown

# Keys at whose every value the forward pass is the same.
_IGNORED = {
    # who made the file, for what, and which program is to read it
    *("_name_or_path", "name_or_path", "_model_name_or_path", "_commit_hash", "architectures", "auto_map"),
    *("transformers_version", "transformers.js_config", "unsloth_fixed", "unsloth_version", "_auto_class"),
    *("tokenizer_class", "processor_class", "custom_pipelines", "task_specific_params", "prefix", "is_llama_config"),
    # in which dtype, by which kernel and in what portions it is computed, and what is returned or kept of it
    *("dtype", "torch_dtype", "torchscript", "use_bfloat16", "tf_legacy_loss", "xla_device", "use_cache"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("_flash_attn_2_enabled", "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp", "ep_size"),
    *("return_dict", "output_attentions", "_output_attentions", "output_hidden_states", "output_router_logits"),
    *("tie_last_hidden_states", "is_decoder"),
    # training, and heads that a causal language model lacks
    *("attention_dropout", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    # tokens that the forward pass does not know of
    *("pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id"),
    # defaults of text generation, which transformers 4 kept here
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "do_sample", "early_stopping"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id"),
    *("forced_eos_token_id", "forced_decoder_ids", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("output_scores", "output_logits", "return_dict_in_generate", "renormalize_logits", "guidance_scale"),
    *("penalty_alpha", "stop_strings", "cache_implementation", "cache_config", "generation_config"),
    # what follows from other keys, or counts only where a further key is on that is refused
    *("qk_head_dim", "max_window_layers", "sliding_window"),
}
# Keys of what we do not compute: the values at which they change nothing, and what any other would be.
_HARMLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "every architecture here has SwiGLU"),
    "attention_bias": ((False,), "biases of q, k and v are Qwen2's alone, and o has none"),
    "mlp_bias": ((False,), "no architecture here has them"),
    "use_sliding_window": ((False,), "every query here sees all keys before it"),
    "use_mrope": ((False,), "rope of images and video is not computed here"),
    "mrope_section": ((None,), "rope of images and video is not computed here"),
    "partial_rotary_factor": ((1, None), "heads are rotated whole"),
    "rope_interleave": ((True,), "DeepSeek's pairs of dimensions are neighbours"),
    "rope_interleaved": ((False, None), "Llama's and Qwen's pairs of dimensions are half a head apart"),
    "moe_layer_freq": ((1,), "every layer after first_k_dense_replace has experts"),
    "is_encoder_decoder": ((False,), "all models here are decoders"),
    "add_cross_attention": ((False,), "all models here are decoders alone"),
    "cross_attention_hidden_size": ((None,), "all models here are decoders alone"),
    "tie_encoder_decoder": ((False,), "all models here are decoders"),
    "pruned_heads": (({}, None), "no head is left out here"),
    "per_layer_config": ((None, {}), "layers of one kind are alike here"),
}


class Reader:
    """config.json's keys, each taken once; what is left over is an error."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)
        self.read: set[str] = set()

    def take(self, name: str, *default: Any, why: str = "the architecture needs it") -> Any:
        """A key's value, or the default where it is missing; without a default, `why` it must be there."""
        self.read.add(name)
        if name in self.values:
            return self.values[name]
        if default:
            return default[0]
        raise ValueError(f"key {name!r} is missing; {why}")

    def or_null(self, name: str, default: Any) -> Any:
        """A key that may be missing or null."""
        value = self.take(name, None)
        return default if value is None else value

    def finish(self) -> None:
        """Refuse what no one has taken, unless it changes nothing."""
        left = {name: value for name, value in self.values.items() if name not in self.read}
        check_harmless(left)
        unknown = sorted(left.keys() - _IGNORED - _HARMLESS.keys())
        if unknown:
            raise ValueError(
                f"unknown key {shown(unknown[0])}"
                + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
                + "; it may change the forward pass, so it is not passed over in silence"
            )


def check_harmless(values: Mapping[str, Any]) -> None:
    """Refuse a key at a value that would change the forward pass. Keys that are not in the table pass."""
    for name, (allowed, why) in _HARMLESS.items():
        if name in values and values[name] not in allowed:
            raise ValueError(f"{name}: got {shown(values[name])}, wanted {allowed[0]!r}; {why}")
