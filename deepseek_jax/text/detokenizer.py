"""Text of tokens as they come: a character is given once all of its bytes are there."""

from collections.abc import Sequence

from deepseek_jax.text.tokenizer import Tokenizer

_PART = "\ufffd"  # what decoding gives for bytes that are no whole character, yet


class Detokenizer:
    """Turns a stream of token ids into text, special tokens left out. Time is linear in the stream.

    A few tokens before the new ones are decoded with them, because a token's text may depend on its neighbour.

    Args:
      tokenizer: of the ids.

    Source: huggingface/text-generation-inference, `Model.decode_token`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # given already
        self._held: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that is now known, "" while a character may be open."""
        self._held += ids
        text = self._new_text()
        if not text or text.endswith(_PART):
            return ""
        self._before, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Ends the stream; returns what was held back, with U+FFFD for what is no character after all."""
        text, self._held = self._new_text(), []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._held])[len(before) :]
