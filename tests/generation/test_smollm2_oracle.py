"""A real pretrained model: our greedy continuation is transformers', token for token."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.text.tokenizer import Tokenizer

MAKER = Path(__file__).resolve().parents[2].parent / "shared" / "bin" / "make_smollm2"
QUESTIONS = (
    "What is 17 plus 25?",
    "Name three planets.",
    "Write a haiku about rain.",
    "Why is the sky blue?",
    "Translate 'good morning' to French.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct: the folder that SMOLLM2 names, or one made for this run."""
    if "SMOLLM2" in os.environ:
        return Path(os.environ["SMOLLM2"])
    if not MAKER.exists():
        pytest.skip("needs SmolLM2: name its folder in SMOLLM2 (no shared maker beside the project)")
    made = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run([sys.executable, MAKER, made], check=True, capture_output=True)
    return made


@pytest.mark.oracle
def test_greedy_continuations_equal_transformers_token_for_token(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, peer_tokenizer = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    config, graphdef, weights = load_model(folder)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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
