"""Strategies for what varies within a shape: each is given the sizes, and shrinks towards nothing."""

from collections.abc import Callable, Sequence

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Sizes = dict[str, int | str]


def counts(most: str | Callable[[Sizes], int], *each: str) -> Callable[[Sizes], SearchStrategy]:
    """Nested lists of counts from 0 to `most`, such as lengths.

    Args:
        most: the name of a size, or a function of the sizes.
        each: names of the sizes that are the lists' lengths, the outer one first; none is one count.
    """

    def drawn(sizes):
        limit = most(sizes) if callable(most) else sizes[most]
        # the ends are where kernels break, and a uniform draw seldom meets them
        found = st.one_of(st.integers(0, limit), st.sampled_from(sorted({0, min(1, limit), max(0, limit - 1), limit})))
        for name in reversed(each):
            found = st.lists(found, min_size=sizes[name], max_size=sizes[name])
        return found

    return drawn


def group_sizes(total: str | Callable[[Sizes], int], groups: str) -> Callable[[Sizes], SearchStrategy]:
    """How rows fall into groups: a list of counts whose sum is `total` at most; some of them 0, one perhaps all.

    Args:
        total: the name of a size, or a function of the sizes.
        groups: the name of the size that says how many.
    """

    def drawn(sizes):
        limit, number = total(sizes) if callable(total) else sizes[total], sizes[groups]
        share = st.one_of(st.integers(0, limit), st.sampled_from([0, limit]), st.integers(0, -(-limit // number)))
        return st.lists(share, min_size=number, max_size=number).map(lambda asked: _fitted(asked, limit))

    return drawn


def choices(*values: int) -> Callable[[Sizes], SearchStrategy]:
    """One of some integers, the simplest first."""
    return lambda sizes: st.sampled_from(values)


def _fitted(asked: Sequence[int], limit: int) -> list[int]:
    """As many as are asked for, in order, while there are some left."""
    given = []
    for count in asked:
        given.append(min(count, limit - sum(given)))
    return given
