"""Whether the examples of docs/api.md use the exported names as their signatures say, by a static type checker.

    python tools/check_types.py [PAGE]

Each example becomes a file of its own, and ty checks these: it follows their imports for the signatures that a user
meets, and says nothing of the package's inside. There it has some hundreds of remarks and none that helps, since it
sees no array's shape, no configuration of which a function knows the kind, and nothing of what tracing makes of code.
The exit status is ty's.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A field that only some kinds of model have is looked up in the union of all kinds.
IGNORED = ("--ignore", "missing-union-attribute")


def examples(page: str) -> list[str]:
    """The Python blocks of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def main(page: Path) -> int:
    """Checks the examples of a page and gives the exit status."""
    found = examples(page.read_text(encoding="utf-8"))
    if not found:
        print(f"error: {page}: got no Python block, wanted examples", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for number, example in enumerate(found, 1):
            Path(folder, f"example_{number}.py").write_text(example, encoding="utf-8")
        where = ["--python", sys.prefix, "--extra-search-path", str(ROOT)]
        command = [sys.executable, "-m", "ty", "check", *where, *IGNORED, "--output-format", "concise", folder]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs/api.md"))
