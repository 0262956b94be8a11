import io

import pytest
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


def test_a_narrow_terminal_cuts_nothing_off():
    progress, clock, out = make(200, terminal=True, width=80)
    with progress:
        clock.now += 2.1
        progress.update(1, reward=0.83, length=41.2, accuracy=0.71, kl=0.0012)
    shown = out.getvalue()
    for text in (
        "1/200",
        "2.1 s/step",
        "left 6:58",
        "reward 0.83",
        "length 41.2",
        "accuracy 71 %",
        "kl 0.0012",
    ):
        assert text in shown


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
