"""Whether the tests have the same names whenever they are collected.

    python tools/same_tests.py [FOLDER ...]

pytest-xdist refuses to run when two of its workers collect other tests, and a name is made of the values that a test
is given. So no such value may hold a time, a random number, a set's order, an address or a temporary path. This
collects twice, one after the other (so that every clock has moved on), with other hash seeds and other folders for
temporary files; prints each name that only one of the two has; and ends with 1 where there is any.
"""

import os
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest


def names(folders: list[str], *, hash_seed: int) -> list[str]:
    """The names of all tests below these folders, in order.

    Raises:
        RuntimeError: pytest cannot collect them.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", *folders]
    with tempfile.TemporaryDirectory(prefix=f"same-tests-{hash_seed}-") as place:
        env = {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONHASHSEED": str(hash_seed), "TMPDIR": place}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def main(folders: list[str]) -> int:
    """Collects twice, compares, and gives the exit status."""
    try:
        first = names(folders, hash_seed=1)
        time.sleep(1)  # a second apart even where collecting takes less
        second = names(folders, hash_seed=2)
    except RuntimeError as problem:
        print(f"error: the tests cannot be collected: {problem}", file=sys.stderr)
        return 1
    others = [pair for pair in zip_longest(first, second, fillvalue="(none)") if pair[0] != pair[1]]
    for one, other in others[:20]:
        print(f"collected first:  {one}\ncollected second: {other}")
    advice = "give their values plain ids, by pytest.param(..., id=...)"
    verdict = f"{len(others)} differ; {advice}" if others else "the same"
    print(f"{len(first)} tests collected twice: {verdict}")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["tests"]))
