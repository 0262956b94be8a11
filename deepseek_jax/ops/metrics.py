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


class Sum(NamedTuple):
    """A plain total."""

    total: jax.Array

    def value(self) -> jax.Array:
        return self.total


Metric = Mean | Max | Sum
Metrics = dict[str, Metric]


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    return Mean(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask).astype(jnp.float32))


def masked_max(values: jax.Array, mask: jax.Array) -> Max:
    return Max(jnp.max(jnp.where(mask, values, 0)))


def merge(first: Metrics, second: Metrics) -> Metrics:
    """Metrics of two parts of a batch as metrics of both."""
    return {name: _merge_one(value, second[name]) for name, value in first.items()}


def _merge_one(a: Metric, b: Metric) -> Metric:
    return Max(jnp.maximum(a.largest, b.largest)) if isinstance(a, Max) else jax.tree.map(jnp.add, a, b)


def values(metrics: Metrics) -> dict[str, float]:
    """Plain numbers, for logs."""
    numbers = jax.device_get({name: metric.value() for name, metric in metrics.items()})
    return {name: number.item() for name, number in numbers.items()}
