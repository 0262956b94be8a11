"""A conversation in the terminal: what is shown, what the model is asked, and what Ctrl-C ends."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from deepseek_jax.commands.chat import HINT, converse
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.scheduler import Scheduler
from deepseek_jax.text.tokenizer import Tokenizer
from tests.flags import environment
from tests.tools.test_generate import ROOT, variant

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """As in a terminal; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Terminal(io.StringIO):
    """Lines as if they were typed."""

    def isatty(self) -> bool:
        return True


class Scripted:
    """An engine that answers what it is told to, some text a step; "^C" is a Ctrl-C in the middle of a step."""

    def __init__(self, *answers: list[str], opened: bool = False):
        self.answers, self.left, self.seeds = list(answers), [], []
        self.tokenizer = SimpleNamespace(decode=lambda ids, **how: "<think>\n" if opened else "")
        self.scheduler = SimpleNamespace(config=SimpleNamespace(max_model_len=50))

    def add(self, tokens, sampling, *, seed):
        self.left = self.answers.pop(0)
        self.seeds.append(seed)
        return len(self.answers)

    def cancel(self, request):
        cut, self.left = bool(self.left), []
        return cut

    @property
    def has_work(self):
        return bool(self.left)

    def step(self):
        text = self.left.pop(0)
        if text == "^C":
            signal.raise_signal(signal.SIGINT)
            text = "!"
        request = SimpleNamespace(stopped=True)
        live = SimpleNamespace(request=request, logprobs=[], stopped=True)
        return [SimpleNamespace(text=text, finished=not self.left, live=live)]


@pytest.fixture
def talk(monkeypatch, capsys):
    """What is shown of a conversation, its notes, and the prompts that the model gets."""

    def call(engine, typed: str, *, terminal: bool = False):
        asked = []
        encode = lambda turns: asked.append([turn["content"] for turn in turns]) or [0] * len("".join(asked[-1]))
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        monkeypatch.setenv("TERM", "xterm")
        before = signal.getsignal(signal.SIGINT)
        converse(engine, SamplingConfig(max_new_tokens=8), encode, 5)
        assert signal.getsignal(signal.SIGINT) is before
        shown = capsys.readouterr()
        return shown.out, shown.err, asked

    return call


def test_the_model_gets_the_turns_before_without_their_thoughts(talk):
    engine = Scripted(["2 and", " 2</thi", "nk>\n\n", "4"], ["so</think>", "5"], ["</think>6"], opened=True)
    shown, notes, asked = talk(engine, "2+2\n\n  \n4+1\n/clear\n6\n/exit\nnot read\n")
    assert asked == [["2+2"], ["2+2", "\n\n4", "4+1"], ["6"]]
    assert shown == "> 2 and 2\n\n4\n> > > so\n5\n> > 6\n> " and notes == f"{HINT}\n"
    assert engine.seeds == sorted(set(engine.seeds)) and engine.seeds[0] == 5


def test_on_a_terminal_thoughts_are_dim_and_what_would_be_obeyed_is_spelled_out(talk):
    answer = ["<think>a\x1b[2J", "</think>b\x07"]
    assert talk(Scripted(answer[:]), "1\n", terminal=True)[0] == "> \x1b[2ma\\x1b[2J\x1b[22m\nb\\x07\n> \n"
    assert talk(Scripted(answer[:]), "1\n", terminal=False)[0] == "> a\x1b[2J\nb\x07\n> \n"


def test_ctrl_c_ends_the_answer_after_its_step_and_what_there_is_of_it_stays(talk):
    engine = Scripted(["one ", "^C", "two"], ["yes"])
    shown, _, asked = talk(engine, "1\n2\n")
    assert shown == "> one !\n[stopped]\n> yes\n> \n" and asked[1] == ["1", "one !", "2"]


def test_a_second_ctrl_c_in_the_same_step_ends_the_program(talk):
    engine = Scripted(["a", "b"])
    step = engine.step
    engine.step = lambda: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT) or step()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        talk(engine, "1\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_a_line_is_done_ends_the_line(talk, monkeypatch):
    lines = iter(["^C", "1", None])

    def typed(prompt):
        line = next(lines)
        if line is None:
            raise EOFError
        return signal.raise_signal(signal.SIGINT) if line == "^C" else line

    monkeypatch.setattr("builtins.input", typed)
    shown, _, asked = talk(Scripted(["yes"]), "")
    assert asked == [["1"]] and shown == "\nyes\n\n"


def test_what_does_not_fit_the_context_is_one_line_and_leaves_the_turns_as_they_were(talk):
    engine = Scripted(["a"], ["b"])
    _, notes, asked = talk(engine, f"1\n{'x' * 60}\n2\n")
    assert notes.splitlines()[1:] == [
        "error: got a conversation of 62 tokens, wanted fewer than 50; /clear forgets it, or ask for less"
    ]
    assert asked[-1] == ["1", "a", "2"]


def test_a_conversation_with_a_model(folder, generate, monkeypatch):
    """The second prompt is the template's of both turns, and the blocks of the first turn, answer too, are reused."""
    asked, hits, steps = [], [], []
    add, schedule, step = Engine.add, Scheduler.schedule, Engine.step

    def planned(self):
        plan = schedule(self)
        hits.extend(at.hits for at in plan.admitted)
        return plan

    def stepped(self):
        steps.append(len(asked))
        if len(steps) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr("deepseek_jax.commands.generate._warm_up", lambda engine: None)  # needs other shapes too
    monkeypatch.setattr(Engine, "add", lambda self, ids, *of, **how: asked.append(ids) or add(self, ids, *of, **how))
    monkeypatch.setattr(Scheduler, "schedule", planned)
    monkeypatch.setattr(Engine, "step", stepped)
    question = "+".join("1" * 16) + "=?"
    monkeypatch.setattr(sys, "stdin", Terminal(f"{question}\nhello\n3+4=?\n"))
    biased = ("--min-tokens", 100, "--logit-bias", *(f"{token}=-100" for token in (0, 1, *range(3, 9), 24, 25)))
    status, shown, notes = generate(folder, "--max-tokens", 100, "--temperature", 0, *biased)
    assert status == 0 and "error: encode: got 'h', wanted text" in notes
    first, second = re.fullmatch(r"> (.*)\n\[stopped\]\n> > (.*)\n\[cut off after 100 tokens\]\n> \n", shown).groups()
    assert 20 <= len(first) <= 60 and len(second) == 100
    tokenizer = Tokenizer.from_folder(folder)
    turns = [("user", question), ("assistant", first), ("user", "3+4=?")]
    turns = [{"role": role, "content": text} for role, text in turns]
    assert asked == [tokenizer.chat(turns[:1]), tokenizer.chat(turns)]
    assert hits[0] == 0 and len(asked[0]) < hits[1] <= len(asked[0]) + len(first)


@pytest.mark.parametrize("options", [("--samples", 2), ("--json",), ("--no-chat",), ("--batch", 2)])
def test_what_a_conversation_cannot_have_is_one_line(folder, generate, monkeypatch, options):
    monkeypatch.setattr(sys, "stdin", Terminal("1\n"))
    status, text, error = generate(folder, *options)
    assert status == 1 and not text and error.count("\n") == 1
    assert f"{options[0].removeprefix('--no-').removeprefix('--')}: got" in error and "for a conversation" in error


@pytest.mark.slow
def test_in_a_terminal_of_its_own(folder, tmp_path):
    """Ctrl-C comes from the terminal, to all that run in it, and the conversation goes on; Ctrl-D ends it."""
    config = json.loads((folder / "config.json").read_text())
    long = variant(folder, tmp_path / "long", config__json=config | {"max_position_embeddings": 8192})
    biased = [f"{token}=-100" for token in (0, 1, *range(3, 9), 24, 25)]
    command = [sys.executable, "tools/generate.py", long, "--min-tokens", "6000", "--logit-bias", *biased]
    with Process(command) as process:
        process.wait_for(r"> $")
        for question in ("1+2=?", "3+4=?"):
            process.type(f"{question}\r")
            process.wait_for(r"\n[0-9+*=?;]{20,}")
            process.type("\x03")
            process.wait_for(r"\[stopped\].*> $")
        process.type("\x04")
        assert process.child.wait(timeout=60) == 0
        assert "Traceback" not in process.seen and "interrupted" not in process.seen


CONTROLLED = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Process:
    """A program in a terminal of its own."""

    def __init__(self, command: list):
        self._end, theirs = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, *map(str, command)],
            cwd=ROOT,
            env=os.environ | environment(1) | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""
        self._from = 0

    def __enter__(self):
        return self

    def __exit__(self, *of):
        self.child.kill()
        self.child.wait()
        os.close(self._end)

    def type(self, keys: str) -> None:
        self._from = len(self.seen)
        os.write(self._end, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        """Until what came since the last keys has the pattern."""
        until = time.monotonic() + seconds
        while not re.search(pattern, self.seen[self._from :], re.DOTALL):
            assert time.monotonic() < until and self.child.poll() is None, self.seen
            if select.select([self._end], [], [], 1)[0]:
                self.seen += os.read(self._end, 4096).decode(errors="replace").replace("\x1b[?2004h", "")
