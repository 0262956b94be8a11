"""Rows of the public forms become the same conversation; what is none is counted with its reason, never cut."""

import gzip
import json

import numpy as np
import pytest

from deepseek_jax.data.conversations import Conversation, NoConversation, conversation_of
from deepseek_jax.data.masked_rows import ConversationConfig, open_rows, row_batches
from deepseek_jax.text.tokenizer import Tokenizer
from tests.text.test_turns import DROPS, OPENS, learnt, tokenizer

ASKED = {"role": "user", "content": "ab"}
ANSWERED = {"role": "assistant", "content": "cd"}
SYSTEM = {"role": "system", "content": "s"}

FORMS = {
    "messages": ({"messages": [ASKED, ANSWERED]}, 0),
    "messages, in other letters": ({"id": 3, "Messages": [ASKED, ANSWERED]}, 0),
    "messages as JSON, from CSV": ({"messages": json.dumps([ASKED, ANSWERED])}, 0),
    "messages of parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "ab"}]}, ANSWERED]}, 0),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]}, 0),
    "ShareGPT's names with roles": ({"conversations": [ASKED, ANSWERED]}, 0),
    "prompt and completion": ({"prompt": "ab", "completion": "cd"}, 1),
    "of messages": ({"prompt": [ASKED], "completion": [ANSWERED]}, 1),
    "problem and solution": ({"problem": "ab", "solution": "cd", "level": 3}, 1),
    "problem and answer": ({"problem": "ab", "answer": "cd"}, 1),
    "prompt and solution": ({"prompt": "ab", "solution": "cd"}, 1),
    "question and answer": ({"question": "ab", "answer": "cd"}, 1),
    "query and response": ({"query": "ab", "response": "cd"}, 1),
    "instruction and output": ({"instruction": "ab", "input": "", "output": "cd"}, 1),
    "instruction and response": ({"instruction": "ab", "context": "", "response": "cd", "category": "qa"}, 1),
    "input and output": ({"input": [ASKED], "output": "cd", "reasoning": "on", "system_prompt": None}, 1),
    "roles in other letters": (
        {"conversations": [{"from": "Human", "value": "ab"}, {"from": "GPT ", "value": "cd"}]},
        0,
    ),
    # tables of several forms that were joined have every column, and nothing in most
    "a joined table's": ({"messages": None, "prompt": None, "completion": None, "problem": "ab", "solution": "cd"}, 1),
    "a joined table's, of Parquet": ({"messages": [], "conversations": [ASKED, ANSWERED], "prompt": ""}, 0),
    "a joined table's messages": (
        {"messages": [ASKED | {"from": None, "value": None, "weight": None}, ANSWERED | {"tool_calls": None}]},
        0,
    ),
    "a joined table's ShareGPT": (
        {
            "messages": [
                {"role": None, "content": None, "from": "user", "value": "ab"},
                {"role": None, "content": None, "from": "assistant", "value": "cd"},
            ]
        },
        0,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_conversation(name):
    row, history = FORMS[name]
    assert conversation_of(row) == Conversation((ASKED, ANSWERED), history)


def test_what_else_rows_hold():
    found = conversation_of({"system": "s", "conversations": [{"from": "user", "value": "ab"}, ANSWERED]})
    assert found == Conversation((SYSTEM, ASKED, ANSWERED), 0)
    found = conversation_of({"system": "s", "prompt": "ab", "completion": "cd"})
    assert found == Conversation((SYSTEM, ASKED, ANSWERED), 2)
    assert conversation_of({"system": "other", "messages": [SYSTEM, ASKED, ANSWERED]}).messages[0] == SYSTEM
    found = conversation_of({"instruction": "ab", "input": "x", "output": "cd"})
    assert found.messages[0]["content"] == "ab\n\nx"
    for name in ("reasoning_content", "thinking", "reasoning"):
        found = conversation_of({"messages": [ASKED, ANSWERED | {name: "hm"}]})
        assert found.messages[1] == ANSWERED | {"reasoning_content": "hm", "thinking": "hm"}
    found = conversation_of({"system_prompt": "s", "question": "ab", "response": "cd"})  # OpenOrca
    assert found == Conversation((SYSTEM, ASKED, ANSWERED), 2)
    found = conversation_of({"messages": [{"role": "developer", "content": "s"}, ASKED, ANSWERED]})
    assert found.messages == (SYSTEM, ASKED, ANSWERED)
    found = conversation_of({"instruction": "ab", "context": "x", "response": "cd"})  # Dolly
    assert found.messages[0]["content"] == "ab\n\nx"
    row = {"asked": "ab", "told": "cd", "messages": [SYSTEM]}
    assert conversation_of(row, ("asked", "told")) == Conversation((ASKED, ANSWERED), 1)
    assert Conversation((ASKED, ANSWERED)).as_texts == ("ab", "cd")
    assert Conversation((SYSTEM, ASKED, ANSWERED)).as_texts is None


def test_a_column_of_thoughts_beside_a_pair_is_not_lost():
    thinks = ANSWERED | {"reasoning_content": "hm", "thinking": "hm"}
    for name in ("reasoning_content", "Thinking", "reasoning"):
        row = {"question": "ab", name: "hm", "answer": "cd"}
        assert conversation_of(row) == Conversation((ASKED, thinks), 1)
        assert conversation_of(row).as_texts == ("ab", "<think>\nhm\n</think>\n\ncd")
    told = {"prompt": "ab", "completion": "<think>x</think>cd", "reasoning": "x"}  # the same twice
    assert conversation_of(told).messages[1] == {"role": "assistant", "content": "<think>x</think>cd"}
    assert conversation_of({"input": "ab", "output": "cd", "reasoning": "off"}).messages[1] == ANSWERED


def test_turns_that_the_row_marks_are_read_and_not_learnt():
    """OpenAI's weight, and axolotl's train."""
    other = {"role": "assistant", "content": "ef"}
    for mark in ({"weight": 0}, {"train": False}):
        found = conversation_of({"messages": [ASKED, ANSWERED | mark, ASKED, other | {"weight": 1}]})
        assert found == Conversation((ASKED, ANSWERED, ASKED, other), 0, (1,))
        with pytest.raises(NoConversation, match="no assistant turn that is not marked as unlearnt"):
            conversation_of({"messages": [ASKED, ANSWERED | mark]})
    found = conversation_of({"system": "s", "messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, other]})
    assert found.unlearnt == (2,)


BAD = {
    "no assistant turn": {"messages": [SYSTEM, ASKED]},
    "no assistant turn in the completion": ({"prompt": [ASKED, ANSWERED], "completion": [ASKED]}, "no assistant turn"),
    "role 'tool', wanted system, user or assistant": {"messages": [ASKED, {"role": "tool", "content": "3"}]},
    "role None, wanted system, user or assistant": {"messages": [{"content": "3"}]},
    "none of the columns messages": {"text": "ab"},
    "nothing in column 'completion'": {"prompt": "ab", "completion": None},
    "no messages in the column of messages": {"messages": []},
    "messages that are text, and no JSON": {"messages": "ab"},
    "messages that are text, and no JSON to any depth": (
        {"messages": "[" * 100_000},
        "messages that are text, and no JSON",
    ),
    "a message that is no object": {"messages": ["ab"]},
    "a NoneType where a message's text should be": {"messages": [{"role": "user", "content": None}]},
    "a message with a part that is no text": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "tool calls": {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
    "half of a pair of surrogates": {"prompt": "\ud800", "completion": "a"},
    "an assistant turn without text": {"prompt": "ab", "completion": " \n"},
    "an assistant turn without text, of several": (
        {"messages": [ASKED, ANSWERED, ASKED, ANSWERED | {"content": ""}]},
        "an assistant turn without text",
    ),
}


@pytest.mark.parametrize("says", BAD)
def test_what_is_no_conversation_says_why(says):
    row, says = BAD[says] if isinstance(BAD[says], tuple) else (BAD[says], says)
    with pytest.raises(NoConversation, match=says):
        conversation_of(row)


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_rows_are_tokens_and_what_is_left_out_is_counted_by_reason(tmp_path):
    of = tokenizer(OPENS)
    good = [{"messages": [ASKED, ANSWERED]}, {"prompt": "a", "completion": "b"}]
    bad = [{"messages": [ASKED]}, {"messages": [ASKED]}, {"prompt": "Z", "completion": "b"}, {"text": "a"}]
    long = {"prompt": "a" * 30, "completion": "b"}
    files = write(tmp_path / "a.jsonl", [good[0], *bad, long]), write(tmp_path / "b.jsonl.gz", [good[1]])
    rows = open_rows(ConversationConfig(data=files), of, max_length=20)
    assert [learnt(of, row) for row in rows] == [["cd<eos>"], ["b<eos>"]]
    assert of.decode(rows[0].tokens.tolist(), skip_special=False) == "<bos>U:ab;\nA:cd<eos>\n"
    assert rows.counts() == (2, 13 + 11, 3 + 2)
    assert str(rows.counts()) == "2 rows, 24 tokens, 5 of them learnt"
    told = [str(dropped) for dropped in rows.report]
    assert told[0] == f"{files[0]}: dropped 2 of 6 rows: no assistant turn (the first: {files[0]}:2)"
    assert any("dropped 1 of 6 rows: encode: got 'Z'" in line for line in told)
    assert any("dropped 1 of 6 rows: none of the columns messages" in line for line in told)
    assert any(f"dropped 1 of 6 rows: more than 20 tokens (the first: {files[0]}:6)" in line for line in told)
    assert len(told) == 4 and rows.notes == ()


def test_long_rows_are_cut_only_where_that_is_asked_for_and_it_is_said(tmp_path):
    of = tokenizer(OPENS)
    rows = [{"prompt": "ab", "completion": "cd" * 20}, {"prompt": "ab" * 20, "completion": "c"}]
    file = write(tmp_path / "a.jsonl", rows)
    found = open_rows(ConversationConfig(data=(file,), truncate=True), of, max_length=14)
    assert len(found) == 1 and len(found[0].tokens) == 14 and learnt(of, found[0]) == ["cdcdc"]
    assert "2 rows cut to their first 14 tokens, as --truncate asks" in found.notes
    assert any("does not end generation" in note for note in found.notes)
    assert "no token to learn among those that fit" in str(found.report[0])


def test_a_system_text_that_a_template_leaves_out_is_said_and_marked_turns_are_read_alone(tmp_path):
    mute = tokenizer(OPENS.replace("in messages %}", "in messages if m.role != 'system' %}"))
    rows = [{"system": "sss", "prompt": "ab", "completion": "cd"}, {"prompt": "a", "completion": "b"}]
    found = open_rows(ConversationConfig(data=(write(tmp_path / "a.jsonl", rows),)), mute, max_length=50)
    assert found.notes == (
        "1 texts of users or systems that the chat template leaves out: answers are learnt without them",
    )
    rows = [{"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, {"role": "assistant", "content": "b"}]}]
    found = open_rows(ConversationConfig(data=(write(tmp_path / "b.jsonl", rows),)), tokenizer(OPENS), max_length=50)
    assert [learnt(tokenizer(OPENS), row) for row in found] == [["b<eos>"]] and found.notes == ()


def test_thoughts_that_a_template_drops_are_said(tmp_path):
    thinks = {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}
    file = write(tmp_path / "a.jsonl", [{"messages": [ASKED, thinks, ASKED, thinks]}])
    rows = open_rows(ConversationConfig(data=(file,)), tokenizer(DROPS), max_length=200)
    assert learnt(tokenizer(DROPS), rows[0]) == ["b\n</think>\n\nc<eos>"]
    assert [note[:20] for note in rows.notes] == ["1 rows whose last th", "1 assistant turns th"]


def test_without_a_template_a_prompt_and_its_completion_are_plain_text(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd"}, {"messages": [SYSTEM, ASKED, ANSWERED]}])
    of = tokenizer(OPENS)
    rows = open_rows(ConversationConfig(data=(file,), chat=False), of, max_length=20)
    assert of.decode(rows[0].tokens.tolist(), skip_special=False) == "<bos>abcd<eos>" and len(rows) == 1
    assert "more than a prompt and its completion" in str(rows.report[0])


def test_what_cannot_be_read_at_all_is_refused_in_one_line(tmp_path):
    of = tokenizer(OPENS)
    file = write(tmp_path / "a.jsonl", [{"messages": [ASKED]}])
    with pytest.raises(ValueError, match="no row left to learn from: .*dropped 1 of 1 rows: no assistant turn"):
        open_rows(ConversationConfig(data=(file,)), of, max_length=20)
    with pytest.raises(ValueError, match="the data set is empty"):
        open_rows(ConversationConfig(data=(write(tmp_path / "b.jsonl", []),)), of, max_length=20)
    bare = Tokenizer(**{**vars(of), "chat_template": None})
    with pytest.raises(ValueError, match="chat: got a tokenizer without a chat_template.*--no-chat"):
        open_rows(ConversationConfig(data=(file,)), bare, max_length=20)
    with pytest.raises(ValueError, match="columns: got 3"):
        ConversationConfig(columns=("a", "b", "c"))
    with pytest.raises(ValueError, match="thinking: got it without a chat template"):
        ConversationConfig(chat=False, thinking=True)


def test_a_split_is_by_chance_and_by_its_seed_and_a_position_in_other_rows_is_refused(tmp_path):
    of = tokenizer(OPENS)
    letters = [{"prompt": letter, "completion": letter} for letter in "abcdefghij"]
    rows = open_rows(ConversationConfig(data=(write(tmp_path / "a.jsonl", letters),)), of, max_length=20)
    text = lambda rows: [learnt(of, row)[0][0] for row in rows]
    held_out, train = rows.split(3, seed=0)
    assert sorted(text(held_out) + text(train)) == list("abcdefghij") and text(held_out) != list("abc")
    assert text(rows.split(3, seed=0)[0]) == text(held_out) != text(rows.split(3, seed=1)[0])
    drawn = row_batches(train, size=2, seed=0)
    first, state, then = next(drawn), drawn.get_state(), next(drawn)
    again = row_batches(train, size=2, seed=0)
    again.set_state(json.loads(json.dumps(state)))
    for one, other in zip(next(again), then, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    assert len(first) == 2
    with pytest.raises(ValueError, match="data: changed since the checkpoint"):
        row_batches(held_out, size=2, seed=0).set_state(state)
