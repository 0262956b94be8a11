"""Parts of a batch: which rows they have, and the way back."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.micro_batches import join_rows, split_rows


class Rows(NamedTuple):
    a: jnp.ndarray
    b: jnp.ndarray
    none: None = None


@pytest.mark.parametrize(("rows", "parts"), [(6, 3), (6, 1), (4, 4), (10, 2)])
def test_row_i_goes_to_part_i_modulo_their_number_and_comes_back(rows, parts):
    batch = Rows(jnp.arange(rows), jnp.arange(rows * 6).reshape(rows, 2, 3))
    cut = split_rows(batch, parts)
    for name in ("a", "b"):
        got, whole = np.asarray(getattr(cut, name)), np.asarray(getattr(batch, name))
        assert got.shape == (parts, rows // parts, *whole.shape[1:])
        for row in range(rows):
            np.testing.assert_array_equal(got[row % parts, row // parts], whole[row])
        np.testing.assert_array_equal(getattr(join_rows(cut), name), whole)


def test_a_number_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="micro_batches: got 4, which does not divide the batch of 6 samples"):
        split_rows(jnp.arange(6), 4)
