"""Which of the processes this one is, and how it speaks to whoever started it."""

import sys
import unicodedata
from typing import Literal

import jax
from jax._src import distributed

START_SECONDS = 300  # what a process waits for the others at its start, and for a value that they are to give
_OF_TEXT = "\n\t\u200c\u200d"  # joiners: Persian is spelled with the one, families of emoji are made by the other


def process_count() -> int:
    """Processes of this program. Starts no backend, unlike `jax.process_count`."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process prints, and writes what is written once."""
    return process_index() == 0


def main_host() -> str:
    """Where process 0 is, among several."""
    return distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")


def say(text: str, *, kind: Literal["error", "warning"] = "error") -> None:
    """An error or a warning on standard error, with the number of the process where there are several."""
    where = f"process {process_index()}: " if process_count() > 1 else ""
    print(printable(f"{kind}: {where}{text}"), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text with its control characters spelled out, all but line ends and tabs: a terminal would obey them.

    Names of files and tensors and values of configurations come from others. So do marks of writing direction, which
    make a line read as another, and halves of surrogate pairs, which cannot be printed.

    >>> print(printable(chr(27) + "[31mred, ü and 漢"))
    \\x1b[31mred, ü and 漢
    """
    kept = lambda of: of in _OF_TEXT or of.isprintable() or unicodedata.category(of) == "Zs"
    return "".join(of if kept(of) else repr(of)[1:-1] for of in text)
