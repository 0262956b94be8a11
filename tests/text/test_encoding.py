"""DeepSeek-V3.2's conversations, as its encoding and README have them."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from deepseek_jax.text.encoding import TOKENS, encode_v32
from deepseek_jax.text.tokenizer import Tokenizer

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
HELLO = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."}
SUM = {"role": "user", "content": "1+1=?"}
ASKED = "<｜User｜>hello<｜Assistant｜>"


def render(messages, *, add_generation_prompt=True, **switches):
    return encode_v32(messages, bos_token=BEGIN, eos_token=END, add_generation_prompt=add_generation_prompt, **switches)


@pytest.mark.parametrize(
    ("messages", "thinking", "expected"),
    [
        # The first is README.md's example of the checkpoint, word for word.
        (
            [HELLO, ANSWER, SUM],
            True,
            "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
            "<｜User｜>1+1=?<｜Assistant｜><think>",
        ),
        ([HELLO], True, BEGIN + ASKED + "<think>"),
        ([HELLO], False, BEGIN + ASKED + "</think>"),
        ([SYSTEM, HELLO], True, BEGIN + "You are a helpful assistant." + ASKED + "<think>"),
        ([SYSTEM, SYSTEM, HELLO], False, BEGIN + SYSTEM["content"] * 2 + ASKED + "</think>"),
        (
            [HELLO, ANSWER, SUM],
            False,
            BEGIN + ASKED + "</think>Hello! I am DeepSeek." + END + "<｜User｜>1+1=?<｜Assistant｜></think>",
        ),
        ([HELLO, SUM], True, BEGIN + ASKED + "</think><｜User｜>1+1=?<｜Assistant｜><think>"),
    ],
)
def test_prompts(messages, thinking, expected):
    assert render(messages, thinking=thinking) == expected


def test_whole_conversations_keep_the_last_reasoning_alone():
    conversation = [HELLO, ANSWER, SUM, {"role": "assistant", "content": "2", "reasoning": "1 and 1"}]
    expected = BEGIN + ASKED + "</think>Hello! I am DeepSeek." + END + "<｜User｜>1+1=?<｜Assistant｜>"
    assert render(conversation, add_generation_prompt=False) == expected + "<think>1 and 1</think>2" + END
    assert render(conversation, add_generation_prompt=False, thinking=False) == expected + "</think>2" + END


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ([HELLO], {"tools": [{"type": "function"}]}, "got tools"),
        ([HELLO], {"documents": ["a"]}, "got documents"),
        ([{**SYSTEM, "tools": [1]}, HELLO], {}, r"messages\[0\]: got 'tools'"),
        ([HELLO, {"role": "assistant", "content": "", "tool_calls": [1]}, SUM], {}, "got 'tool_calls'"),
        ([{**SYSTEM, "response_format": {"a": 1}}, HELLO], {}, "got 'response_format'"),
        ([{"role": "developer", "content": "x"}, HELLO], {}, "got role 'developer'"),
        ([{"role": "tool", "content": "x"}, HELLO], {}, "got role 'tool'"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}, "got list"),
        ([HELLO, {"role": "assistant", "content": "a"}], {}, "got a last message of role 'assistant'"),
        ([SYSTEM], {}, "got a last message of role 'system'"),
        ([HELLO], {"add_generation_prompt": False}, "got a last message of role 'user'"),
        (
            [HELLO, {"role": "assistant", "content": "a"}],
            {"add_generation_prompt": False},
            r"messages\[1\]: got an answer without 'reasoning_content'",
        ),
    ],
)
def test_what_is_not_known_is_refused(messages, options, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        render(messages, **options)
    assert "\n" not in str(caught.value)


def folder(path, model_type, *, tags=TOKENS, **config):
    tokens = [BEGIN, END, *tags, "a"]
    inner = tokenizers.Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([BEGIN, END])
    inner.add_tokens(list(tags))
    path.mkdir(exist_ok=True)
    inner.save(str(path / "tokenizer.json"))
    config = {"bos_token": BEGIN, "eos_token": END, "add_bos_token": True, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def test_a_checkpoint_of_v32_chats_without_a_template(tmp_path):
    tokenizer = Tokenizer.from_folder(folder(tmp_path / "a", "deepseek_v32"))
    user, assistant, opened, closed = (tokenizer.encode(token, add_bos=False)[0] for token in TOKENS)
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.chat(messages) == [0, user, 6, assistant, opened]
    assert tokenizer.chat(messages, thinking=None) == [0, user, 6, assistant, opened]
    assert tokenizer.chat(messages, thinking=False) == [0, user, 6, assistant, closed]
    with pytest.raises(ValueError, match=r"messages\[0\]\['role'\]"):
        tokenizer.chat([{"content": "a"}])


def test_a_template_overrules_the_encoding(tmp_path):
    """V3.2-Exp has one."""
    tokenizer = Tokenizer.from_folder(folder(tmp_path / "a", "deepseek_v32", chat_template="{{ bos_token }}a"))
    assert tokenizer.chat([{"role": "user", "content": "a"}]) == [0, 6]


@pytest.mark.parametrize(("model_type", "tags"), [("deepseek_v3", TOKENS), ("deepseek_v32", TOKENS[:2])])
def test_other_models_are_not_taken_for_v32(tmp_path, model_type, tags):
    tokenizer = Tokenizer.from_folder(folder(tmp_path / "a", model_type, tags=tags))
    with pytest.raises(ValueError, match="without a chat_template.*--no-chat"):
        tokenizer.chat([{"role": "user", "content": "a"}])
