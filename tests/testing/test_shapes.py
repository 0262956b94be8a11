"""The shapes of a search: few, so that it compiles little, the outermost among them, and small again in a fault."""

import dataclasses
import itertools

import pytest

from deepseek_jax.testing import Kernel, search
from deepseek_jax.testing.shapes import pool, read
from tests.testing.faulty import product_kernel

pytestmark = pytest.mark.usefixtures("quick_compilation")


def many(**changes) -> Kernel:
    """A product of 12 x 12 x 2 shapes."""
    sizes = {"W": tuple(range(1, 13)), "K": tuple(range(2, 14))}
    return dataclasses.replace(product_kernel(), sizes=sizes, **changes)


def test_a_pool_has_all_shapes_where_they_are_few():
    kernel = product_kernel()
    wanted = [({"W": W, "K": K}, dtype) for W, K, dtype in itertools.product((1, 5), (2, 8), kernel.dtypes)]
    assert [read(kernel, shape) for shape in pool(kernel, 24)] == wanted


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_one_has_the_outermost_and_others_by_its_seed(seed):
    kernel = many()
    shapes = pool(kernel, 24, seed)
    assert len(set(shapes)) == 24 and shapes == sorted(shapes) == pool(kernel, 24, seed)
    assert {(0, 0, 0), (11, 11, 1), (11, 0, 0), (0, 11, 0), (0, 0, 1)} <= set(shapes)
    assert set(shapes) != set(pool(kernel, 24, seed + 1))


def test_a_pool_of_one_is_the_simplest():
    assert [read(many(), shape) for shape in pool(many(), 1)] == [({"W": 1, "K": 2}, "float32")]


def test_a_long_search_compiles_for_its_shapes_alone():
    """Each: a result and gradients, and results of two halves of a batch."""
    found = search(many(), 400, shapes=6)
    assert found.fault is None and found.examples == 400 and found.seconds > 0
    assert 6 * 2 < found.programs <= 6 * (2 + 2)


@pytest.mark.parametrize("name, value", [("W", 12), ("K", 13)])
def test_a_fault_of_one_size_is_told_with_the_others_at_their_simplest(name, value):
    def run(x, w):
        broken = {"W": x.shape[0], "K": x.shape[1]}[name] == value
        return x @ w + broken

    found = search(many(run=run, gradients=(), invariances=()), 200, shapes=16)
    assert found.fault is not None and found.fault.law == "values"
    assert found.fault.case.sizes == {"W": 1, "K": 2, name: value} and found.fault.case.dtype == "float32"


def test_what_a_search_tries_is_of_its_pool():
    kernel, tried = many(gradients=(), invariances=()), set()
    inputs = kernel.inputs

    def seen(draw):
        tried.add((*draw.of("W", "K"), str(draw.dtype)))
        return inputs(draw)

    search(dataclasses.replace(kernel, inputs=seen), 300, shapes=10, seed=3)
    shapes = [read(kernel, shape) for shape in pool(kernel, 10, 3)]
    assert tried == {(*sizes.values(), dtype) for sizes, dtype in shapes}
