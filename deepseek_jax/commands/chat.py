"""A conversation in the terminal: answers stream, thoughts are dim, and Ctrl-C stops an answer and not the program."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import count

from deepseek_jax import interrupt
from deepseek_jax.distributed import printable, say
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.text import Messages
from deepseek_jax.text.think import Piece, ThinkParser, opens_thought

HINT = "Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D ends it."


def converse(engine: Engine, sampling: SamplingConfig, encode: Callable[[Messages], list[int]], seed: int) -> None:
    """Answer what is typed, until /exit or the end of standard input.

    Of earlier answers the model sees no thoughts, as R1's template wants it. What it has computed of earlier turns
    stays in the engine's cache.

    Args:
        engine: with a tokenizer; nobody else uses it.
        sampling: how answers are drawn.
        encode: a conversation to the tokens of the prompt.
        seed: of the first answer; the others have the numbers after it.
    """
    if find_spec("readline"):  # not everywhere: `input` edits lines with it
        import_module("readline")
    print(HINT, file=sys.stderr)
    turns: list[dict[str, str]] = []
    with interrupt.Notice() as ctrl_c:
        for number in count(seed):
            text = _typed(ctrl_c)
            if text in (None, "/exit"):
                return
            ctrl_c.forget()
            if text == "/clear":
                turns = []
            elif text.strip():
                turns = _turn(engine, sampling, encode, turns, text, number, ctrl_c)


def write(text: str, *, dim: bool = False) -> None:
    """A terminal would obey what a model writes; a file or a pipe is to get it unchanged, and nothing is dim there."""
    if sys.stdout.isatty():
        text = printable(text)
        if dim and os.environ.get("TERM", "dumb") != "dumb":
            text = f"\x1b[2m{text}\x1b[22m"
    sys.stdout.write(text)
    sys.stdout.flush()


def _typed(ctrl_c: interrupt.Notice) -> str | None:
    """A line from the terminal, empty where Ctrl-C ended it, None at the end."""
    try:
        with ctrl_c.raising():
            return input("> ")
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        print()
        return None


def _turn(
    engine: Engine,
    sampling: SamplingConfig,
    encode: Callable[[Messages], list[int]],
    turns: list[dict[str, str]],
    text: str,
    seed: int,
    ctrl_c: interrupt.Notice,
) -> list[dict[str, str]]:
    """The turns with this one and its answer, as far as it came; those before where it cannot be asked."""
    asked = [*turns, {"role": "user", "content": text}]
    try:
        tokens = encode(asked)
        room = engine.scheduler.config.max_model_len
        if len(tokens) >= room:
            got = f"got a conversation of {len(tokens)} tokens, wanted fewer than {room}"
            raise ValueError(f"{got}; /clear forgets it, or ask for less")
        request = engine.add(tokens, sampling, seed=seed)
    except ValueError as problem:
        say(" ".join(str(problem).split()))
        return turns
    opened = opens_thought(engine.tokenizer.decode(tokens[-16:], skip_special=False))
    answer = _answer(engine, request, ThinkParser(opened=opened), ctrl_c)
    return [*asked, {"role": "assistant", "content": answer}]


def _answer(engine: Engine, request: int, parser: ThinkParser, ctrl_c: interrupt.Notice) -> str:
    """Show an answer as it comes; returns it without its thought."""
    screen, ended = _Screen(), ""
    while engine.has_work and not ctrl_c.came:
        for update in engine.step():
            screen.show(parser.feed(update.text))
            if update.finished and not update.live.stopped:
                ended = f"[cut off after {len(update.live.logprobs)} tokens]"
    if engine.cancel(request):
        ended = "[stopped]"
    screen.show(parser.finish())
    screen.end(ended)
    return screen.answer


class _Screen:
    """Where an answer is shown; on a terminal thoughts and notes are dim.

    Attributes:
        answer: what was shown of it, without thoughts.
    """

    def __init__(self) -> None:
        self.answer = ""
        self._last: Piece | None = None

    def show(self, pieces: list[Piece]) -> None:
        """Further pieces of the answer."""
        for kind, text in pieces:
            if self._last and kind != self._last[0] and not self._last[1].endswith("\n") and not text.startswith("\n"):
                write("\n")
            write(text, dim=kind == "reasoning")
            self.answer += text if kind == "answer" else ""
            self._last = kind, text

    def end(self, note: str) -> None:
        """The end of it, and what is to be said of that."""
        if self._last is not None and not self._last[1].endswith("\n"):
            write("\n")
        if note:
            write(f"{note}\n", dim=True)
