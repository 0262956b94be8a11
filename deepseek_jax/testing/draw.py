"""The arguments of an example: numbers of several kinds, and what stands where nothing may look."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

NUMBERS = ("normal", "whole", "equal", "zeros", "large", "mixed")
_LARGE = 32.0  # times a normal number: softmax without its maximum overflows, sums of squares do not
Dead = Literal["zero", "nan", "noise"]


class _Example(Protocol):
    sizes: dict[str, int | str]
    ragged: dict[str, Any]
    dtype: str
    numbers: str
    seed: int


class Draw:
    """Makes the arrays of one example. The same calls in the same order make the same arrays.

    Attributes:
        sizes: of the example.
        ragged: of the example, int32 arrays.
        dtype: of its numbers.
        seed: of the example, to choose by.
        ids: a generator for whatever else is random and counts.
    """

    def __init__(self, case: _Example, dead: Dead = "zero"):
        self.sizes: Mapping[str, Any] = case.sizes
        self.ragged = {name: np.asarray(value, np.int32) for name, value in case.ragged.items()}
        self.dtype, self.seed = jnp.dtype(case.dtype), case.seed
        self._kind, self._dead = case.numbers, dead
        self.ids = np.random.default_rng([case.seed, 1])
        self._rng, self._noise = np.random.default_rng([case.seed, 2]), np.random.default_rng([case.seed, 3])

    def of(self, *names: str) -> tuple[int, ...]:
        """Several sizes."""
        return tuple(self.sizes[name] for name in names)

    def numbers(self, *shape: int, scale: float = 1.0, dtype: DTypeLike | None = None) -> np.ndarray:
        """Numbers of the example's kind.

        normal; whole, from -2 to 2, whose sums are exact and often equal; equal, all one; zeros; large, 32 times a
        normal; mixed, of magnitudes from 2^-8 to 2^8.

        Args:
            shape: of the array.
            scale: what normal ones are multiplied by; of whole ones its power of two.
            dtype: None is the example's.
        """
        normal = self._rng.normal(size=shape)
        made = {
            "normal": lambda: scale * normal,
            "whole": lambda: 2.0 ** np.round(np.log2(scale)) * np.clip(np.round(1.5 * normal), -2, 2),
            "equal": lambda: np.full(shape, scale * (normal.flat[0] if normal.size else 0.0)),
            "zeros": lambda: np.zeros(shape),
            "large": lambda: _LARGE * scale * normal,
            "mixed": lambda: scale * normal * 2.0 ** self._rng.uniform(-8, 8, shape),
        }[self._kind]()
        return made.astype(self.dtype if dtype is None else dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: DTypeLike = np.int32) -> np.ndarray:
        """From low to high - 1."""
        return self.ids.integers(low, high, shape).astype(dtype)

    def dead(self, x: np.ndarray, where: np.ndarray, *, below: int | None = None) -> np.ndarray:
        """The same array with something else where nothing may look: NaN, or any number.

        Args:
            x: an array. Integers cannot be NaN, and get the largest that may be.
            where: True for elements that reach nothing; broadcasts to x.
            below: integers that may be stand from 0 to below - 1; None is all of a dtype of 8 bits or fewer.
        """
        where = np.broadcast_to(where, x.shape)
        if self._dead == "zero":
            return np.where(where, np.zeros_like(x), x)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            noise = self._noise.normal(size=x.shape).astype(x.dtype)
            return np.where(where, noise if self._dead == "noise" else np.asarray(np.nan, x.dtype), x)
        least, most = (0, below - 1) if below is not None else (jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max)
        noise = self._noise.integers(least, most + 1, x.shape).astype(x.dtype)
        return np.where(where, noise if self._dead == "noise" else np.asarray(most, x.dtype), x)
