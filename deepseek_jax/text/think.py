"""Thinking and answering told apart: `<think>reasoning</think>answer`, whole or as a stream."""

from typing import Literal

OPEN = "<think>"
CLOSE = "</think>"

Piece = tuple[Literal["reasoning", "answer"], str]


def split_thinking(text: str, *, opened: bool) -> tuple[str, str]:
    """Splits a completion into its reasoning and its answer.

    The tags go, every other character stays as it was, the newlines around the tags included. Only the first
    `</think>` closes: a later one belongs to the answer. An unclosed thought is all reasoning. Whitespace
    before an opening tag is dropped; a tag after anything else does not open.

    Args:
      text: what the model wrote after its prompt.
      opened: the prompt already ended in `<think>`, as R1's does, so that the text begins inside the thought.
        A model that writes the opening tag all the same is forgiven.

    Returns:
      (reasoning, answer); the reasoning is "" when the model did not think.

    Source: deepseek-ai/DeepSeek-R1, README "Usage Recommendations" and the tokenizer's chat template.
    """
    stripped = text.lstrip()
    if stripped.startswith(OPEN):
        text = stripped[len(OPEN) :]
    elif not opened:
        return "", text
    reasoning, _, answer = text.partition(CLOSE)
    return reasoning, answer


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends in `<think>`, whitespace after it allowed: its completions begin inside the thought."""
    return prompt.rstrip().endswith(OPEN)


def with_opening(prompt: str, completion: str) -> str:
    """A completion with the `<think>` that its prompt ended in, if it did."""
    return OPEN + completion if opens_thought(prompt) else completion


def after_thoughts(text: str) -> str:
    """What answers are looked for in: the text after the last `</think>`, or before a `<think>` that never closes.

    Unlike `split_thinking`, which shows a reader all that was written, this lets no thought pass for an answer.
    """
    _, closed, final = text.rpartition(CLOSE)
    return final if closed else text.partition(OPEN)[0]


class ThinkParser:
    """Splits a stream as `split_thinking` splits the whole text, whatever the chunks.

    Time is linear in the stream. A piece is held back only while it may still be part of a tag.

    Args:
      opened: the prompt already ended in `<think>`.

    Attributes:
      thinks: the stream's last text is, as far as is known, inside a thought.
      closed: a thought has ended.
    """

    def __init__(self, *, opened: bool):
        self._opened = opened
        self.closed = False
        self._state: Literal["start", "reasoning", "answer", "finished"] = "start"
        self._blank: list[str] = []
        self._tail = ""

    def feed(self, chunk: str) -> list[Piece]:
        """Takes the stream's next text.

        Args:
          chunk: any number of characters, none included.

        Returns:
          What is now known, in order; no piece is empty.

        Raises:
          ValueError: the parser was finished before.
        """
        if self._state == "finished":
            raise ValueError("ThinkParser.feed: got text after finish(), wanted a new parser for a new stream")
        pieces: list[Piece] = []
        text = self._tail + chunk
        self._tail = ""
        if self._state == "start":
            text = self._start(text)
        if self._state == "reasoning":
            text = self._reason(text, pieces)
        if self._state == "answer" and text:
            pieces.append(("answer", text))
        return pieces

    @property
    def thinks(self) -> bool:
        return self._state == "reasoning" or (self._state == "start" and self._opened)

    def finish(self) -> list[Piece]:
        """Ends the stream.

        Returns:
          What was held back: the beginning of a tag that never came, or leading whitespace.
        """
        held = "".join(self._blank) + self._tail
        inside = self.thinks
        self._state = "finished"
        if not held:
            return []
        return [("reasoning" if inside else "answer", held)]

    def _start(self, text: str) -> str:
        """Looks for the opening tag; returns the text that follows the decision, "" while there is none."""
        stripped = text.lstrip()
        self._blank.append(text[: len(text) - len(stripped)])
        if OPEN.startswith(stripped) and stripped != OPEN:
            self._tail = stripped
            return ""
        blank = "".join(self._blank)
        self._blank = []
        if stripped.startswith(OPEN):
            self._state = "reasoning"
            return stripped[len(OPEN) :]
        self._state = "reasoning" if self._opened else "answer"
        return blank + stripped

    def _reason(self, text: str, pieces: list[Piece]) -> str:
        """Appends what is surely reasoning; returns the answer's beginning once the tag has closed."""
        thought, closed, rest = text.partition(CLOSE)
        if closed:
            self._state, self.closed = "answer", True
        else:
            kept = _tag_prefix(thought)
            thought, self._tail = thought[: len(thought) - kept], thought[len(thought) - kept :]
        if thought:
            pieces.append(("reasoning", thought))
        return rest


def _tag_prefix(text: str) -> int:
    """Length of the longest end of the text that begins a closing tag."""
    return next(n for n in range(min(len(CLOSE) - 1, len(text)), -1, -1) if text.endswith(CLOSE[:n]))
