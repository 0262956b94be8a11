"""Which shapes a search tries: so many at most, since programs are compiled for each, and the outermost among them."""

import math
import random
from collections.abc import Sequence

from hypothesis import strategies as st

from deepseek_jax.testing.kernel import Kernel

SHAPES = 24  # of one search


Shape = tuple[int, ...]  # for each of a kernel's sizes, and for its dtype, the number of the value


def pool(kernel: Kernel, most: int = SHAPES, seed: int = 0) -> list[Shape]:
    """Some of a kernel's shapes, or all where there are no more.

    The simplest and that of all last values are among them, those that have one last value, as far as they fit, and
    others at random.

    Args:
        kernel: with sizes and dtypes.
        most: how many.
        seed: of the choice.

    Returns:
        In the order of the kernel's values.
    """
    last = tuple(len(values) - 1 for values in (*kernel.sizes.values(), kernel.dtypes))
    total = math.prod(at + 1 for at in last)
    one_last = (tuple(at if name == other else 0 for name, at in enumerate(last)) for other in range(len(last)))
    found = dict.fromkeys([(0,) * len(last), last, *one_last])
    rng = random.Random(seed)
    while len(found) < min(most, total):
        found[tuple(rng.randrange(at + 1) for at in last)] = None
    return sorted(list(found)[:most])


def read(kernel: Kernel, shape: Shape) -> tuple[dict[str, int | str], str]:
    """A shape's sizes by name, and its dtype."""
    sizes = {name: values[at] for (name, values), at in zip(kernel.sizes.items(), shape[:-1], strict=True)}
    return sizes, kernel.dtypes[shape[-1]]


@st.composite
def one_of(draw: st.DrawFn, shapes: Sequence[Shape]) -> Shape:
    """Each as often; shrinks a size at a time, to what there is of the others' values."""
    left = list(shapes)
    for at in range(len(left[0])):
        value = draw(st.sampled_from(left))[at]
        left = [shape for shape in left if shape[at] == value]
    return left[0]
