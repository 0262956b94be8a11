"""Laws of the think tags: streaming equals splitting, tags never leak, only the first closing tag closes."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.text.think import ThinkParser, after_thoughts, split_thinking, with_opening

# Fragments of tags make near misses as likely as tags.
FRAGMENTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "</thin", "<thi", " ", "\n", "a", "é"]),
    max_size=12,
).map("".join)


def stream(chunks, *, opened):
    parser = ThinkParser(opened=opened)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)] + parser.finish()
    assert all(text for _, text in pieces)
    kinds = [kind for kind, _ in pieces]
    assert kinds == sorted(kinds, reverse=True), "an answer came before the reasoning"
    return tuple("".join(text for kind, text in pieces if kind == want) for want in ("reasoning", "answer"))


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("I add.\n</think>\n\n4", True, ("I add.\n", "\n\n4")),
        ("<think>I add.</think>4", True, ("I add.", "4")),
        ("<think>I add.</think>4", False, ("I add.", "4")),
        ("\n <think>I add.</think>4", False, ("I add.", "4")),
        ("I add and", True, ("I add and", "")),
        ("<think>I add and", False, ("I add and", "")),
        ("4", False, ("", "4")),
        (" 4", False, ("", " 4")),
        ("a</think>b", False, ("", "a</think>b")),
        ("a <think>b</think>", False, ("", "a <think>b</think>")),
        ("", True, ("", "")),
        ("", False, ("", "")),
        ("</think>4", True, ("", "4")),
        ("a</think>write </think> so", True, ("a", "write </think> so")),
        ("a<think>b</think>c", True, ("a<think>b", "c")),
        ("a</thin", True, ("a</thin", "")),
        ("<thin", False, ("", "<thin")),
        ("  ", True, ("  ", "")),
    ],
)
def test_split_thinking_values(text, opened, expected):
    assert split_thinking(text, opened=opened) == expected
    assert stream([text], opened=opened) == expected
    assert stream(list(text), opened=opened) == expected


@given(text=FRAGMENTS, opened=st.booleans(), cuts=st.lists(st.integers(0, 80), max_size=8))
def test_any_chunking_equals_the_split(text, opened, cuts):
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    chunks = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert stream(chunks, opened=opened) == split_thinking(text, opened=opened)
    assert stream(list(text), opened=opened) == split_thinking(text, opened=opened)


@pytest.mark.parametrize(
    ("prompt", "completion", "found"),
    [
        ("Q", "<think>a</think>b", "b"),
        ("Q<think>\n", "a</think>b", "b"),
        ("Q<think>", "a</think>b</think>c", "c"),  # where split_thinking shows "b</think>c"
        ("Q<think>", "never closed", ""),
        ("Q", "b<think>never closed", "b"),
        ("Q <think> now", "b", "b"),
    ],
)
def test_no_thought_passes_for_an_answer(prompt, completion, found):
    assert after_thoughts(with_opening(prompt, completion)) == found


def test_a_piece_is_held_back_only_while_it_may_be_a_tag():
    parser = ThinkParser(opened=True)
    assert parser.feed("abc") == [("reasoning", "abc")]
    assert parser.feed("d</thi") == [("reasoning", "d")]
    assert parser.feed("s") == [("reasoning", "</this")]
    assert parser.feed("</think>x") == [("answer", "x")]
    assert parser.feed("</thi") == [("answer", "</thi")]
    assert parser.finish() == []


def test_a_finished_parser_refuses_more():
    parser = ThinkParser(opened=False)
    parser.finish()
    with pytest.raises(ValueError, match="new parser"):
        parser.feed("a")


@pytest.mark.parametrize("unit", [" ", "<", "</think", "a"])
def test_time_is_linear(unit):
    def seconds(count):
        parser = ThinkParser(opened=True)
        begin = time.process_time()
        for _ in range(count):
            parser.feed(unit)
        parser.finish()
        return time.process_time() - begin

    # Quadratic time would make this ratio 16; the best of three of the processor's shrugs off a busy machine.
    small, large = (min(seconds(count) for _ in range(3)) for count in (20_000, 80_000))
    assert large < 10 * small
