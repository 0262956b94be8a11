"""Samples of a row behind one copy of their prompt against the same samples in rows of their own."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.attention import positions_within, same_segment
from deepseek_jax.parallel import causal_attention
from deepseek_jax.sharding import LOCAL, Layout
from tests.model.test_packing import Texts, same, scored

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, PER_ROW = 24, 4
# Of each row the groups: the prompt's tokens, and of each sample those of its completion and of these how many count.
# A prompt of one token has no segment, a sample counts nothing, and nor does a group. Sample 6 counts nothing of its
# end, the last one goes on to its row's last column, and the last rows are empty.
ROWS = (
    ((6, ((4, 4), (1, 1), (5, 5))), (3, ((3, 3),))),
    ((1, ((4, 4), (2, 2))), (5, ((6, 2), (7, 0)))),
    ((9, ((3, 0), (2, 2))), (4, ((2, 0),)), (4, ((2, 2),))),
    ((8, ((9, 9), (8, 8))),),
    *((),) * 4,
)
SAMPLES = sum(len(samples) for row in ROWS for _, samples in row)


def empty(rows: int) -> Texts:
    kinds = (np.int32, np.int32, bool, np.int32)
    arrays = [np.zeros((rows, WIDTH), kind) for kind in kinds]
    return Texts(*arrays, np.zeros((rows, WIDTH, 2), np.float32), np.zeros((rows, WIDTH), int))


def texts(*, shared: bool) -> tuple[Texts, np.ndarray]:
    """The same samples either way, and the numbers of their prompts' segments."""
    rng = np.random.default_rng(0)
    found = empty(len(ROWS) if shared else SAMPLES)
    prompt_of, sample = np.zeros(found.segments.shape, np.int32), 0

    def put(row, start, text, counts, segment, prompt, first, seeds):
        """Columns of a text from its token `first` on; a target's number is that of its place in the whole text."""
        of = row, slice(start, start + len(text) - 1)
        found.tokens[of], found.targets[of], found.mask[of] = text[:-1], text[1:], counts
        found.segments[of], prompt_of[of], found.seeds[of] = segment, prompt, seeds
        found.numbers[of] = 1 + 100 * sample + first + np.arange(len(text) - 1)
        return start + len(text) - 1

    for row, groups in enumerate(ROWS):
        column, number = 0, 1
        for which, (length, samples) in enumerate(groups, 1):
            prompt = rng.integers(0, 40, length)
            apart, segment = length - 1, PER_ROW + which
            if shared:
                column = put(row, column, prompt, False, segment, segment, 0, 0)
            for tokens, counted in samples:
                text = np.concatenate([prompt, rng.integers(0, 40, tokens)])
                counts = (np.arange(len(text) - 1) >= apart) & (np.arange(len(text) - 1) < apart + counted)
                seeds = rng.normal(size=(len(text) - 1, 2))
                if shared:
                    own = text[apart:], counts[apart:], number, segment if apart else number, apart, seeds[apart:]
                    column = put(row, column, *own)
                else:
                    put(sample, 0, text, counts, 1, 1, 0, seeds)
                sample, number = sample + 1, number + 1
    return found, prompt_of


@cache
def alone(kind: str) -> dict[str, np.ndarray]:
    return scored(kind, LOCAL, texts(shared=False)[0])


def in_shared_rows(kind: str, layout: Layout, **changes) -> dict[str, np.ndarray]:
    of, prompt_of = texts(shared=True)
    given = {"segments_BT": of.segments, "per_row": PER_ROW, "prompt_of_BT": prompt_of} | changes
    return scored(kind, layout, of, **given)


def drawn() -> np.ndarray:
    """Columns of the targets that count, and room for one more a row."""
    mask = texts(shared=True)[0].mask
    return np.sort(np.where(mask, np.arange(WIDTH), WIDTH), axis=1)[:, : mask.sum(axis=1).max() + 1].astype(np.int32)


@pytest.mark.parametrize(
    ("kind", "layout", "blocks"),
    [
        ("mla", Layout(scan_layers=True, remat="all_but_attention"), True),
        ("sparse", LOCAL, False),
        ("gqa", LOCAL, True),
        pytest.param("mla", LOCAL, False, marks=pytest.mark.slow),
        pytest.param("sparse", Layout(scan_layers=True, remat="layers"), True, marks=pytest.mark.slow),
        pytest.param("gqa", Layout(scan_layers=True, remat="layers"), False, marks=pytest.mark.slow),
    ],
)
def test_samples_behind_one_prompt_are_samples_behind_their_own(kind, layout, blocks, monkeypatch):
    """Log-probs, entropies, the experts' choice, load, balance, and the gradient of every weight.

    In load and balance a prompt's token counts once for each of its samples that count.
    """
    wanted = alone(kind)
    if blocks:  # tiles of eight
        monkeypatch.setattr(causal_attention, "_ALL_PAIRS", 0)
        monkeypatch.setattr(causal_attention, "_SIDES", (8,))
    same(in_shared_rows(kind, layout), wanted)
    assert np.abs(wanted["logprobs"]).max() > 2  # and they say something


def test_scoring_what_was_drawn_alone_changes_nothing():
    same(in_shared_rows("gqa", Layout(remat="layers"), drawn_BU=drawn()), alone("gqa"))


def test_samples_that_do_not_see_the_prompt_say_something_else():
    """What the law above would miss."""
    blind = in_shared_rows("mla", LOCAL, prompt_of_BT=texts(shared=True)[0].segments)
    assert np.abs(blind["logprobs"] - alone("mla")["logprobs"]).max() > 0.1
    assert np.abs(blind["load"] - alone("mla")["load"]).max() > 1


def by_hand() -> tuple[np.ndarray, np.ndarray]:
    """A prompt and two samples, a text without a prompt, a prompt and one sample, padding; another order of numbers."""
    segments = [[5, 5, 5, 1, 1, 2, 2, 2, 3, 3, 6, 4, 4, 0], [1, 1, 5, 2, 6, 6, 3, 4, 4, 0, 0, 0, 0, 0]]
    prompt_of = [[5, 5, 5, 5, 5, 5, 5, 5, 3, 3, 6, 6, 6, 0], [1, 1, 5, 5, 6, 6, 6, 6, 6, 0, 0, 0, 0, 0]]
    return np.array(segments, np.int32), np.array(prompt_of, np.int32)


def test_positions_go_on_from_the_prompts_last_one():
    found = positions_within(*map(jnp.asarray, by_hand()))
    wanted = [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1, 2, 2, 3, 0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(found, wanted)


def test_queries_see_their_prompt_and_their_own_sample():
    segments, prompt_of = by_hand()
    B, T = segments.shape
    wanted = np.zeros((B, T, T), bool)
    for row, query, key in np.ndindex(B, T, T):
        own = segments[row, query] == segments[row, key]
        wanted[row, query, key] = own or prompt_of[row, query] == segments[row, key]
    segments, prompt_of = jnp.asarray(segments), jnp.asarray(prompt_of)
    np.testing.assert_array_equal(same_segment(jnp.ones((B, T, T), bool), segments, segments, prompt_of), wanted)
    some = same_segment(jnp.ones((B, 4, T), bool), segments[:, 3:7], segments, prompt_of[:, 3:7])
    np.testing.assert_array_equal(some, wanted[:, 3:7])
    assert not same_segment(jnp.zeros((B, T, T), bool), segments, segments, prompt_of).any()
