"""Tokens to thinking and answer, as a server streams them: what went wrong in others' servers does not here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.text.stream import TextStream
from deepseek_jax.text.think import ThinkParser, split_thinking
from tests.text.small_tokenizers import byte_level
from tests.text.test_stop import cut, pieces_of
from tests.text.test_think import FRAGMENTS


def streamed(tokenizer, ids, cuts, *, opened, stop=()):
    """Thinking and answer, joined from what came."""
    stream, parser, came = TextStream(tokenizer, stop=stop), ThinkParser(opened=opened), []
    for part in pieces_of(ids, cuts):
        came += parser.feed(stream.feed(part))
        if stream.stopped is not None:
            break
    came += parser.feed(stream.finish()) + parser.finish()
    return tuple("".join(text for kind, text in came if kind == want) for want in ("reasoning", "answer"))


@given(
    text=FRAGMENTS,
    opened=st.booleans(),
    stop=st.lists(st.sampled_from(["</think>", "<", "é", "k>a", "\n\n", "zzz"]), max_size=2),
    cuts=st.lists(st.integers(0, 90), max_size=8),
)
def test_a_stream_is_split_as_the_whole_text_before_its_stop(text, opened, stop, cuts):
    ids = byte_level().encode(text, add_bos=False)
    assert streamed(byte_level(), ids, cuts, opened=opened, stop=stop) == split_thinking(
        cut(text, stop)[0], opened=opened
    )


FAULTS = {
    # the opener is in the template, so that the output holds the closer alone
    "reasoning comes back null": ("I add.</think>4", True, ("I add.", "4")),
    "a truncated thought leaks into the answer": ("I add and", True, ("I add and", "")),
    "a truncated thought whose closer began": ("I add</thi", True, ("I add</thi", "")),
    "a budget is used up and there is no answer": ("I ad\n\nSo:</think>4", True, ("I ad\n\nSo:", "4")),
    "a literal closer in the answer is dropped": ("a</think>b</think>c", True, ("a", "b</think>c")),
    "an answer that mentions the tag is a thought": ("Use <think> so", False, ("", "Use <think> so")),
    "no thought at all is held back": ("4", False, ("", "4")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_other_servers(fault):
    """A token a byte, so that every tag is split across pieces."""
    text, opened, wanted = FAULTS[fault]
    ids = byte_level().encode(text, add_bos=False)
    assert streamed(byte_level(), ids, range(len(ids)), opened=opened) == wanted
