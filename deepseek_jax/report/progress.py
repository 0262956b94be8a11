"""Progress of a long loop: a live bar on a terminal, a plain line now and then anywhere else."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from deepseek_jax import distributed

# Speed is that of the last steps, so that the first one's compilation is soon forgotten.
_SPEED_STEPS = 20
_BAR_CELLS, _LEAST_BAR_CELLS = 24, 4


class Progress:
    """Shows how far a loop is, how fast it goes, the time left and its latest metrics.

    On a terminal this is one live line, at any width. Elsewhere (a log file, CI) a plain line is printed at the first
    step, at every tenth of the total, at the last step, and otherwise every `seconds` at most.

    >>> with Progress(2, "count", console=Console(force_terminal=False, width=80)) as progress:
    ...     progress.note("starting")
    starting

    Args:
        total: Steps of the whole loop, those done before a resume included.
        description: What the loop does, for example "grpo".
        start: Steps already done when resuming; they count for the bar and not for the speed.
        unit: What is counted.
        seconds: The longest silence between plain lines.
        console: Where to write; by default the standard output of the main process.
        clock: Monotonic seconds; replaced in tests.

    Raises:
        ValueError: `total` is not positive, or `start` is not within it.
    """

    def __init__(
        self,
        total: int,
        description: str,
        start: int = 0,
        *,
        unit: Literal["steps", "bytes"] = "steps",
        seconds: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if total <= 0 or not 0 <= start <= total:
            raise ValueError(f"progress needs 0 <= start <= total and total > 0, got {start} and {total}")
        self.total, self.description, self.step = total, description, start
        self._console = console or Console(quiet=not distributed.is_main())
        self._unit, self._seconds, self._clock = unit, seconds, clock
        self._lock = threading.Lock()
        self._metrics: dict[str, Any] = {}
        self._began = self._printed_at = clock()
        self._printed_step: int | None = None
        self._recent = deque([(self._began, start)], maxlen=_SPEED_STEPS + 1)
        live = self._console.is_terminal
        # The standard output may be a file while the bar is on the terminal of the standard error.
        both = {"redirect_stdout": not self._console.stderr, "refresh_per_second": 4}
        self._bar = Live(get_renderable=self._line, console=self._console, **both) if live else None

    def __enter__(self) -> Self:
        self._began = self._printed_at = self._clock()
        self._recent[-1] = (self._began, self.step)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._printed_step not in (None, self.step):
            self._print_line()

    def update(self, step: int, **metrics: float | str) -> None:
        """Says that this many steps of the whole are done.

        Args:
            step: Steps done, counted from the loop's beginning and not from the resume.
            metrics: What to show beside the bar, in this order; numbers are shortened, text stays as it is.
        """
        self.step = step
        self._metrics |= metrics
        self._recent.append((self._clock(), step))
        if self._bar is None and self._line_is_due():
            self._print_line()

    def advance(self, count: int) -> None:
        """Says that this many more are done; from any thread."""
        with self._lock:
            self.update(self.step + count)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        self._console.print(distributed.printable(text), markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the bar away while something else is written to the terminal."""
        if self._bar is not None:
            self._bar.transient = True
            self._bar.stop()
            self._bar.transient = False
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start(refresh=True)

    def steps_per_second(self) -> float | None:
        """The speed over the last steps; None before the first."""
        (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
        return (n1 - n0) / (t1 - t0) if n1 > n0 and t1 > t0 else None

    def seconds_left(self) -> float | None:
        """The time that the remaining steps take at the present speed; None before the first step."""
        speed = self.steps_per_second()
        return (self.total - self.step) / speed if speed else None

    def _line(self) -> Text:
        """The live line, never wider than the terminal: first what matters least is left out, at last it is cut."""
        room = self._console.width - 1  # a cursor after a full line may stand on the next
        elapsed, left = format_seconds(self._clock() - self._began), f"left {format_seconds(self.seconds_left())}"
        name = distributed.printable(self.description)
        metrics = [f"{key} {_format_value(key, value)}" for key, value in self._metrics.items()]
        parts = [
            (name, "bold"),
            (self._done(), ""),
            (self._speed(), "cyan"),
            (left, "dim"),
            *((distributed.printable(text), "") for text in metrics),
            (elapsed, "dim"),
        ]
        kept, used = [], -2
        for text, style in parts:
            if kept and used + 2 + cell_len(text) > room:
                break
            kept.append((text, style))
            used += 2 + cell_len(text)
        bar = min(room - used - 2, _BAR_CELLS)
        if bar >= _LEAST_BAR_CELLS:
            kept.insert(1, (self._bar_text(bar), "green"))
        line = Text("  ", no_wrap=True, overflow="ellipsis", end="").join(Text(text, style) for text, style in kept)
        line.truncate(room, overflow="ellipsis")
        return line

    def _bar_text(self, cells: int) -> str:
        full, empty = ("#", "-") if self._console.options.ascii_only else ("\u2501", "\u2500")
        done = cells * self.step // self.total
        return full * done + empty * (cells - done)

    def _done(self) -> str:
        if self._unit == "steps":
            return f"{self.step}/{self.total}"
        return f"{format_bytes(self.step)} of {format_bytes(self.total)}"

    def _speed(self) -> str:
        speed = self.steps_per_second()
        return format_speed(speed) if self._unit == "steps" else f"{'-' if speed is None else format_bytes(speed)}/s"

    def _line_is_due(self) -> bool:
        if self._printed_step is None or self.step >= self.total:
            return True
        tenth_passed = self.step * 10 // self.total > self._printed_step * 10 // self.total
        return tenth_passed or self._clock() - self._printed_at >= self._seconds

    def _print_line(self) -> None:
        self._printed_at, self._printed_step = self._clock(), self.step
        elapsed = format_seconds(self._printed_at - self._began)
        parts = [
            f"{self.description} {self._done()}",
            self._speed(),
            f"elapsed {elapsed}",
            f"left {format_seconds(self.seconds_left())}",
            format_metrics(self._metrics),
        ]
        self.note("  ".join(part for part in parts if part))


def format_metrics(metrics: dict[str, float | str]) -> str:
    """Writes metrics on one line; a name that ends in "accuracy" is a fraction and shown in percent.

    >>> format_metrics({"reward": 0.8342, "length": 41.23, "accuracy": 0.712, "loss": 0.0000312})
    'reward 0.83  length 41.2  accuracy 71 %  loss 3.1e-05'
    """
    return "  ".join(f"{name} {_format_value(name, value)}" for name, value in metrics.items())


def format_speed(steps_per_second: float | None) -> str:
    """Writes a speed as steps a second, or as seconds a step where that is the larger number.

    >>> format_speed(12.34), format_speed(0.25), format_speed(None)
    ('12.3 steps/s', '4.0 s/step', '- steps/s')
    """
    if steps_per_second is None:
        return "- steps/s"
    return f"{steps_per_second:.1f} steps/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s/step"


def format_bytes(count: float) -> str:
    """Writes a number of bytes in powers of 1000.

    >>> format_bytes(512), format_bytes(14_680_064), format_bytes(688_574_839_360)
    ('512 B', '14.7 MB', '688.6 GB')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def format_seconds(seconds: float | None) -> str:
    """Writes a duration.

    >>> format_seconds(7.2), format_seconds(754), format_seconds(7384), format_seconds(None)
    ('0:07', '12:34', '2:03:04', '-')
    """
    if seconds is None:
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _format_value(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    number = float(value)
    if name.endswith("accuracy"):
        return f"{100 * number:.0f} %"
    if number == 0 or 0.01 <= abs(number) < 10:
        return f"{number:.2f}"
    return f"{number:.1f}" if 10 <= abs(number) < 1000 else f"{number:.2g}" if abs(number) < 0.01 else f"{number:.4g}"
