"""Reward functions of one's own, named as FILE.py:function on the command line."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.own_code import run_file
from deepseek_jax.rewards.protocol import RewardFunction


class OwnReward(NamedTuple):
    """A function of a file, not loaded yet: the same for the same `text` and `digest`, the content's."""

    file: Path
    function: str
    weight: float
    digest: str

    @property
    def text(self) -> str:
        """As `--reward` takes it."""
        return f"{self.file}:{self.function}:{self.weight!r}"

    def load(self) -> RewardFunction:
        """The function. The file is run as any module is: it is the user's own code.

        Raises:
            ValueError: the file raises something, or has no such function.
        """
        name = f"_reward_{self.digest}"
        module = run_file(self.file, name, kind="reward")
        function = getattr(module, self.function, None)
        if not callable(function):
            there = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
            wanted = f"one of {', '.join(there)}" if there else "it defined there"
            raise ValueError(f"reward: {self.file}: no function {self.function!r}, wanted {wanted}")
        return function


def own_rewards(texts: Sequence[str]) -> list[OwnReward]:
    """What `--reward` names, checked but not loaded.

    Args:
        texts: FILE.py:function or FILE.py:function:weight.

    Raises:
        ValueError: another form, no such file, or two functions of one name, under which their numbers are reported.
    """
    found = [_parsed(text) for text in texts]
    names = [own.function for own in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"reward: got {twice[0]!r} twice, under which its numbers are reported; rename one")
    return found


def _parsed(text: str) -> OwnReward:
    head, colon, last = text.rpartition(":")
    weight = _number(last) if ":" in head else None
    name, colon, function = (head if weight is not None else text).rpartition(":")
    if not colon or not function.isidentifier() or (weight is not None and not math.isfinite(weight)):
        raise ValueError(f"reward: got {text!r}, wanted FILE.py:function, or FILE.py:function:weight")
    file = Path(name)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"reward: {file}: no such .py file; wanted FILE.py:function")
    digest = hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
    return OwnReward(file.resolve(), function, 1.0 if weight is None else weight, digest)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
