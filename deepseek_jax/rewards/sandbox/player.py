"""Runs the program and answers the judge's questions about it; stands inside the second of two linked sandboxes.

It never sees a test. What the program does to this process changes how it answers, and nothing else.
"""

import importlib
import importlib.machinery
import io
import json
import os
import re
import sys
import types

from deepseek_jax.rewards.sandbox.peer import Peer

_MAX_OUTPUT = 1 << 20


class Player(Peer):
    """The program's end of the line."""

    def __init__(self, reader: int, writer: int, keywords: list[str]) -> None:
        super().__init__(reader, writer, guarded=False)
        self.keywords = keywords
        self.stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace", write_through=True)
        self.captured = self._take_output

    def get(self, target: object, name: str) -> object:
        if target is not self.root:
            return getattr(target, name)
        return entry_point(target, name, self.keywords)

    def answer(self, request: dict) -> None:
        stream = sys.stdout
        if request.get("out"):
            sys.stdout = self.stream
        try:
            super().answer(request)
        finally:
            sys.stdout = stream

    def _take_output(self) -> str:
        raw = self.stream.buffer
        text = raw.getvalue().decode(errors="replace")
        raw.seek(0)
        raw.truncate()
        return text[:_MAX_OUTPUT]


def entry_point(program: object, name: str, keywords: list[str]) -> object:
    """What a program has under a name; `Solution().f` is that method, and of `Solution().` the method that answers.

    That is its only public method, else the one that takes the keywords by which tests call it, else the first that
    no other method calls.
    """
    match = re.fullmatch(r"(\w+)\(\)\.(\w*)", name)
    if match is None or not hasattr(program, match[1]):
        # A plain function of that name does as well.
        return getattr(program, name if match is None else match[2])
    kind = getattr(program, match[1])
    if match[2]:
        return getattr(kind(), match[2])
    inspect = importlib.import_module("inspect")
    names = [key for key, value in vars(kind).items() if callable(value) and not key.startswith("_")]
    fitting = [key for key in names if set(keywords) <= set(inspect.signature(vars(kind)[key]).parameters)]
    called = {key for value in vars(kind).values() for key in getattr(getattr(value, "__code__", None), "co_names", ())}
    chosen = [key for key in fitting or names if key not in called] or fitting or names
    if not chosen:
        raise AttributeError(f"{match[1]} has no public method")
    return getattr(kind(), chosen[0])


def main() -> None:
    """Loads solution.py and serves until the judge has ended."""
    with open("player.json") as file:
        config = json.load(file)
    reader, writer = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    player = Player(reader, writer, config["keywords"])
    program = types.ModuleType("solution")
    sys.modules["solution"] = program
    sys.path.insert(0, "/tmp")
    # A name that is not __main__: the demonstrations that models append do not run.
    if config["prelude"]:
        importlib.machinery.SourceFileLoader("solution", "prelude.py").exec_module(program)
    importlib.machinery.SourceFileLoader("solution", os.path.abspath("solution.py")).exec_module(program)
    player.root = program
    player.serve()
    os._exit(0)
