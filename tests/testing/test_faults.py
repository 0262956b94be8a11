"""The harness finds planted faults, in small inputs, and none in the same kernels without them."""

import dataclasses
import functools

import numpy as np
import pytest

from deepseek_jax.testing import Case, Found, Kernel, search
from deepseek_jax.testing.search import check
from tests.testing.faulty import FAULTS, kernel_with, mean_kernel, paged_kernel, product_kernel

pytestmark = pytest.mark.usefixtures("quick_compilation")

# By what each is found, where that is always the same.
LAWS = {
    "wrong mask edge": ("finite", "values"),
    "unmasked NaN": ("finite",),
    "float16 accumulation": ("values",),
    "dropped ragged tail": ("values",),
    "stale output buffer": ("finite", "values"),
    "uninitialised accumulator": ("finite", "values"),
    "shape-dependent branch": ("finite", "values"),
    "race between grid steps": ("model of a TPU",),
    "transposed gradient": ("gradient of x",),
    "off-by-one page": ("values", "finite", "padding"),
}


@functools.cache
def found_of(fault: str) -> Found:
    return search(kernel_with(fault), 100)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_a_small_input(fault):
    found = found_of(fault)
    assert found.fault is not None and found.fault.law in LAWS[fault], found.fault
    case = found.fault.case
    assert case.dtype == "float32" and np.prod([size for size in case.sizes.values()]) <= 48, case
    assert sum(np.sum(value) for value in case.ragged.values()) <= 6, case


@pytest.mark.parametrize("fault", FAULTS)
def test_its_case_has_the_fault_again(fault):
    """From its JSON, in a fresh process's place: nothing is kept of the search."""
    kernel, found = kernel_with(fault), found_of(fault)
    again = check(kernel, kernel.case(found.fault.case.as_json()))
    assert again.fault.law == found.fault.law and again.fault.said == found.fault.said


@pytest.mark.parametrize("make", [mean_kernel, product_kernel, paged_kernel])
def test_without_it_there_is_none(make):
    found = search(make(), 40)
    assert found.fault is None and found.examples == 40, found.fault
    assert 0 < found.worst <= 1 and found.worst_case is not None


def one(**changes) -> Kernel:
    return dataclasses.replace(product_kernel(), **changes)


SMALL = Case(sizes={"W": 1, "K": 2}, ragged={})


def test_what_is_raised_is_a_fault_too():
    def run(x, w):
        if float(x[0, 0]) > 0:  # a value under jit
            return x
        return x @ w

    found = check(one(run=run), SMALL)
    assert found.fault.law == "runs" and found.fault.said.startswith("ConcretizationTypeError")


def test_a_twin_that_says_nothing_is_a_fault():
    found = search(one(twin=lambda x, w: np.full((len(x), w.shape[1]), np.nan), gradients=()), 16)
    assert found.fault.said == "the twin's results are empty or NaN: nothing was compared"


def test_a_result_of_another_shape_is_a_fault():
    found = check(one(run=lambda x, w: (x @ w)[:, :1], gradients=()), SMALL)
    assert found.fault.law == "values" and found.fault.said == "got shape [1, 1], wanted [1, 2]"


def test_another_result_of_the_same_call_is_a_fault():
    """A counter on the host, as a kernel that reads what another call left behind."""
    import jax

    calls = iter(range(1, 100))

    def run(x, w):
        count = jax.pure_callback(lambda: np.float32(next(calls)), jax.ShapeDtypeStruct((), np.float32))
        return x @ w * (1 + 1e-7 * count)

    found = check(one(run=run, gradients=(), tolerance={"float32": 1.0}, dtypes=("float32",)), SMALL)
    assert found.fault.law == "repeat" and found.fault.said.startswith("the same call gave another result")


def test_a_second_trace_of_a_shape_is_a_fault():
    from deepseek_jax.testing.programs import Programs

    programs, arguments = Programs(one()), {"x": np.ones((1, 2), np.float32), "w": np.ones((2, 2), np.float32)}
    _, program = programs.program(arguments)
    programs.run(arguments)
    assert programs.count == 1
    import jax

    program.clear_cache()
    jax.clear_caches()
    with pytest.raises(AssertionError, match="traced > 1 times"):
        programs.run(arguments)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "case: Expecting property name"),
        ('{"sizes":{}}', "case: "),
        ('{"sizes":{"W":1},"ragged":{}}', "case: sizes: got {'W': 1}, wanted W, K in it"),
        ('{"sizes":{"W":1,"K":2},"ragged":{},"dtype":"float8"}', "case: got dtype 'float8'"),
    ],
)
def test_a_case_that_is_none_is_refused(text, says):
    with pytest.raises(ValueError) as refused:
        product_kernel().case(text)
    assert str(refused.value).startswith(says)


def test_a_declaration_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="^product: numbers: got 'odd', wanted one of normal, whole"):
        one(numbers=("odd",))
    with pytest.raises(ValueError, match="^product: compiled: got sizes W, wanted W, K$"):
        one(compiled=({"W": 8},))
