"""Runs tests against a program that lives in another sandbox; stands inside the first of two linked ones.

It never runs the program: the program's names are stand-ins (`proxies`). On standard error it tells what came of each
test, one line each: 1 passed, 0 failed, ? that the tests themselves are at fault; and, before these, how far it came:
p the program has answered, < the setup asks the program, s the setup has run. A line that begins with
! says in words what is wrong with the tests.
"""

import importlib.machinery
import json
import os
import sys
import types

from deepseek_jax.rewards.sandbox.peer import Ended, Peer
from deepseek_jax.rewards.sandbox.proxies import RemoteType, same_object


class Judge(Peer):
    """The tests' end of the line."""

    def __init__(self, reader: int, writer: int, verdicts: int, config: dict) -> None:
        super().__init__(reader, writer, guarded=True)
        self.verdicts = verdicts
        self.config = config
        self.failure = ""
        self.in_setup = False
        self.heard = False
        self.namespace: dict[str, object] = {}
        self.names: dict[str, str] = dict(config["names"])

    def run(self) -> None:
        module = types.ModuleType("checks")
        sys.modules["checks"] = module
        self.namespace = vars(module)
        self.namespace["_same_object"] = same_object
        self._bind()
        self._tell("p")
        given = dict(self.namespace)
        self.in_setup = True
        for source in self.config["setup"]:
            self._set_up(source, module)
        self.in_setup = False
        # What the setup has defined after all, as `from math import *` does, is not the program's.
        for local in [local for local in self.names if self.namespace.get(local) is not given.get(local)]:
            del self.names[local]
        self._tell("s")
        for test in self.config["tests"]:
            self._tell(self._verdict(test))
        os._exit(0)

    def ask(self, do: str, on: int | None, args: object, kwargs: dict | None = None) -> object:
        if not self.in_setup:
            return super().ask(do, on, args, kwargs)
        self.heard = True
        self._tell("<")
        return super().ask(do, on, args, kwargs)

    def _bind(self) -> None:
        """Gives the tests the program's names as they are now; a name that it does not define is not there."""
        for local, name in self.names.items():
            try:
                value = self.ask("get", None, [name])
            except Ended:
                return
            except BaseException:  # the program may raise anything at all where its name is looked up
                self.namespace.pop(local, None)
                continue
            self.namespace[local] = value
            if isinstance(value, RemoteType) and local in self.config["classes"]:
                self.classes_of_tests.add(vars(value)["_number"])

    def _set_up(self, source: str, module: types.ModuleType) -> None:
        try:
            _Text(source).exec_module(module)
        except BaseException as error:  # a setup may exit too
            # Where the setup used the program, what it got may be why.
            if not (self.ended or self.heard or self._is_programs(error) or self.failure):
                self.failure = f"setup: {source[:80]!r}: {type(error).__name__}: {error}"
                self._complain(self.failure)

    def _verdict(self, source: str) -> str:
        module, before = types.ModuleType("checks"), 0
        try:
            if not self.ended:
                self._bind()
            before = self.received
            vars(module).update(self.namespace, __name__="checks")
            _Text(source).exec_module(module)
        except BaseException as error:  # a program's SystemExit is a failed test like any other
            if self.ended or self._has_crossed(error) or not (self.failure or self._is_tests(error, before)):
                return "0"
            if not self.failure:
                self._complain(f"{source[:80]!r}: {type(error).__name__}: {error}")
            return "?"
        return "0" if self.ended else "1"

    def _is_programs(self, error: BaseException) -> bool:
        """Whether the program raised, or lacks what was asked of it."""
        return self._has_crossed(error) or (isinstance(error, NameError) and error.name in self.names)

    def _has_crossed(self, error: BaseException) -> bool:
        return any(error is crossed for crossed in self.crossed)

    def _is_tests(self, error: BaseException, before: int) -> bool:
        """Whether tests fail by themselves: a library is not here, or memory ran out before the program spoke."""
        return isinstance(error, ImportError) or (isinstance(error, MemoryError) and self.received == before)

    def _complain(self, text: str) -> None:
        self._tell("!" + " ".join(text.split())[:300])

    def _tell(self, line: str) -> None:
        os.write(self.verdicts, line.encode(errors="backslashreplace") + b"\n")


class _Text(importlib.machinery.SourceFileLoader):
    """Runs a source as part of the module `checks`."""

    def __init__(self, source: str) -> None:
        super().__init__("checks", "checks.py")
        self.source = source

    def get_data(self, path: str) -> bytes:
        return self.source.encode("utf-8", "surrogatepass")

    def path_stats(self, path: str) -> dict:
        raise OSError  # no file, no cached bytecode


def main() -> None:
    """Runs the tests of judge.json."""
    with open("judge.json") as file:
        config = json.load(file)
    reader, writer, verdicts = os.dup(0), os.dup(1), os.dup(2)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    Judge(reader, writer, verdicts, config).run()
