"""Filters and draws against sorts and sums in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops.sampling import (
    add_bias,
    best_tokens,
    forbid,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_counts,
    penalise_repeats,
    sample,
    uniform_noise,
)

LARGEST_NOISE = np.nextafter(np.float32(1), np.float32(0))

top_k, top_p, draw = jax.jit(keep_top_k), jax.jit(keep_top_p), jax.jit(sample)
best = jax.jit(best_tokens, static_argnums=1)


def sorted_top_k(logits, k):
    wanted = np.full_like(logits, -np.inf)
    for row, (line, count) in enumerate(zip(logits, k, strict=True)):
        least = np.sort(line)[::-1][min(count, line.size) - 1] if count else -np.inf
        wanted[row] = np.where(line >= least, line, -np.inf)
    return wanted


def sorted_top_p(logits, p, slack=0.0):
    """Kept with the threshold p + slack; ties with the last member stay."""
    wanted = np.full_like(logits, -np.inf)
    for row, (line, most) in enumerate(zip(logits, p, strict=True)):
        line64 = line.astype(np.float64)
        probability = np.exp(line64 - line64.max())
        probability /= probability.sum()
        order = np.argsort(-line, kind="stable")
        reached = np.cumsum(probability[order]) >= min(most + slack, 1)
        last = int(np.argmax(reached)) if reached.any() else line.size - 1
        least = line[order[last]] if most + slack < 1 else -np.inf
        wanted[row] = np.where(line >= least, line, -np.inf)
    return wanted


def lines(seed, kind, B, V):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, V)).astype(np.float32) * 3
    if kind == "ties":
        logits = np.round(logits / 2) * 2  # -0.0 among them, which is a tie with 0.0
    if kind == "impossible":
        logits[rng.random((B, V)) < 0.7] = -np.inf
        logits[:, rng.integers(V)] = 1.0
    return logits


KINDS = st.sampled_from(["plain", "ties", "impossible"])
WIDTHS = st.sampled_from([7, 256, 300])  # below a block of the search, a whole one, and no multiple


@given(seed=st.integers(0, 2**31), kind=KINDS, V=WIDTHS)
def test_top_k_equals_a_sort(seed, kind, V):
    logits = lines(seed, kind, 6, V)
    k = np.array([0, 1, 2, 5, V, V + 3], np.int32)
    np.testing.assert_array_equal(top_k(logits, k), sorted_top_k(logits, k))


def test_top_1_keeps_the_best_alone():
    logits = lines(0, "plain", 8, 300)
    kept = np.asarray(top_k(logits, np.ones(8, np.int32)))
    assert (np.isfinite(kept).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(kept.argmax(axis=1), logits.argmax(axis=1))


@given(seed=st.integers(0, 2**31), kind=KINDS, V=WIDTHS)
def test_top_p_equals_a_sort(seed, kind, V):
    """p a hair to either side bounds what rounding of a sum in float32 may decide."""
    logits = lines(seed, kind, 6, V)
    p = np.array([1e-9, 0.1, 0.5, 0.9, 0.99, 1.0], np.float32)
    kept = np.isfinite(top_p(logits, p))
    least, most = (np.isfinite(sorted_top_p(logits, p, slack)) for slack in (-1e-6, 1e-6))
    assert (kept >= least).all() and (kept <= most).all()
    np.testing.assert_array_equal(np.asarray(top_p(logits, p))[kept], logits[kept])
    np.testing.assert_array_equal(kept[-1], np.isfinite(logits[-1]))  # p = 1 keeps what is possible


def test_a_tiny_p_keeps_the_best_alone():
    logits = lines(0, "plain", 8, 300)
    kept = np.asarray(top_p(logits, np.full(8, 1e-30, np.float32)))
    assert (np.isfinite(kept).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(kept.argmax(axis=1), logits.argmax(axis=1))


def test_top_p_counts_the_token_that_crosses_the_mark():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    for p, count in ((0.4, 1), (0.6, 2), (0.85, 3), (0.96, 4)):
        assert np.isfinite(top_p(logits, np.array([p], np.float32))).sum() == count


@given(seed=st.integers(0, 2**31), kind=KINDS, V=WIDTHS)
def test_min_p_keeps_what_is_probable_enough_beside_the_best(seed, kind, V):
    logits = lines(seed, kind, 5, V)
    p = np.array([0, 0.01, 0.3, 0.9, 1], np.float32)
    ratio = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))  # to the best one's probability
    got = np.asarray(jax.jit(keep_min_p)(logits, p))
    kept = np.isfinite(got)
    np.testing.assert_array_equal(got[kept], logits[kept])
    sure = np.abs(ratio - p[:, None]) > 1e-5  # rounding may decide the others
    np.testing.assert_array_equal(kept[sure], ((ratio >= p[:, None]) & np.isfinite(logits))[sure])
    np.testing.assert_array_equal(kept[4], ratio[4] == 1)
    np.testing.assert_array_equal(got[0], logits[0])


@given(seed=st.integers(0, 2**31))
def test_penalty_lowers_seen_tokens_on_both_sides_of_zero(seed):
    rng = np.random.default_rng(seed)
    logits, seen = rng.normal(size=(3, 11)).astype(np.float32), rng.random((3, 11)) < 0.5
    penalty = np.array([1.0, 1.3, 2.0], np.float32)
    wanted = logits.copy()
    for b, v in zip(*np.nonzero(seen), strict=True):
        wanted[b, v] = logits[b, v] / penalty[b] if logits[b, v] > 0 else logits[b, v] * penalty[b]
    got = penalise_repeats(jnp.asarray(logits), jnp.asarray(seen), jnp.asarray(penalty))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert (np.asarray(got) <= logits + 1e-6).all()


@given(seed=st.integers(0, 2**31))
def test_counted_tokens_lose_once_for_coming_and_once_a_time(seed):
    rng = np.random.default_rng(seed)
    logits, counts = rng.normal(size=(3, 11)).astype(np.float32), rng.integers(0, 4, (3, 11))
    presence, frequency = rng.uniform(-2, 2, (2, 3)).astype(np.float32)
    wanted = logits.astype(np.float64)
    for b, v in zip(*np.nonzero(counts), strict=True):
        wanted[b, v] -= presence[b] + sum(frequency[b] for _ in range(counts[b, v]))
    got = penalise_counts(*map(jnp.asarray, (logits, counts, presence, frequency)))
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(got)[counts == 0], logits[counts == 0])


def test_bias_and_bans_know_their_tokens_and_drop_padding():
    logits = lines(0, "plain", 2, 7)
    ids = jnp.array([[6, 0, 7], [7, 7, 3]])
    values = jnp.array([[1.0, -2.0, 9.0], [9.0, 9.0, 0.5]])
    wanted = logits.copy()
    wanted[0, 6] += 1
    wanted[0, 0] -= 2
    wanted[1, 3] += 0.5
    np.testing.assert_array_equal(add_bias(jnp.asarray(logits), ids, values), wanted)
    banned = np.asarray(forbid(jnp.asarray(logits), ids))
    assert np.argwhere(np.isneginf(banned)).tolist() == [[0, 0], [0, 6], [1, 3]]
    np.testing.assert_array_equal(banned[np.isfinite(banned)], logits[np.isfinite(banned)])


@given(seed=st.integers(0, 2**31), kind=KINDS, V=WIDTHS)
def test_the_best_tokens_are_a_sorts(seed, kind, V):
    """Their values in order, each of its own token; which of several equal ones is left open."""
    logits = lines(seed, kind, 4, V)
    values, ids = map(np.asarray, best(logits, 7))
    np.testing.assert_array_equal(values, np.sort(logits, axis=1)[:, ::-1][:, :7])
    np.testing.assert_array_equal(np.take_along_axis(logits, ids, 1), values)
    assert all(len(set(row)) == 7 and 0 <= min(row) and max(row) < V for row in ids.tolist())


def test_the_two_zeros_are_equals_of_which_the_earlier_token_is_best():
    """As in the greedy choice, `jnp.argmax`; top_k alone ranks 0.0 above -0.0."""
    logits = np.full((2, 300), -1.0, np.float32)
    logits[0, [3, 9, 280]] = -0.0, 0.0, -0.0
    logits[1, [260, 261]] = -0.0, 0.0
    _, ids = map(np.asarray, best(logits, 2))
    assert ids.tolist() == [[3, 9], [260, 261]]
    assert ids[:, 0].tolist() == jnp.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("V", [5, 256, 600])
def test_evenly_spread_noise_gives_every_token_its_share(V):
    """n noises (i + 1/2) / n give a token floor or ceil of n p, but for rounding: within 2 of n p."""
    logits = np.random.default_rng(V).normal(size=V).astype(np.float32) * 1.5
    n = 20_000
    noise = ((np.arange(n) + 0.5) / n).astype(np.float32)
    drawn = np.concatenate([draw(np.broadcast_to(logits, (4000, V)), part) for part in noise.reshape(-1, 4000)])
    p = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(np.bincount(drawn, minlength=V), n * p / p.sum(), atol=2)
    assert (np.diff(drawn) >= 0).all()  # the draw is the inverse of the cumulative distribution


def test_frequencies_pass_a_chi_square_test():
    """Seeded draws of 40 tokens at 20,000 positions; 39 degrees of freedom, 72.1 is the 0.1 % point."""
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32)
    n = 20_000
    noise = jax.jit(uniform_noise)(jnp.full(n, 5, jnp.uint32), jnp.arange(n))
    drawn = draw(np.broadcast_to(logits, (n, 40)), noise)
    p = np.exp(logits.astype(np.float64))
    wanted = n * p / p.sum()
    assert (((np.bincount(drawn, minlength=40) - wanted) ** 2) / wanted).sum() < 72.1


@given(
    seed=st.integers(0, 2**31),
    V=st.sampled_from([3, 256, 300, 1000]),
    possible=st.integers(1, 3),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_impossible_tokens_are_never_drawn(seed, V, possible, scale):
    rng = np.random.default_rng(seed)
    logits = np.full((64, V), -np.inf, np.float32)
    for line in logits:
        line[rng.choice(V, possible, replace=False)] = rng.normal(size=possible) * scale
    noise = rng.random(64, np.float32)
    noise[:8] = [0.0, LARGEST_NOISE, 0.5, 1e-30, 2**-24, 1 - 2**-20, 0.25, 0.75]
    drawn = np.asarray(draw(logits, noise))
    assert np.isfinite(logits[np.arange(64), drawn]).all()


@pytest.mark.parametrize("V", [250, 512, 1000])
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.9, float(LARGEST_NOISE)])
def test_rounding_of_long_sums_never_draws_an_impossible_token(V, noise):
    """Every block ends in impossible tokens, where a search that overshoots by a rounding would stop."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, V)).astype(np.float32)
    logits[:, np.arange(V) % 256 > 200] = -np.inf
    # also noise at the very end of a block, as near as float32 comes to it
    weights = np.exp(logits.astype(np.float64))
    ends = weights[:, :256].sum(axis=1) / weights.sum(axis=1)
    for values in (np.full(400, noise), np.minimum(ends, LARGEST_NOISE), np.nextafter(ends.astype(np.float32), 0)):
        drawn = np.asarray(draw(logits, values.astype(np.float32)))
        assert np.isfinite(logits[np.arange(400), drawn]).all()


@pytest.mark.parametrize("V", [5, 256, 700])
@pytest.mark.parametrize("noise", [0.0, float(LARGEST_NOISE), 1.0])  # 1.0 only by somebody's rounding
def test_extreme_noise_draws_the_first_or_the_last_possible_token(V, noise):
    logits = np.zeros((1, V), np.float32)
    edge = V // 2 - 1  # of 700 tokens, whole blocks at both ends are impossible
    logits[:, :edge] = logits[:, -edge:] = -np.inf
    (token,) = draw(logits, np.array([noise], np.float32)).tolist()
    assert token == (edge if noise == 0 else V - 1 - edge)


def test_noise_is_a_function_of_seed_and_position_alone():
    seeds = jnp.asarray([7, 8, 7, 9, 7], jnp.uint32)
    positions = jnp.asarray([3, 3, 4, 0, 3])
    noise = np.asarray(uniform_noise(seeds, positions))
    assert noise[0] == noise[4]
    assert len(set(noise.tolist())) == 4
    order = np.array([4, 2, 0, 3, 1])
    np.testing.assert_array_equal(uniform_noise(seeds[order], positions[order]), noise[order])
    np.testing.assert_array_equal(uniform_noise(seeds[:1], positions[:1]), noise[:1])


def test_noise_is_uniform():
    noise = np.asarray(uniform_noise(jnp.arange(10_000, dtype=jnp.uint32), jnp.full(10_000, 17)))
    assert noise.min() >= 0 and noise.max() < 1
    counts = np.histogram(noise, bins=20, range=(0, 1))[0]
    assert (((counts - 500) ** 2) / 500).sum() < 43.8  # 19 degrees of freedom, 0.1 % point
