"""A stream of tokens gives the text of the whole, whatever the chunks, and no half of a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.text.detokenizer import Detokenizer
from deepseek_jax.text.tokenizer import Tokenizer
from tests.text.small_tokenizers import BYTES, byte_level, word_pieces
from tests.text.test_tokenizer import FOLDERS, needs_shared

TEXTS = ["", "wörter 漢字", "👩‍👧 family", "नमस्ते", "a b  c\n\n", "￿ x", "½<eos>½", "שלום ไทย 𒀀🇩🇪"]


def streamed(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    stream, places = Detokenizer(tokenizer), [0, *sorted(cuts), len(ids)]
    pieces = [stream.feed(ids[a:b]) for a, b in zip(places, places[1:], strict=False)]
    return [*pieces, stream.finish()]


ANY_BYTES = st.lists(st.integers(0, 256), max_size=12)
# Bytes as tokens of a vocabulary of words: whole characters, or parts of one between words.
WORDS = st.lists(st.sampled_from([[0], [1], [2], [3], [7], [4, 5, 6], [2, 4, 2], [2, 5, 6, 2]]), max_size=8).map(
    lambda parts: sum(parts, [])
)


@given(data=st.data())
def test_pieces_join_to_the_text_of_the_whole(data):
    """Of text, and of any ids at all: bytes that are no characters, special tokens."""
    of_text = st.sampled_from(TEXTS).map(lambda text: byte_level().encode(text, add_bos=False))
    tokenizer, kinds = data.draw(
        st.sampled_from([(byte_level(), st.one_of(ANY_BYTES, of_text)), (word_pieces(), WORDS)])
    )
    ids = data.draw(kinds)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)))
    assert "".join(streamed(tokenizer, ids, cuts)) == tokenizer.decode(ids)


def test_a_character_that_was_given_stays():
    """Bytes as tokens of a vocabulary of words: the whole's decoding takes it back for a part that follows it."""
    ids = [4, 5, 6, 4, 2]
    assert word_pieces().decode(ids) == "\ufffd" * 4 + "c"
    assert streamed(word_pieces(), ids, [3]) == ["漢", "\ufffd" * 3 + "c", ""]


def test_no_piece_holds_half_a_character():
    text = "ö漢👩‍👧नम½"
    ids = byte_level().encode(text, add_bos=False)
    assert len(ids) > 2 * len(text)
    pieces = streamed(byte_level(), ids, list(range(len(ids))))
    assert [piece for piece in pieces if piece] == list(text)


def test_what_never_becomes_a_character_is_given_at_the_end():
    ids = byte_level().encode("a漢", add_bos=False)[:-1]
    assert streamed(byte_level(), ids, [1, 2]) == ["a", "", "", "\ufffd"]


def test_what_stands_before_an_open_character_is_given():
    """However many tokens come at once."""
    ids = byte_level().encode("a漢b漢", add_bos=False)
    assert streamed(byte_level(), ids, [2, 7]) == ["a", "漢b", "漢", ""]


class Counted:
    """A tokenizer that counts what it decodes."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.tokens = tokenizer, 0

    def decode(self, ids: list[int]) -> str:
        self.tokens += len(ids)
        return self.tokenizer.decode(ids)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("unit", ["a", "漢", "<eos>", "\ufffd", b"\x80", b"\xe6", b"a\xe6", b"\xe6<", b"\xf0\x9f"])
def test_the_tokens_decoded_are_linear_in_the_stream(unit, size):
    """Of text, special tokens, U+FFFD written out, and bytes that never become a character."""
    ids = byte_level().encode(unit, add_bos=False) if isinstance(unit, str) else [BYTES[byte] for byte in unit]
    ids = (ids * 200)[:200]
    counted = Counted(byte_level())
    pieces = streamed(counted, ids, list(range(0, 200, size)))
    assert "".join(pieces) == byte_level().decode(ids)
    assert counted.tokens < 200 * 40  # all of them each time would be 20,000 or more


def test_a_special_token_inside_a_character_is_left_out():
    first, *rest = byte_level().encode("漢", add_bos=False)
    ids = [first, *[byte_level().eos_ids[0]] * 40, *rest, *byte_level().encode("b", add_bos=False)]
    assert "".join(streamed(byte_level(), ids, list(range(len(ids))))) == byte_level().decode(ids) == "漢b"


@needs_shared
@pytest.mark.parametrize("name", ["deepseek-r1", "deepseek-r1-distill-qwen-7b"])
@settings(max_examples=5)
@given(data=st.data())
def test_published_tokenizers(name, data):
    """Of text in many scripts and of any ids, among them bytes that are no characters."""
    tokenizer = Tokenizer.from_folder(FOLDERS / name)
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8)
    of_text = st.sampled_from(TEXTS).map(lambda text: tokenizer.encode(text, add_bos=False))
    ids = [token for part in data.draw(st.lists(st.one_of(some, of_text), max_size=4)) for token in part]
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)))
    assert "".join(streamed(tokenizer, ids, cuts)) == tokenizer.decode(ids)
