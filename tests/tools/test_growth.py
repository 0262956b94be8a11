"""tools/growth.py: exponents, crossings, and that a point can be measured."""

import math
from types import SimpleNamespace

import jax
import pytest

from deepseek_jax.config import preset
from deepseek_jax.plan.model_flops import prefill_flops
from tools import growth
from tools.growth import Setting, exponents, first_where


def test_an_exponent_of_a_sum_is_between_those_of_its_parts_and_the_last_nearer_to_the_larger():
    values = [2.0**n for n in range(8)]
    fitted, last = exponents(values, [100 * v + v**2 for v in values])
    assert 1 < fitted < last < 2
    assert math.isclose(exponents(values, [7 * v**1.5 for v in values])[0], 1.5, abs_tol=1e-3)


@pytest.mark.parametrize("least", [1, 2, 77, 1 << 20])
def test_the_first_number_from_which_something_holds(least):
    assert first_where(lambda n: n >= least) == least


def test_what_never_holds():
    assert first_where(lambda n: False) is None


def test_attention_overtakes_where_its_flops_do():
    config = preset("r1-671b")
    at = first_where(lambda n: growth._attends_more(prefill_flops(config, 1, n)))
    for tokens, more in ((at - 1, False), (at, True), (2 * at, True)):
        flops = prefill_flops(config, 1, tokens)
        assert (2 * flops.attention > flops.total) == more


def test_a_table_of_crossings(capsys):
    growth.crossings(models=("v2-lite",))
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_a_table_has_the_seconds_that_points_give(monkeypatch, capsys):
    cost = lambda at: at.context * at.experts**0.5 * at.batch**2 * at.layers
    monkeypatch.setattr(growth, "_call", lambda step, at: lambda: cost(at))
    growth.measured(rounds=1, longest=4096)
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    wanted = {"context": "1.00", "experts": "0.50", "batch": "2.00", "layers": "1.00"}
    assert len(rows) == 9 and all(row[4:6] == [wanted[row[2]]] * 2 for row in rows)
    with pytest.raises(ValueError, match="longest: got 2048, wanted at least 4096"):
        growth.measured(longest=2048)


def test_what_a_compiler_counts_is_asked_up_to_the_longest(monkeypatch, capsys):
    """A point that does not fit has no figures, and leaves the others' exponent."""
    asked = []

    def compile_step(task, chip):
        asked.append(task)
        fits = task.context < 32_768 or task.step == "decode"
        return SimpleNamespace(flops=task.context * task.batch if fits else None, bytes_accessed=1.0)

    monkeypatch.setattr(growth, "compile_step", compile_step)
    monkeypatch.setattr(growth, "device_topology", lambda name: (name, jax.devices()[:1]))
    growth.compiled(topology="one", longest=32_768)
    contexts = lambda step: [of.context for of in asked if of.step == step and of.context != 4096]
    assert contexts("prefill") == contexts("decode") == [1024, 16_384, 32_768] and contexts("train") == [1024, 8192]
    layers = sorted({of.config.num_hidden_layers for of in asked})
    assert layers == [2, 8, 16] and {of.batch for of in asked} == {1, 4, 16, 64, 8}
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    prefill = next(row for row in rows if row[1:3] == ["prefill FLOPs", "context"])
    assert "32768" not in prefill[3] and prefill[4:6] == ["1.00", "1.00"]
    assert next(row for row in rows if row[1:3] == ["decode FLOPs", "context"])[3].endswith("32768: 2.62e+05")
    with pytest.raises(ValueError, match="longest: got 8192, wanted at least 16384"):
        growth.compiled(longest=8192)


@pytest.mark.parametrize("step", ["prefill", "decode", "train"])
def test_a_point_is_measured(step):
    assert growth._call(step, Setting(context=16, experts=4, batch=2, layers=1))() > 0
