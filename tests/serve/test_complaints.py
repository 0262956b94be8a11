"""The table of what went wrong in other servers names tests that there are."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS.parent / "docs/decisions/0018-serving.md"


def test_every_complaint_has_its_tests():
    rows = [line for line in TABLE.read_text().splitlines() if "::" in line]
    assert len(rows) == 10
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, function in named:
            assert re.search(rf"^def {function}\(", (TESTS / file).read_text(), re.MULTILINE), (file, function)
