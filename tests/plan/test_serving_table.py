"""The table of docs/serving.md of what fits where: every row is the planner's, and its options are the command's."""

import re
from pathlib import Path

import pytest

from deepseek_jax.commands.serve_settings import Config
from deepseek_jax.commands.settings_file import options_of
from deepseek_jax.config import preset
from deepseek_jax.plan.chips import chip as chip_of
from deepseek_jax.plan.planner import plan

DOCS = Path(__file__).resolve().parents[2] / "docs/serving.md"
ROW = re.compile(r"^\| ([a-z0-9.-]+) \| (\d+) x ([a-z0-9]+) \| (.*?) \| (\d+) \| (.*?) \| ([\d,]+) \|$", re.MULTILINE)
ROWS = ROW.findall(DOCS.read_text())


def row(model: str, chip: str, options: str) -> tuple[str, ...]:
    """As the planner has it, for the weights that the options name."""
    quantization = re.search(r"--quantization (\w+)", options)
    found = plan(model, preset(model), chip_of(chip), dtype=quantization[1] if quantization else None)
    assert found.fits
    sizes = {
        "--mesh-tensor": found.mesh["tensor"],
        "--mesh-expert": found.mesh["expert"],
        "--mesh-data": found.mesh["data"],
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    words += [quantization[0]] if quantization else []
    held = f"{found.memory.total / 1e9:.1f} of {found.hbm / 1e9:.0f} GB"
    told = f"`{' '.join(words)}`" if words else ""
    return model, str(found.chips), chip, told, str(found.batch), held, f"{found.tokens_per_second:,.0f}"


@pytest.mark.parametrize("known", ROWS, ids=lambda known: "-".join(known[:3]))
def test_a_row_is_the_planners(known):
    assert row(known[0], known[2], known[3]) == known


def test_the_options_are_the_commands():
    options = {name for known in ROWS for name in re.findall(r"--([a-z-]+)", known[3])}
    assert len(ROWS) >= 12 and options
    assert {name.replace("-", "_") for name in options} <= options_of(Config).keys()
