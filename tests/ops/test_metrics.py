"""Metrics of parts add up to the metrics of the whole."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops.metrics import Max, Mean, Sum, masked_max, masked_mean, merge, values


def metrics(x, mask):
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    return {"mean": masked_mean(x, mask), "max": masked_max(x, mask), "tokens": Sum(jnp.sum(mask))}


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 7))
def test_no_split_changes_what_is_reported(seed, cut):
    rng = np.random.default_rng(seed)
    x, mask = rng.random((8, 5)).astype(np.float32), rng.random((8, 5)) < 0.5
    mask[0, 0] = True
    whole = values(metrics(x, mask))
    parts = values(merge(metrics(x[:cut], mask[:cut]), metrics(x[cut:], mask[cut:])))
    assert whole["mean"] == pytest.approx(x[mask].mean(), rel=1e-6)
    assert whole["max"] == x[mask].max() and whole["tokens"] == mask.sum()
    assert parts == pytest.approx(whole, rel=1e-6)


def test_a_mean_of_nothing_is_zero():
    assert values(metrics(np.ones((2, 2), np.float32), np.zeros((2, 2), bool)))["mean"] == 0.0


def test_masked_values_may_be_anything():
    x = jnp.asarray([1.0, jnp.nan, jnp.inf, 3.0])
    mask = jnp.asarray([True, False, False, True])
    assert values({"mean": masked_mean(x, mask), "max": masked_max(x, mask)}) == {"mean": 2.0, "max": 3.0}


def test_each_kind_merges_in_its_own_way():
    one = {"a": Mean(jnp.float32(6), jnp.float32(3)), "b": Max(jnp.float32(-5)), "c": Sum(jnp.float32(1))}
    two = {"a": Mean(jnp.float32(2), jnp.float32(1)), "b": Max(jnp.float32(-7)), "c": Sum(jnp.float32(2))}
    assert values(merge(one, two)) == {"a": 2.0, "b": -5.0, "c": 3.0}
