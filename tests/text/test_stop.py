"""Stop texts over the borders of tokens: what is given, what is cut, and the tokens that belong."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.text.stop import StopMatcher
from deepseek_jax.text.stream import TextStream
from tests.text.small_tokenizers import byte_level

LETTERS = st.text("ab\n", max_size=14)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def cut(text, stops, first=0):
    """The text before the stop text that is complete first, of several the longest, and which it is; whole if none is.

    `first`: a stop text that is complete before so many characters does not count.
    """
    for end in range(first, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and end > 0:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop, end
    return text, None, len(text)


def pieces_of(text, cuts):
    places = [0, *sorted(min(place, len(text)) for place in cuts), len(text)]
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 14), max_size=6))
def test_any_pieces_are_cut_as_the_whole(text, stops, cuts):
    matcher, given_text, consumed = StopMatcher(stops), "", 0
    for piece in pieces_of(text, cuts):
        given_text += matcher.feed(piece)
        consumed += matcher.end
        if matcher.stopped is not None:
            break
        # What is held back is the beginning of a stop text, the longest, and everything else was given.
        seen = given_text + matcher.held
        assert seen == text[:consumed]
        begins = [stop[:n] for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])]
        assert matcher.held == max([*begins, ""], key=len)
    given_text += matcher.finish()
    assert (given_text, matcher.stopped, consumed) == cut(text, stops)


def test_a_matcher_that_stopped_gives_nothing_more():
    matcher = StopMatcher(["end"])
    assert matcher.feed("the end of") == "the " and (matcher.stopped, matcher.end) == ("end", 7)
    assert matcher.feed("it") == matcher.finish() == ""


def test_what_may_begin_a_stop_text_is_given_when_the_stream_ends():
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.feed(piece) for piece in ("Yes.\n", "\nUs", "ed")] == ["Yes.", "", "\n\nUsed"]
    assert matcher.feed("\n\nUser") == "" and matcher.finish() == "\n\nUser" and matcher.stopped is None


@pytest.mark.parametrize("unit", ["a", "ab", "b"])
def test_time_is_linear(unit):
    def seconds(count):
        matcher = StopMatcher(["a" * 50 + "c", "ab" * 25 + "c"])
        begin = time.process_time()
        for _ in range(count):
            matcher.feed(unit)
        return time.process_time() - begin

    # Quadratic time would make this ratio 16; the best of three of the processor's shrugs off a busy machine.
    small, large = (min(seconds(count) for _ in range(3)) for count in (20_000, 80_000))
    assert large < 10 * small


# --- of tokens ------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose token's text is its word; -1 is special."""

    def __init__(self, *words):
        self.words = words

    def decode(self, ids, *, skip_special=True):
        return "".join(self.words[index] for index in ids if index >= 0)


@given(
    ids=st.lists(st.integers(-1, 4), max_size=10),
    stops=STOPS,
    cuts=st.lists(st.integers(0, 10), max_size=5),
    least=st.sampled_from([0, 0, 3]),
)
def test_the_tokens_that_belong_are_those_until_the_stop_text_is_complete(ids, stops, cuts, least):
    """And no stop text counts that is complete within the least tokens."""
    tokenizer = Words("a", "b", "ab", "\n", "ba\na")
    stream = TextStream(tokenizer, stop=stops, least=least)
    text = ""
    for part in pieces_of(ids, cuts):
        text += stream.feed(part)
        if stream.stopped is not None:
            break
    text += stream.finish()
    first = len(tokenizer.decode(ids[:least]))
    wanted, stopped, end = cut(tokenizer.decode(ids), stops, first=first + 1 if least else 0)
    assert (text, stream.stopped) == (wanted, stopped)
    ends = [n for n in range(len(ids) + 1) if len(tokenizer.decode(ids[:n])) >= end]
    assert stream.tokens == (ends[0] if stopped is not None else len(ids))


@given(data=st.data())
def test_a_stop_text_of_characters_of_several_tokens(data):
    """Its bytes are divided between tokens, and nothing of it is given."""
    text, stop = data.draw(st.text("a漢é字", max_size=6)), data.draw(st.sampled_from(["漢é", "字", "é"]))
    ids = byte_level().encode(text, add_bos=False)
    stream, given_text = TextStream(byte_level(), stop=[stop]), ""
    for part in pieces_of(ids, data.draw(st.lists(st.integers(0, 20), max_size=5))):
        given_text += stream.feed(part)
        if stream.stopped is not None:
            break
    given_text += stream.finish()
    before, found, _ = text.partition(stop)
    assert given_text == before and (stream.stopped == stop if found else stream.stopped is None)
    assert stream.tokens == len((before + found).encode())


def test_a_stop_text_that_only_the_end_completes():
    """U+FFFD at the end of a stream is what its bytes are, and a stop text all the same."""

    class Halves(Words):
        def decode(self, ids, *, skip_special=True):
            return super().decode(ids).replace("12", "é").replace("1", "\ufffd")

    stream = TextStream(Halves("a", "1", "2"), stop=["\ufffd"])
    assert [stream.feed([0]), stream.feed([1])] == ["a", ""] and stream.stopped is None
    assert stream.finish() == "" and (stream.stopped, stream.tokens) == ("\ufffd", 2)
