"""Budgets of thinking: what is written is the model's choice but for the message that closes a thought in time."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.arithmetic import ALPHABET
from deepseek_jax.generation.thinking import AFTER, BEFORE, CLOSING, NO_TAGS, THINKING, WINDOW, think_tags, thought_of
from deepseek_jax.text.tokenizer import Tokenizer
from tests.generation.test_slot_draw import Slots, V, sampling
from tests.text.small_tokenizers import byte_level
from tests.text.test_tokenizer import FOLDERS, needs_shared

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPENING, CLOSE, MESSAGE, BLANK = [4], [5, 6], [9, 8, 7, 5, 6], 3
MERGED = [1, 4]  # whose first is a line's end and the tag's beginning


def spelt(*tags):
    rows = NO_TAGS.opening.copy()
    for row, ids in zip(rows, tags, strict=False):
        row[-len(ids) :] = ids
    return rows


TAGS = NO_TAGS._replace(
    opening=spelt(OPENING, MERGED),
    closing=spelt([0, 5, 6], CLOSE),
    message=np.pad(np.array(MESSAGE, np.int32), (0, 64 - len(MESSAGE))),
    length=np.int32(len(MESSAGE)),
    blank=np.pad(np.array([BLANK], np.int32), (0, 63), constant_values=-1),
)


def written(choices, budget, *, opened, tags=TAGS, **settings):
    """What a slot writes whose model chooses these tokens, and the draws."""
    config = sampling(temperature=0.0, thinking_budget=budget, max_new_tokens=len(choices), **settings)
    subject = Slots([(config, [1], [])], tags=tags, opened=opened)
    draws = []
    for choice in choices:
        logits = np.zeros((1, V), np.float32)
        logits[0, choice] = 3.0
        draws.append(subject.draw(logits))
    state = [int(np.asarray(a)[0]) for a in (subject.state.phase, subject.state.thought)]
    return [int(d.token_R[0]) for d in draws], draws, state


def expected(choices, budget, opened):
    """The same by looking at the whole: the thought's beginning, its own end, and what comes first."""
    ends = lambda tag, first: [n for n in range(first + len(tag), len(choices) + 1) if choices[n - len(tag) : n] == tag]
    leads = lambda n: {*choices[: n - 1]} <= {BLANK} or [*filter(BLANK.__ne__, choices[:n])] == MERGED
    opens = [0] if opened else [n for n in ends(OPENING, 0) if leads(n)]
    if not opens or budget is None:
        return choices
    begin = opens[0]
    closes = ends(CLOSE, begin)
    if (closes and closes[0] - begin <= budget) or begin + budget >= len(choices):
        return choices
    forced = begin + budget
    return (choices[:forced] + MESSAGE + choices[forced + len(MESSAGE) :])[: len(choices)]


@given(
    choices=st.lists(st.sampled_from([BLANK, BLANK, 1, 0, 2, 4, 4, 5, 6, 6]), min_size=1, max_size=16),
    budget=st.sampled_from([None, 0, 1, 2, 3, 5, 9]),
    opened=st.booleans(),
)
def test_a_thought_is_closed_when_its_budget_is_used_up_and_never_else(choices, budget, opened):
    found, draws, state = written(choices, budget, opened=opened)
    assert found == expected(choices, budget, opened)
    assert [bool(d.forced_R[0]) for d in draws].count(True) <= len(MESSAGE)
    assert state == list(thought_of(found, opened=opened, budget=-1 if budget is None else budget, tags=TAGS))
    for token, choice, draw in zip(found, choices, draws, strict=True):
        assert token == choice or draw.forced_R[0]
        logits = np.where(np.arange(V) == choice, 3.0, 0.0)
        assert draw.logprob_R[0] == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-5)


def test_the_model_may_close_in_time_and_think_no_more():
    """A later opening tag is the answer's, and so is a later closing one."""
    choices = [4, 2, 5, 6, 4, 2, 2, 2, 5, 6, 2]
    assert written(choices, 3, opened=False)[0] == choices
    assert written(choices, 3, opened=False)[2][0] == AFTER


def test_an_opening_tag_in_an_answer_opens_nothing():
    for before in ([2], [2] * WINDOW, [BLANK, 2], [2, BLANK], [4, 5, 6]):
        choices = [*before, 4, 2, 2, 2, 2]
        assert written(choices, 5, opened=False)[0] == choices


def test_whitespace_before_a_thought_is_of_any_length():
    """As `text.think.split_thinking` has it."""
    for count in (0, 1, WINDOW, 3 * WINDOW):
        choices = [BLANK] * count + [4, 2, 2, 2]
        assert written(choices, 1, opened=False)[0] == [BLANK] * count + [4, 2, *MESSAGE[:2]]
    tags = think_tags(byte_level(("Ċ", "Ċ")), "so")
    ids = byte_level(("Ċ", "Ċ")).encode("\n\n\n \t" * 9 + "<think>a", add_bos=False)
    assert thought_of(ids, opened=False, budget=-1, tags=tags) == (THINKING, 1)
    ids = byte_level(("Ċ", "Ċ")).encode("\nSo<think>a", add_bos=False)
    assert thought_of(ids, opened=False, budget=-1, tags=tags)[0] == BEFORE


def test_what_closes_a_thought_neither_stops_nor_outlives_the_limit():
    found, draws, _ = written([2] * 9, 2, opened=True, stop_ids=(7, 6))
    assert found == [2, 2, *MESSAGE, 2, 2] and not any(d.stopped_R[0] for d in draws)
    found, draws, state = written([2] * 4, 2, opened=True)
    assert found == [2, 2, *MESSAGE[:2]] and [bool(d.done_R[0]) for d in draws] == [False] * 3 + [True]
    assert state[0] == CLOSING
    choices = [2, 7]  # a thought that stops by itself
    found, draws, state = written(choices, 5, opened=True, stop_ids=(7,))
    assert found == choices and draws[1].stopped_R[0] and state[0] == THINKING


def test_a_forced_token_was_drawn_from_everything():
    """So that its log-prob, within the support, is the model's."""
    config = sampling(temperature=0.7, top_k=1, thinking_budget=0)
    subject = Slots([(config, [1], [])] * 2, tags=TAGS, opened=True)
    logits = np.zeros((2, V), np.float32)
    logits[:, 3] = 2.0
    found = subject.draw(logits, record_support=True)
    bits = np.unpackbits(found.support_RW.view(np.uint8), axis=-1, bitorder="little")[:, :V]
    assert found.token_R.tolist() == MESSAGE[:1] * 2 and found.forced_R.all() and bits.all()
    wanted = -np.log(np.exp(2.0 / 0.7) + V - 1)
    np.testing.assert_allclose(found.logprob_R, wanted, atol=1e-5)


def test_without_tags_no_budget_closes_anything():
    assert written([2] * 5, 0, opened=True, tags=NO_TAGS)[0] == [2] * 5


def test_neighbours_of_a_thought_choose_freely():
    configs = [dataclasses.replace(sampling(temperature=0.0), thinking_budget=budget) for budget in (None, 0, 4)]
    subject = Slots([(config, [1], []) for config in configs], tags=TAGS, opened=True)
    logits = np.zeros((3, V), np.float32)
    logits[:, 2] = 1.0
    assert [subject.draw(logits).token_R.tolist() for _ in range(2)] == [[2, 9, 2], [2, 8, 2]]


# --- tags as tokenizers write them ------------------------------------------------------------------


def held(rows, ids):
    """Where in these tokens one of the spellings ends."""
    tags = [row[row >= 0].tolist() for row in rows if row[-1] >= 0]
    return [n for n in range(len(ids) + 1) if any(ids[n - len(tag) : n] == tag for tag in tags if n >= len(tag))]


@needs_shared
@pytest.mark.parametrize("name", ["deepseek-r1", "deepseek-r1-distill-qwen-7b"])
def test_published_tags_are_one_token(name):
    tokenizer = Tokenizer.from_folder(FOLDERS / name)
    tags = think_tags(tokenizer, "\n\nI answer now.\n")
    for rows, text in ((tags.opening, "<think>"), (tags.closing, "</think>")):
        assert rows[rows >= 0].tolist() == tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(tags.message[: tags.length].tolist()) == "\n\nI answer now.\n</think>"


@pytest.mark.parametrize("around", [("", ""), ("it.", "\n\n"), ("\n", "4")])
def test_tags_of_several_tokens_are_found_whatever_stands_beside_them(around):
    tags = think_tags(byte_level(), "so")
    ids = byte_level().encode("</think>".join(around), add_bos=False)
    assert held(tags.closing, ids) == [len(around[0]) + len("</think>")]
    assert held(tags.opening, ids) == []


def test_tags_are_found_where_a_tokenizer_merges_their_ends():
    merged = (">", "Ċ"), (">Ċ", "Ċ"), ("Ċ", "<"), ("<", "/"), ("t", "h")
    tokenizer = byte_level(*merged)
    closing = think_tags(tokenizer, "so").closing
    assert len({row[-1] for row in closing.tolist()} - {-1}) == 3  # ">" alone, with one line's end and with two
    for text in ("a</think>b", "a\n</think>\n", "\n</think>\n\n4", "</think>"):
        ids = tokenizer.encode(text, add_bos=False)
        [end] = held(closing, ids)
        assert "</think>" in tokenizer.decode(ids[:end]) and "</think>" not in tokenizer.decode(ids[: end - 1])


def test_a_message_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="^message: got 88 tokens with </think>, wanted at most 64; shorten"):
        think_tags(byte_level(), "x" * 80)


@pytest.mark.parametrize("alphabet", [ALPHABET, "<>/thinka."], ids=["toy", "tags of letters"])
def test_a_vocabulary_without_a_line_end_closes_a_thought_by_the_tag_alone(alphabet):
    tokenizer = Tokenizer.characters(alphabet, chat_template="")
    tags = think_tags(tokenizer, "\n")
    closing = tokenizer.encode("</think>", add_bos=False)
    assert tags.message[: tags.length].tolist() == closing
    assert closing in [[id for id in row if id >= 0] for row in tags.closing.tolist()]
    with pytest.raises(ValueError, match="encode: got 'Z'"):  # a message that says something is not left out
        think_tags(tokenizer, "Z")
