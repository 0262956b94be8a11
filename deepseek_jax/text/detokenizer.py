"""Text of tokens as they come: a character is given once all of its bytes are there."""

from collections.abc import Sequence

from deepseek_jax.text.tokenizer import Tokenizer

_PART = "\ufffd"  # what decoding gives for bytes that are no whole character, yet
_PATIENCE = 16  # tokens: more than the bytes of any character, so that a longer wait is for nothing
_CONTEXT = 8


class Detokenizer:
    """Turns a stream of token ids into text, special tokens left out. Time is linear in the stream.

    A few tokens before the new ones are decoded with them, because a token's text may depend on its neighbour.

    Args:
      tokenizer: of the ids.

    Source: huggingface/text-generation-inference, `Model.decode_token`.
    Differs: what stands before an open character is given; bytes that never become a character, and special tokens
      without end, are not waited for, so that decoding them does not take ever longer (tests/text/test_detokenizer.py,
      test_the_tokens_decoded_are_linear_in_the_stream). Where a vocabulary of words falls back to bytes, decoding the
      whole would take a character back for part of another behind it (test_a_character_that_was_given_stays).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # that are decoded together
        self._text = ""  # theirs
        self._given = 0  # characters of it
        self._waiting = 0  # tokens since the text was whole

    def feed(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that is now known, "" while a character may be open."""
        tokens = [*self._tokens, *ids]
        text, patient = self._tokenizer.decode(tokens), self._waiting <= _PATIENCE
        same = text == self._text and (text.endswith(_PART) or not patient)
        if same and not self._tokenizer.decode(ids):
            return ""  # special tokens, of which any number may come
        self._tokens, self._text = tokens, text
        self._waiting += len(ids)
        new = text[self._given :]
        # Of characters that are none yet the last may still become one; with some tokenizers those before it may too.
        known = new.rstrip(_PART) if patient else new.removesuffix(_PART)
        self._given += len(known)
        if new and known == new:
            if len(tokens) > _PATIENCE:
                self._go_on_with(tokens[-self._waiting :])
            self._waiting = 0
        elif known and not patient:
            self._give_up()
        return known

    def finish(self) -> str:
        """Ends the stream; returns what was held back, with U+FFFD for what is no character after all."""
        text, self._given = self._text[self._given :], len(self._text)
        return text

    def _give_up(self) -> None:
        """Go on with the last few tokens, where all before them is given and they decode apart from it."""
        for count in range(_CONTEXT, _CONTEXT + 4):  # inside a character they do not
            before, after = (self._tokenizer.decode(of) for of in (self._tokens[:-count], self._tokens[-count:]))
            if before + after == self._text and len(before) <= self._given:
                self._go_on_with(self._tokens[-count:])
                self._waiting = count
                return

    def _go_on_with(self, tokens: list[int]) -> None:
        """Decode only these with what comes."""
        text = self._tokenizer.decode(tokens)
        self._given -= len(self._text) - len(text)
        self._tokens, self._text = tokens, text
