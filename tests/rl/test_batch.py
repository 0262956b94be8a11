"""How samples are laid out for an update: one a row, and packed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.generation.completion import Completion
from deepseek_jax.rl.batch import make_batch, pack
from deepseek_jax.rl.slots import first_fit


def completion(tokens, finished=True, **records):
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return Completion(np.array(tokens, np.int32), logprobs, finished, **records)


def test_mask_marks_exactly_the_completions_tokens():
    batch = make_batch([[7], [5, 6]], [completion([8, 9]), completion([4])], np.array([1.0, -1.0]), width=4)
    np.testing.assert_array_equal(batch.tokens_BT, [[7, 8, 0, 0], [5, 6, 0, 0]])
    np.testing.assert_array_equal(batch.targets_BT, [[8, 9, 0, 0], [6, 4, 0, 0]])
    np.testing.assert_array_equal(batch.mask_BT, [[1, 1, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.old_logprobs_BT, [[-1, -2, 0, 0], [0, -1, 0, 0]])
    np.testing.assert_array_equal(batch.ref_logprobs_BT, np.zeros((2, 4)))
    np.testing.assert_array_equal(batch.advantages_BT, [[1, 1, 0, 0], [0, -1, 0, 0]])
    assert batch.mask_BT.dtype == bool and batch.advantages_BT.dtype == batch.old_logprobs_BT.dtype == np.float32
    assert batch.segments_BT is None and batch.lengths_BK is None and batch.per_row == 1


def test_a_pad_token_inside_a_completion_counts():
    """The mask is made from lengths: token 0 is padding here and may be a real token there."""
    batch = make_batch([[7]], [completion([0, 0, 3])], np.zeros(1), width=5)
    np.testing.assert_array_equal(batch.mask_BT, [[1, 1, 1, 0, 0]])


def test_width_fits_exactly_or_is_refused():
    sample = [[7, 7]], [completion([8, 9, 1])], np.zeros(1)
    assert make_batch(*sample, width=4).mask_BT.tolist() == [[False, True, True, True]]
    assert make_batch(*sample).tokens_BT.shape == (1, 16)
    with pytest.raises(ValueError, match="width: got 3, wanted at least 4"):
        make_batch(*sample, width=3)


def test_a_cut_off_completion_does_not_count_when_masked():
    samples = [[7], [5]], [completion([8, 9], finished=False), completion([4, 3])], np.ones(2)
    np.testing.assert_array_equal(make_batch(*samples, width=2).mask_BT, [[1, 1], [1, 1]])
    np.testing.assert_array_equal(make_batch(*samples, width=2, mask_truncated=True).mask_BT, [[0, 0], [1, 1]])


def records(prompt, tokens):
    """Two MoE layers with three experts a token, and 40 bits of support, all of them known numbers."""
    n = prompt + tokens - 1
    return {
        "routes": np.arange(n * 6, dtype=np.int16).reshape(n, 2, 3),
        "support": np.arange(tokens * 2, dtype=np.uint32).reshape(tokens, 2),
    }


def samples_of(lengths):
    rng = np.random.default_rng(len(lengths))
    prompts = [rng.integers(1, 99, p).tolist() for p, _ in lengths]
    found = [completion(rng.integers(1, 99, c).tolist(), bool(c % 2), **records(p, c)) for p, c in lengths]
    return prompts, found, rng.normal(size=len(lengths)).astype(np.float32)


LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=20)


@given(LENGTHS, st.integers(10, 24), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_packed_rows_hold_every_sample_once_as_rows_of_their_own_do(lengths, width, per_row, rows_of, masked):
    samples = samples_of(lengths)
    plain = make_batch(*samples, width=width, mask_truncated=masked)
    packed = pack(*samples, width=width, per_row=per_row, rows_of=rows_of, mask_truncated=masked)
    assert packed.lengths_BK.shape == (packed.mask_BT.shape[0], per_row) and packed.mask_BT.shape[0] % rows_of == 0
    assert sorted(packed.lengths_BK[packed.lengths_BK > 0]) == sorted(c for _, c in lengths)
    found = []
    for row, segments in enumerate(packed.segments_BT):
        for number in range(1, segments.max() + 1):
            columns = np.flatnonzero(segments == number)
            assert (np.diff(columns) == 1).all() and len(columns)
            found.append([bytes(np.ascontiguousarray(field[row, columns])) for field in fields(packed)])
    wanted = []
    for row, (p, c) in enumerate(lengths):
        wanted.append([bytes(np.ascontiguousarray(field[row, : p + c - 1])) for field in fields(plain)])
    assert sorted(found) == sorted(wanted)
    empty = packed.segments_BT == 0
    assert not packed.mask_BT[empty].any() and not packed.tokens_BT[empty].any()


def fields(batch):
    names = "tokens_BT targets_BT mask_BT old_logprobs_BT advantages_BT routes_BTLA support_BTW".split()
    return [getattr(batch, name) for name in names]


def test_first_fit_by_hand():
    slots = first_fit([3, 5, 2, 5, 4], width=8, per_row=3)
    assert [(p.row, p.start, p.number) for p in slots] == [(0, 5, 1), (0, 0, 0), (1, 5, 1), (1, 0, 0), (2, 0, 0)]
    assert [p.row for p in first_fit([1, 1, 1], width=8, per_row=2)] == [0, 0, 1]


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="width: got 3, wanted at least 4"):
        pack([[7, 7]], [completion([8, 9, 1])], np.zeros(1), width=3, per_row=2, rows_of=1)
