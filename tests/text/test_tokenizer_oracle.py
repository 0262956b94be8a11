"""The tokenizer and its chat agree with transformers."""

import json
from pathlib import Path

import pytest

from deepseek_jax.text.tokenizer import Tokenizer
from tests.text.test_tokenizer import write

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


TOKEN = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
NEWER = {"added_tokens_decoder": {"0": {**TOKEN, "content": "<s>", "special": True}}}
MAP = {"bos_token": "<s>", "eos_token": TOKEN}
SPECIAL = {
    "config alone": ({}, None),
    "map alone": ({"bos_token": None, "eos_token": None}, MAP),
    "map over the config": ({"eos_token": "<end>"}, MAP),
    "map over the config with null": ({}, {"eos_token": None}),
    "newer config over the map": ({"eos_token": "<end>", **NEWER}, MAP),
    "newer config with null over the map": ({"eos_token": None, **NEWER}, MAP),
    "object": ({"eos_token": {"__type": "AddedToken", **TOKEN, "content": "<end>"}}, None),
    "pad in the map": ({}, {"pad_token": "<end>"}),
    "pad that is text too": ({"pad_token": "a"}, None),
    "pad outside the vocabulary": ({"pad_token": "<none>"}, None),
    "unknown token": ({"unk_token": "b"}, None),
    "list of others": (
        {"additional_special_tokens": ["a", {"__type": "AddedToken", **TOKEN, "content": "<end>"}]},
        None,
    ),
    "list of others in the map": ({}, {"additional_special_tokens": ["a"]}),
    "named others": ({"extra_special_tokens": {"image_token": "a"}}, None),
    "no bos": ({"bos_token": None}, None),
    "eos to be added": ({"add_eos_token": True}, None),
    "bos unsaid": ({"add_bos_token": None}, None),
}


@pytest.mark.oracle
@pytest.mark.parametrize("bos_first", [False, True])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_are_those_of_transformers(tmp_path, name, bos_first):
    transformers = pytest.importorskip("transformers", reason="needs the oracle extra")
    config, listed = SPECIAL[name]
    if bos_first and config.get("bos_token", "<s>") is None:
        pytest.skip("a post-processor that adds a BOS beside a config without one: ours has none to begin with")
    files = {} if listed is None else {"special_tokens_map.json": listed}
    folder = write(tmp_path, config={"tokenizer_class": "PreTrainedTokenizerFast", **config}, files=files)
    if bos_first:
        write(tmp_path, config={"tokenizer_class": "PreTrainedTokenizerFast", **config}, files=files, bos_first=True)
    oracle, ours = transformers.PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer.from_folder(folder)
    assert (ours.bos, ours.eos) == (oracle.bos_token, oracle.eos_token)
    assert ours.eos_ids == (() if oracle.eos_token_id is None else (oracle.eos_token_id,))
    # transformers adds a padding token that the vocabulary lacks, behind the last row of the embedding.
    assert ours.pad_id == (None if name == "pad outside the vocabulary" else oracle.pad_token_id)
    assert ours.encode("a b <end> a", add_bos=True) == oracle("a b <end> a")["input_ids"]
    assert ours.decode([0, 3, 1, 4, 2]) == oracle.decode([0, 3, 1, 4, 2], skip_special_tokens=True)


FORMS = SHARED / "data" / "configs" / "tokenizer_config"


@pytest.mark.oracle
@needs_shared
@pytest.mark.parametrize("form", ["deepseek-ai-DeepSeek-R1-first-form", "deepseek-ai-DeepSeek-R1-Distill"])
@pytest.mark.parametrize("moved", [False, True])
def test_published_config_forms(tmp_path, form, moved):
    """As published, and with every special token moved to special_tokens_map.json; the BOS that `add_bos_token` asks
    for is added, as in transformers 4 (5 leaves it to tokenizer.json, which has none here)."""
    transformers = pytest.importorskip("transformers", reason="needs the oracle extra")
    source = FOLDERS / ("deepseek-r1-distill-qwen-7b" if "Distill" in form else "deepseek-r1")
    (tmp_path / "tokenizer.json").symlink_to(source / "tokenizer.json")
    config = json.loads((FORMS / f"{form}.json").read_text())
    listed = {key: config.pop(key) for key in ("bos_token", "eos_token", "pad_token")} if moved else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(listed))
    oracle, ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    text = CONVERSATIONS["one turn"][0]["content"]
    assert ours.encode(text, add_bos=True) == [
        oracle.bos_token_id,
        *oracle(text, add_special_tokens=False)["input_ids"],
    ]
    assert (ours.eos_ids, ours.pad_id) == ((oracle.eos_token_id,), oracle.pad_token_id)
    expected = oracle.apply_chat_template(CONVERSATIONS["tools"], add_generation_prompt=True, return_dict=False)
    assert ours.chat(CONVERSATIONS["tools"]) == expected
