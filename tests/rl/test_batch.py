"""How samples are laid out for an update: one a row, and packed."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.generation.completion import Completion
from deepseek_jax.rl.batch import make_batch, pack
from deepseek_jax.rl.slots import Text, first_fit, fit_shared


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


def test_columns_of_completions_are_told_where_they_are_few():
    samples = [[7] * 6, [5] * 2], [completion([8, 9]), completion([4, 3, 2])], np.ones(2)
    batch = make_batch(*samples, width=8, drawn=3)
    np.testing.assert_array_equal(batch.drawn_BU, [[5, 6, 8], [1, 2, 3]])
    assert make_batch(*samples, width=8).drawn_BU is None and make_batch(*samples, width=8, drawn=8).drawn_BU is None
    options = {"width": 10, "per_row": 2, "rows_of": 2, "drawn": 6}
    np.testing.assert_array_equal(pack(*samples, **options).drawn_BU, [[5, 6, 10, 10, 10, 10], [1, 2, 3, 10, 10, 10]])


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


SHARED = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=6)), min_size=1, max_size=6
)


@given(SHARED, st.integers(11, 30), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans())
def test_rows_with_shared_prompts_hold_every_sample_as_rows_of_their_own_do(
    groups, width, per_row, rows_of, masked, same_routes
):
    """Read back as attention does: a sample is its prompt's segment and its own, one behind the other."""
    lengths = [(p, c) for p, completions in groups for c in completions]
    prompts, completions, advantages = samples_of(lengths)
    firsts = np.cumsum([0] + [len(of) for _, of in groups])
    for first, last in itertools.pairwise(firsts):
        prompts[first:last] = [prompts[first]] * (last - first)
    if not same_routes:  # those of the last sample differ in the prompt's first token
        completions[-1].routes[0] += 1
    samples = prompts, completions, advantages
    plain = make_batch(*samples, width=width, mask_truncated=masked)
    options = {"width": width, "per_row": per_row, "rows_of": rows_of, "mask_truncated": masked}
    shared = pack(*samples, **options, share_prompts=True)
    assert shared.lengths_BK.shape == (len(shared.mask_BT), per_row) and len(shared.mask_BT) % rows_of == 0
    assert sorted(shared.lengths_BK[shared.lengths_BK > 0]) == sorted(c for _, c in lengths)
    found = []
    for row, segments in enumerate(shared.segments_BT):
        assert segments[segments <= per_row].max() == (shared.lengths_BK[row] > 0).sum()
        for number in range(1, (shared.lengths_BK[row] > 0).sum() + 1):
            own = np.flatnonzero(segments == number)
            [prompt] = set(shared.prompt_of_BT[row, own])
            before = np.flatnonzero(segments == prompt) if prompt != number else own[:0]
            assert (
                (np.diff(own) == 1).all()
                and (np.diff(before) == 1).all()
                and (shared.prompt_of_BT[row, before] == prompt).all()
            )
            assert not shared.mask_BT[row, before].any()
            found.append([field_of(field[row, np.concatenate([before, own])]) for field in fields(shared)])
    wanted = [[field_of(field[row, : p + c - 1]) for field in fields(plain)] for row, (p, c) in enumerate(lengths)]
    assert sorted(found) == sorted(wanted)
    once = {(row, number) for row, number in zip(*np.nonzero(shared.lengths_BK), strict=True)}
    assert len(once) == len(lengths)
    empty = shared.segments_BT == 0
    assert (
        not shared.mask_BT[empty].any() and not shared.tokens_BT[empty].any() and not shared.prompt_of_BT[empty].any()
    )


def field_of(values):
    return bytes(np.ascontiguousarray(values))


def test_shared_prompts_by_hand():
    prompts, lengths = [[7, 8, 9]] * 3 + [[5]] + [[4, 6]] * 2, (2, 3, 2, 4, 1, 1)
    samples = prompts, [completion([1] * n) for n in lengths], np.arange(1.0, 7)
    batch = pack(*samples, width=9, per_row=3, rows_of=1, share_prompts=True)
    np.testing.assert_array_equal(batch.segments_BT, [[4, 4, 1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 5, 2, 3, 0, 0]])
    np.testing.assert_array_equal(batch.prompt_of_BT, [[4, 4, 4, 4, 4, 4, 4, 4, 4], [1, 1, 1, 1, 5, 5, 5, 0, 0]])
    np.testing.assert_array_equal(batch.tokens_BT, [[7, 8, 9, 1, 1, 9, 1, 9, 1], [5, 1, 1, 1, 4, 6, 6, 0, 0]])
    np.testing.assert_array_equal(batch.advantages_BT, [[0, 0, 2, 2, 2, 1, 1, 3, 3], [4, 4, 4, 4, 0, 5, 6, 0, 0]])
    np.testing.assert_array_equal(batch.lengths_BK, [[3, 2, 2], [4, 1, 1]])


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.data())
def test_groups_fill_no_more_rows_than_planned(groups, size, per_row, prompt, completion, data):
    """Rows with room for per_row samples behind their prompt: a group opens as many as it needs by itself at most."""
    texts = [
        Text(group, shared, data.draw(st.integers(1, completion)))
        for group, shared in enumerate(data.draw(st.lists(st.integers(0, prompt), min_size=groups, max_size=groups)))
        for _ in range(size)
    ]
    slots = fit_shared(texts, prompt + per_row * completion, per_row)
    assert max(slot.row for slot in slots) < groups * -(-size // per_row)


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


def test_a_sample_goes_where_its_prompt_is_though_an_earlier_row_has_room_for_both():
    texts = [Text("a", 5, 9), Text("b", 4, 9), Text("b", 4, 2)]  # rows of 20: a leaves 6, too few for b's first
    slots = fit_shared(texts, 20, 4)
    assert [slot.row for slot in slots] == [0, 1, 1]
    assert slots[1].prompt == slots[2].prompt and slots[2].start == slots[1].start + 9
