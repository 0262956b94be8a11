"""Metrics as unreduced sums and counts, so that no split of a batch changes what is reported."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """A total and what it is to be divided by; means of parts add up to the mean of the whole."""

    total: jax.Array
    count: jax.Array

    def value(self) -> jax.Array:
        return self.total / jnp.maximum(self.count, 1)


class Max(NamedTuple):
    """The largest value seen."""

    largest: jax.Array

    def value(self) -> jax.Array:
        return self.largest


class Min(NamedTuple):
    """The smallest value seen; infinity while there is none, which reads as 0 like the mean of nothing."""

    smallest: jax.Array

    def value(self) -> jax.Array:
        return jnp.where(jnp.isposinf(self.smallest), 0.0, self.smallest)


class Sum(NamedTuple):
    """A plain total."""

    total: jax.Array

    def value(self) -> jax.Array:
        return self.total


class BatchTotals(NamedTuple):
    """Samples and counted tokens of a whole batch: what a loss over a part of it divides its sums by, float32 scalars.

    A loss made so adds up over parts, however the batch is cut. high_entropy: those of the tokens that are of high
    entropy, where a loss tells them apart.
    """

    samples: jax.Array
    tokens: jax.Array
    high_entropy: jax.Array | None = None


Metric = Mean | Max | Min | Sum
Metrics = dict[str, Metric]


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """The mean of the values where the mask is True. Where it is False they are ignored (they may be NaN)."""
    return Mean(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask).astype(jnp.float32))


def masked_max(values: jax.Array, mask: jax.Array) -> Max:
    """The largest of the values where the mask is True, 0 at least. Where it is False they are ignored."""
    return Max(jnp.max(jnp.where(mask, values, 0)))


def masked_min(values: jax.Array, mask: jax.Array) -> Min:
    """The smallest of the values where the mask is True. Where it is False they are ignored."""
    return Min(jnp.min(jnp.where(mask, values, jnp.inf)))


def merge(first: Metrics, second: Metrics) -> Metrics:
    """Metrics of two parts of a batch as metrics of both."""
    return {name: _merge_one(value, second[name]) for name, value in first.items()}


def _merge_one(a: Metric, b: Metric) -> Metric:
    if isinstance(a, Max):
        return Max(jnp.maximum(a.largest, b.largest))
    if isinstance(a, Min):
        return Min(jnp.minimum(a.smallest, b.smallest))
    return jax.tree.map(jnp.add, a, b)


def values(metrics: Metrics) -> dict[str, float]:
    """Plain numbers, for logs."""
    numbers = jax.device_get({name: metric.value() for name, metric in metrics.items()})
    return {name: number.item() for name, number in numbers.items()}
