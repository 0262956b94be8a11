"""How far a computation may be from float64 by its roundings, worked out beside it, an operation at a time.

For a kernel's `bound` and `gradient_bound`: the twin again in these operations gives each element's own bound, of what
its terms are and not of what is left of them, so that sums that cancel and steep functions have theirs.

    >>> import numpy as np
    >>> x, w = exact(np.array([[3.0, 1.0]])), exact(np.array([[1.0], [-3.0]]))
    >>> out = product("wk,kn->wn", x, w).rounded(UNITS["bfloat16"])
    >>> out.value.item(), out.error.item() == 2 * 6 * 2.0**-24 * (1 + 2.0**-8) + TINY
    (0.0, True)

Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.3, running error analysis.
"""

import math
from dataclasses import dataclass

import numpy as np

UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}  # the most that a number of a dtype is off, as a part of it
TINY = 2.0**-126  # below it numbers may become 0
_UNIT = UNITS["float32"]
_FUNCTION = 8 * _UNIT  # exp, and what is made of it


@dataclass(frozen=True)
class Near:
    """Numbers, and how far what stands for them may be off.

    Operations are float32's: they round, each, and what they are given is off already.

    Attributes:
        value: float64.
        error: float64 of the same shape, not negative.
    """

    value: np.ndarray
    error: np.ndarray

    @property
    def size(self) -> np.ndarray:
        """The largest magnitude that it may have."""
        return np.abs(self.value) + self.error

    def rounded(self, unit: float) -> "Near":
        """As numbers of a dtype with this unit, one of `UNITS`."""
        return Near(self.value, self.error + unit * self.size + TINY)

    def __add__(self, other: "Near") -> "Near":
        return Near(self.value + other.value, self.error + other.error).rounded(_UNIT)

    def __sub__(self, other: "Near") -> "Near":
        return self + Near(-other.value, other.error)

    def __mul__(self, other: "Near") -> "Near":
        value = self.value * other.value
        return Near(value, self.size * other.size - np.abs(value)).rounded(_UNIT)

    def __getitem__(self, at) -> "Near":
        return Near(self.value[at], self.error[at])

    def reshape(self, *shape: int) -> "Near":
        """Of another shape."""
        return Near(self.value.reshape(shape), self.error.reshape(shape))


def exact(value: np.ndarray | float) -> Near:
    """Numbers that are what they are, such as arguments."""
    value = np.asarray(value, np.float64)
    return Near(value, np.zeros_like(value))


def product(subscripts: str, *factors: Near, unit: float = 0.0) -> Near:
    """Sums of products, as of `np.einsum` with "->", added up in float32 in any order.

    Args:
        subscripts: a letter an axis, each factor's and the result's.
        factors: what is multiplied.
        unit: where parts of the sums are rounded to a smaller dtype, as those of several devices are, its unit times
            the number of such roundings.
    """
    given, wanted = subscripts.split("->")
    sizes = {
        letter: size
        for letters, factor in zip(given.split(","), factors, strict=True)
        for letter, size in zip(letters, factor.value.shape, strict=True)
    }
    terms = math.prod(size for letter, size in sizes.items() if letter not in wanted)
    values, magnitudes, most = (
        np.einsum(subscripts, *parts)
        for parts in zip(*((of.value, np.abs(of.value), of.size) for of in factors), strict=True)
    )
    return Near(values, most - magnitudes + (terms * _UNIT + unit) * most)


def silu(x: Near) -> Near:
    """x sigmoid(x)."""
    value = x.value * _sigmoid(x.value)
    return Near(value, _moved(_slope(x.value), x) + _FUNCTION * (np.abs(value) + 2 * x.error))


def silu_slope(x: Near) -> Near:
    """Its derivative."""
    s = _sigmoid(x.value)
    bend = s * (1 - s) * (2 + x.value * (1 - 2 * s))
    # 1 - sigmoid(x) is off by what sigmoid(x) is
    return Near(_slope(x.value), _moved(bend, x) + _FUNCTION * (s * (1 + np.abs(x.value)) + x.error))


def softmax(scores: Near, mask: np.ndarray) -> tuple[Near, Near]:
    """Of the last axis, over what `mask` lets see, one at least: the weights, and the log of their sum [..., 1]."""
    seen = np.where(mask, scores.value, -np.inf)
    top = seen.max(axis=-1, keepdims=True)
    total = np.exp(seen - top).sum(axis=-1, keepdims=True)
    log_sum = top + np.log(total)
    most = np.max(np.where(mask, np.abs(scores.value), 0), axis=-1, keepdims=True)
    off = np.where(mask, scores.error, 0) + 2 * _UNIT * most  # differences of scores round too
    of_sum = off.max(axis=-1, keepdims=True) + (_FUNCTION + mask.shape[-1] * _UNIT)
    weights = np.exp(seen - log_sum)
    return Near(weights, weights * np.expm1(off + of_sum) + TINY * mask), Near(log_sum, of_sum * (1 + _UNIT))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def _slope(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(x)
    return s + x * s * (1 - s)


def _moved(slope: np.ndarray, x: Near) -> np.ndarray:
    """How far silu, or its slope, goes astray with its argument: their second derivatives are (3 + |x|) s (1 - s) at
    most, s being the sigmoid, and 1/2."""
    s = _sigmoid(np.maximum(np.abs(x.value) - x.error, 0))
    bend = np.minimum((3 + x.size) * s * (1 - s), 1 / 2)
    return np.abs(slope) * x.error + bend * x.error**2 / 2
