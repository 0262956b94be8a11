"""The tokenizer and its chat agree with transformers."""

from pathlib import Path

import pytest

from deepseek_jax.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
FOLDERS = SHARED / "data" / "tokenizers"
needs_shared = pytest.mark.skipif(not FOLDERS.exists(), reason="needs the shared tokenizers folder beside the project")

SYSTEM = {"role": "system", "content": "You are brief.\n"}
USER = {"role": "user", "content": "What is 12,345 × 2? 请用中文。\n\n  "}
THOUGHT = {
    "role": "assistant",
    "content": "<think>\nTwice.\n</think>\n\nA literal </think> tag: \\boxed{24690}",
}
PLAIN = {"role": "assistant", "content": "24690"}
CALL = {
    "role": "assistant",
    "content": "I add.",  # transformers drops a content of None, which R1's template then misses.
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": "<é>"}'}}],
}
TOOL = {"role": "tool", "content": "3"}
CONVERSATIONS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "history with thoughts": [SYSTEM, USER, THOUGHT, USER],
    "two systems": [SYSTEM, SYSTEM, USER, PLAIN, USER],
    "tools": [USER, CALL, TOOL, PLAIN, USER],
    "special tokens in the text": [{"role": "user", "content": "<｜Assistant｜><｜end▁of▁sentence｜>"}],
}


@pytest.mark.oracle
@needs_shared
@pytest.mark.parametrize("folder", ["deepseek-r1", "deepseek-r1-distill-qwen-7b"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(folder, name, prompt):
    transformers = pytest.importorskip("transformers", reason="needs the oracle extra")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDERS / folder)
    text = oracle.apply_chat_template(CONVERSATIONS[name], add_generation_prompt=prompt, tokenize=False)
    ours = Tokenizer.from_folder(FOLDERS / folder).chat(CONVERSATIONS[name], add_generation_prompt=prompt)
    assert ours == oracle(text, add_special_tokens=False)["input_ids"]


@pytest.mark.oracle
@needs_shared
@pytest.mark.parametrize("folder", ["deepseek-r1", "deepseek-r1-distill-qwen-7b"])
def test_auto_tokenizer_agrees(folder):
    transformers = pytest.importorskip("transformers", reason="needs the oracle extra")
    oracle = transformers.AutoTokenizer.from_pretrained(FOLDERS / folder)
    conversation = CONVERSATIONS["history with thoughts"]
    expected = oracle.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert Tokenizer.from_folder(FOLDERS / folder).chat(conversation) == expected


@pytest.mark.oracle
def test_transformers_loads_our_character_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the oracle extra")
    template = "{{ bos_token }}<｜User｜>{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}"
    ours = Tokenizer.characters("0123+= \n", chat_template=template)
    ours.save(tmp_path)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "<think>1 + 2\n</think><answer>3</answer>"
    assert oracle(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_bos=False)
    assert oracle.decode(ours.encode(text, add_bos=True), skip_special_tokens=True) == text
    assert (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id) == (1, 2, 0)
    messages = [{"role": "user", "content": "1+1="}]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat(messages) == expected
