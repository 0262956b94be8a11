"""Bounds of rounding hold for what NumPy computes in float32 and bfloat16, and are no more than that needs."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.testing.rounding import UNITS, Near, exact, product, silu, silu_slope, softmax

DOC = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    """Of many magnitudes."""
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=shape) * 2.0 ** rng.uniform(-6, 2, shape)


def parts(got: np.ndarray, near: Near) -> np.ndarray:
    """Errors as parts of their bounds."""
    apart = np.abs(got.astype(np.float64) - near.value)
    return np.where(apart == 0, 0, apart / np.where(near.error == 0, 1e-300, near.error))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def off_by(unit: float) -> tuple[np.ndarray, Near]:
    """Numbers that are off by as much as is said of them, on either side."""
    x = np.linspace(-25, 25, 4001)
    side = np.where(np.arange(len(x)) % 2, 1, -1)
    return x + side * unit * np.abs(x), Near(x, unit * np.abs(x))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_a_dtype(kind):
    x = numbers(1000)
    found = parts(x.astype(KINDS[kind]), exact(x).rounded(UNITS[kind]))
    assert 0.9 < found.max() <= 1


@pytest.mark.parametrize(("kind", "least"), [("float32", 0.05), ("bfloat16", 0.2)])
def test_products_of_rounded_numbers_whose_sums_cancel(kind, least):
    x, w = numbers(40, 16), numbers(40, 16, 12, seed=1)
    w[:, 8:] = -w[:, :8] * (x[:, :8] / x[:, 8:])[..., None]  # only roundings are left
    near = product("wk,wkn->wn", *(exact(of).rounded(UNITS[kind]) for of in (x, w)))
    one, other = (of.astype(KINDS[kind]).astype(np.float32) for of in (x, w))
    found = parts(np.einsum("wk,wkn->wn", one, other), near)
    assert np.all(np.abs(near.value) < 1e-9) and least < found.max() <= 1


def test_sums_and_products_in_float32():
    x, y = (numbers(1000, seed=seed).astype(np.float32) for seed in (0, 1))
    a, b = exact(x), exact(y)
    for got, near in ((x + y, a + b), (x - y, a - b), (x * y, a * b), (x * y * x, a * b * a)):
        assert 0.3 < parts(got, near).max() <= 1


@pytest.mark.parametrize("unit", UNITS.values())
def test_silu_of_what_is_off(unit):
    x, near = off_by(unit)
    value, slope = x * sigmoid(x), sigmoid(x) * (1 + x * (1 - sigmoid(x)))
    for found in (parts(value, silu(near)), parts(slope, silu_slope(near))):
        assert found.max() <= 1 and (found.max() > 0.7 or unit == UNITS["float32"])  # where functions round as well


def test_silu_in_float32():
    x = np.linspace(-60, 60, 6001, dtype=np.float32)
    s = sigmoid(x)
    assert parts(x * s, silu(exact(x))).max() <= 1
    assert parts(s + x * s * (1 - s), silu_slope(exact(x))).max() <= 1


@pytest.mark.parametrize("off", [0.0, 2.0**-8, 0.05])
def test_softmax_of_scores_that_are_off(off):
    rng = np.random.default_rng(2)
    scores, mask = 4 * rng.normal(size=(200, 9)), rng.random((200, 9)) < 0.5
    mask[:, 0] = True
    given = (scores + off * np.sign(rng.normal(size=scores.shape))).astype(np.float32)
    top = np.where(mask, given, -np.inf).max(axis=-1, keepdims=True)
    terms = np.where(mask, np.exp(given - top), 0).astype(np.float32)
    weights, log_sum = softmax(Near(scores, np.full(scores.shape, off)), mask)
    assert parts((terms / terms.sum(axis=-1, keepdims=True))[mask], weights[mask]).max() <= 1
    assert not weights.error[~mask].any()
    assert parts(top + np.log(terms.sum(axis=-1, keepdims=True)), log_sum).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_the_documentation(kind):
    of = {}
    exec(re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)[1], of)
    rounded = lambda x: x.astype(KINDS[kind]).astype(np.float32)
    x, gate, up = (rounded(numbers(*shape, scale=1.0)) for shape in ((9, 8), (8, 16), (8, 16)))
    gated, raised = (rounded(x @ matrix) for matrix in (gate, up))
    got = rounded(gated * sigmoid(gated) * raised)
    x, gate, up = (x.astype(np.float64) for x in (x, gate, up))
    want = x @ gate * sigmoid(x @ gate) * (x @ up)
    assert 0.02 < parts(got, Near(want, of["bound"](UNITS[kind], x, gate, up))).max() <= 1
