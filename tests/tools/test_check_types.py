"""Examples that use an exported name otherwise than its signature says are found."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.check_types import ROOT, examples, main

needs_ty = pytest.mark.skipif(find_spec("ty") is None, reason="needs the type checker: pip install -e '.[test]'")


def page(folder: Path, code: str) -> Path:
    folder.joinpath("page.md").write_text(f"# A page\n\n```python\nimport deepseek_jax as dsj\n\n{code}\n```\n")
    return folder / "page.md"


def test_every_python_block_is_an_example():
    assert examples("```python\na\n```\ntext\n```bash\nb\n```\n```python\nc\nd\n```\n") == ["a\n", "c\nd\n"]
    text = (ROOT / "docs/api.md").read_text()
    assert len(examples(text)) == text.count("```python") > 5


def test_a_page_without_examples_is_refused(tmp_path, capsys):
    (tmp_path / "page.md").write_text("nothing")
    assert main(tmp_path / "page.md") == 1
    assert "wanted examples" in capsys.readouterr().err


@needs_ty
@pytest.mark.parametrize("code", ['dsj.preset("tiny")', "dsj.combine({'a': dsj.accuracy_reward}, {'a': 1.0})"])
def test_right_calls_pass(tmp_path, code):
    assert main(page(tmp_path, code)) == 0


@needs_ty
@pytest.mark.parametrize("code", ["dsj.preset(1)", 'dsj.preset("tiny", size=3)', 'dsj.preset("tiny").hidden'])
def test_wrong_calls_are_found(tmp_path, code):
    assert main(page(tmp_path, code)) == 1
