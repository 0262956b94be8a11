"""A real pretrained model: our greedy continuation is transformers', token for token."""

from pathlib import Path

import pytest

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.text.tokenizer import Tokenizer

QUESTIONS = (
    "What is 17 plus 25?",
    "Name three planets.",
    "Write a haiku about rain.",
    "Why is the sky blue?",
    "Translate 'good morning' to French.",
)


@pytest.mark.oracle
def test_greedy_continuations_equal_transformers_token_for_token(smollm2: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, peer_tokenizer = Tokenizer.from_folder(smollm2), AutoTokenizer.from_pretrained(smollm2)
    config, graphdef, weights = load_model(smollm2)
    peer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None  # 64 tokens, whatever they are

    prompts = [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    sampling = SamplingConfig(max_new_tokens=64, temperature=0.0)
    found = Generator(config, graphdef)(weights, prompts, sampling, seeds=[0] * len(prompts))
    for question, prompt, completion in zip(QUESTIONS, prompts, found, strict=True):
        turn = [{"role": "user", "content": question}]
        ids = peer_tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == prompt
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            out = peer.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False, pad_token_id=0
            )
        assert completion.tokens.tolist() == out[0, len(ids) :].tolist()
