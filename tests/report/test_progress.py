import io
import re
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from deepseek_jax.report.progress import Progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    total: int, start: int = 0, *, terminal: bool = False, width: int = 200, **kwargs
) -> tuple[Progress, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    return Progress(total, "grpo", start, console=console, clock=clock, **kwargs), clock, out


def test_plain_lines_are_few_however_many_steps():
    progress, clock, out = make(10_000)
    with progress:
        for step in range(1, 10_001):
            clock.now += 0.001
            progress.update(step, reward=step / 10_000)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10000", *(f"{k}000/10000" for k in range(1, 11))]
    assert lines[-1] == "grpo 10000/10000  1000.0 steps/s  elapsed 0:10  left 0:00  reward 1.00"


def test_slow_steps_print_after_the_longest_silence():
    progress, clock, out = make(1000, seconds=30)
    with progress:
        for step in range(1, 10):
            clock.now += 10
            progress.update(step)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == [f"{s}/1000" for s in (1, 4, 7, 9)]


def test_speed_and_time_left_leave_out_the_steps_before_a_resume():
    progress, clock, _ = make(100, start=90)
    with progress:
        assert progress.steps_per_second() is None
        clock.now += 4
        progress.update(92)
        assert progress.steps_per_second() == pytest.approx(0.5)
        assert progress.seconds_left() == pytest.approx(16)


def test_a_slow_first_step_is_forgotten():
    progress, clock, _ = make(1000)
    with progress:
        clock.now += 60
        progress.update(1)
        for step in range(2, 40):
            clock.now += 0.5
            progress.update(step)
    assert progress.steps_per_second() == pytest.approx(2.0)


def test_the_bar_shows_step_speed_and_metrics():
    progress, clock, out = make(10, terminal=True)
    with progress:
        clock.now += 2
        progress.update(1, reward=0.834, accuracy=0.71)
        progress.note("loss [0] is right here")
    shown = out.getvalue()
    assert "1/10" in shown and "2.0 s/step" in shown and "left 0:18" in shown
    assert "reward 0.83  accuracy 71 %" in shown
    assert "loss [0] is right here" in shown


class Screen:
    """What a terminal shows of what is written to it: rows of so many columns, wrapped where a line is longer."""

    def __init__(self, width: int):
        self.width, self.rows, self.row, self.column = width, [{}], 0, 0

    def write(self, text: str) -> None:
        for move, count, kind, letter in re.findall(r"(\x1b\[)\??([0-9;]*)([A-Za-z])|(.|\n)", text, re.DOTALL):
            if move:
                self._move(kind, int(count or 1) if count.isdecimal() or not count else 1)
            elif letter == "\r":
                self.column = 0
            elif letter == "\n":
                self._to(self.row + 1, 0)
            else:
                if self.column + cell_len(letter) > self.width:
                    self._to(self.row + 1, 0)
                self.rows[self.row][self.column] = letter
                self.column += cell_len(letter)

    def _move(self, kind: str, count: int) -> None:
        if kind == "A":
            self.row -= count
        elif kind == "K":
            self.rows[self.row] = {}

    def _to(self, row: int, column: int) -> None:
        self.row, self.column = row, column
        self.rows += [{} for _ in range(row + 1 - len(self.rows))]

    def lines(self) -> list[str]:
        """The rows on which something can be seen."""
        return [text for row in self.rows if (text := "".join(row[column] for column in sorted(row))).strip()]


@pytest.mark.parametrize("name", ["grpo", "cold_start", "a very long description of what is done", "\u6f22" * 15])
@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_one_line_at_any_width(width, name):
    progress, clock, out = make(10_000, terminal=True, width=width)
    progress.description = name
    with progress:
        for step in (1, 2, 700):
            clock.now += 2.1
            progress.update(step, reward=0.83, length=41.2, accuracy=0.71, kl=0.0012, entropy=0.26, last="x" * 15)
            progress._bar.refresh()
    screen = Screen(width)
    screen.write(out.getvalue())
    assert len(screen.lines()) == 1 and cell_len(screen.lines()[0].rstrip()) < width, screen.lines()


def test_notes_stay_above_the_line():
    progress, clock, out = make(10, terminal=True, width=40)
    with progress:
        for step in (1, 2):
            clock.now += 1
            progress.update(step, reward=0.5)
            progress.note(f"note {step} " + "y" * 50)
    screen = Screen(40)
    screen.write(out.getvalue())
    assert [line[:8].strip() for line in screen.lines()] == ["note 1 y", "y" * 8, "note 2 y", "y" * 8, "grpo  2/"]


def test_a_bar_on_standard_error_leaves_standard_output_alone():
    """It may be a file."""
    before = sys.stdout
    with Progress(2, "grpo", console=Console(stderr=True, force_terminal=True)):
        assert sys.stdout is before


def test_what_is_written_aside_stays_above_the_line():
    """By others, who know nothing of the bar."""
    progress, clock, out = make(10, terminal=True, width=40)
    with progress:
        for step in (1, 2):
            clock.now += 1
            progress.update(step, reward=0.5)
            with progress.aside():
                out.write(f"text {step} " + "y" * 50 + "\r\n")
    screen = Screen(40)
    screen.write(out.getvalue())
    assert [line[:8].strip() for line in screen.lines()] == ["text 1 y", "y" * 8, "text 2 y", "y" * 8, "grpo  2/"]


@pytest.mark.parametrize(
    ("width", "there", "missing"),
    [
        (20, ["grpo", "1/200"], ["left", "reward", "kl"]),
        (40, ["grpo", "1/200", "2.1 s/step", "left 6:58"], ["reward", "kl"]),
        (80, ["grpo", "1/200", "2.1 s/step", "left 6:58", "reward 0.83", "accuracy 71 %"], []),
        (200, ["grpo", "1/200", "2.1 s/step", "left 6:58", "accuracy 71 %", "kl 0.0012", "0:02"], []),
    ],
)
def test_a_narrow_line_keeps_what_matters_most(width, there, missing):
    progress, clock, _ = make(200, terminal=True, width=width)
    clock.now += 2.1
    progress.update(1, reward=0.83, length=41.2, accuracy=0.71, kl=0.0012)
    line = progress._line().plain
    assert all(text in line for text in there) and not any(text in line for text in missing), line


def test_the_bar_fills():
    progress, _, _ = make(10, terminal=True, width=100)
    cells = []
    for step in (0, 5, 10):
        progress.update(step)
        cells.append(progress._line().plain.count("\u2501"))
    assert cells == [0, 12, 24]


def test_metrics_are_text_and_never_markup():
    for terminal in (False, True):
        progress, clock, out = make(10, terminal=terminal)
        with progress:
            clock.now += 1
            progress.update(1, last="[red]7[/red] [/]")
        assert "last [red]7[/red] [/]" in out.getvalue()


def test_an_early_end_prints_where_it_stopped():
    progress, clock, out = make(1000)
    with pytest.raises(KeyboardInterrupt), progress:
        for step in (1, 2, 3):
            clock.now += 1
            progress.update(step)
        raise KeyboardInterrupt
    assert out.getvalue().splitlines()[-1].startswith("grpo 3/1000")


@pytest.mark.parametrize(("total", "start"), [(0, 0), (10, 11), (10, -1)])
def test_impossible_steps_are_refused(total: int, start: int):
    with pytest.raises(ValueError, match="0 <= start <= total"):
        make(total, start)
