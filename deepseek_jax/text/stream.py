"""The text of a completion as its tokens come, ended by stop texts."""

import copy
from collections.abc import Sequence

from deepseek_jax.text.detokenizer import Detokenizer
from deepseek_jax.text.stop import StopMatcher
from deepseek_jax.text.tokenizer import Tokenizer


class TextStream:
    """Turns a stream of token ids into text that ends before the first stop text.

    Text is given once it can be neither part of a character nor the beginning of a stop text. Time is linear in the
    stream.

    Args:
      tokenizer: of the ids.
      stop: the stop texts, none of them empty.
      least: a stop text that is complete within so many tokens does not count.

    Attributes:
      stopped: the stop text that ended the stream; None while none did.
      tokens: how many belong to the completion: all that were fed, or those until a stop text was complete.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), least: int = 0):
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stop)
        self._least = least
        self.tokens = 0

    @property
    def stopped(self) -> str | None:
        return self._matcher.stopped

    def feed(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that is now known, "" once the stream has ended."""
        early = max(0, min(len(ids), self._least - self.tokens))
        return self._feed(ids[:early], counts=False) + self._feed(ids[early:], counts=True)

    def finish(self) -> str:
        """Ends the stream; returns what was held back, unless it ends in a stop text after all."""
        counts = self.tokens > self._least or self._least == 0
        return self._matcher.feed(self._detokenizer.finish(), counts=counts) + self._matcher.finish()

    def _feed(self, ids: Sequence[int], *, counts: bool) -> str:
        if self.stopped is not None or not ids:
            return ""
        before = copy.copy(self._detokenizer)
        text = self._matcher.feed(self._detokenizer.feed(ids), counts=counts)
        self.tokens += len(ids) if self.stopped is None else _until(before, ids, self._matcher.end)
        return text


def _until(detokenizer: Detokenizer, ids: Sequence[int], characters: int) -> int:
    """How many of the ids it takes to give so many characters."""
    given = 0
    for count, token in enumerate(ids, 1):
        given += len(detokenizer.feed([token]))
        if given >= characters:
            return count
    return len(ids)
