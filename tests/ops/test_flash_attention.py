"""Attention by tiles, and jax's TPU kernel on a CPU's model of one, against one query at a time in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops.attention import attend, causal_mask, same_segment
from deepseek_jax.ops.flash_attention import Tiling, flash_attention
from deepseek_jax.ops.kernels import splash

SCALE = 0.37


def exact(q, k, v, segments, seed, prompt_of=None):
    """Result, logarithms of the sums, and the gradients of sum(seed * result) in float64, query by query."""
    (B, T, N, _), G = q.shape, k.shape[1]
    out, log_sum = np.zeros((B, T, N, v.shape[-1])), np.zeros((B, T, N))
    d_q, d_k, d_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, t, n in np.ndindex(B, T, N):
        g = n // (N // G)
        begins = segments[b, t] if prompt_of is None else prompt_of[b, t]
        seen = [s for s in range(t + 1) if segments[b, s] in (segments[b, t], begins)]
        scores = k[b, g, seen] @ q[b, t, n] * SCALE
        log_sum[b, t, n] = np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
        weights = np.exp(scores - log_sum[b, t, n])
        out[b, t, n] = weights @ v[b, g, seen]
        d_weights = v[b, g, seen] @ seed[b, t, n]
        d_scores = weights * (d_weights - weights @ d_weights) * SCALE
        d_q[b, t, n] = d_scores @ k[b, g, seen]
        d_k[b, g, seen] += np.outer(d_scores, q[b, t, n])
        d_v[b, g, seen] += np.outer(weights, seed[b, t, n])
    return out, log_sum, d_q, d_k, d_v


def inputs(T, *, B=2, N=4, G=2, K=6, H=5, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    ids = np.sort(rng.integers(0, 4, size=(B, T)), axis=1)
    return normal(B, T, N, K), normal(B, G, T, K), normal(B, G, T, H), ids, normal(B, T, N, H)


def by_tiles(q, k, v, segments, seed, prompt_of=None, *, side, dtype=jnp.float32):
    """What `exact` gives, a tile of `side` queries and keys at a time."""
    tiling = Tiling(q.shape[1], 1, side)
    at, pairs = jnp.asarray(tiling.positions()[0]), jnp.asarray(tiling.pairs()[0])
    ids = None if segments is None else (jnp.asarray(segments),) * 2
    ids = ids if prompt_of is None else (*ids, jnp.asarray(prompt_of))

    @jax.jit
    def run(q, k, v):
        attend = lambda q, k, v: flash_attention(q, k, v, ids, at, pairs, side=side, scale=SCALE)
        (out, log_sum), back = jax.vjp(attend, q, k, v)
        return out, log_sum, *back((jnp.asarray(seed, dtype), jnp.zeros_like(log_sum)))

    return run(*(jnp.asarray(of, dtype) for of in (q, k, v)))


def by_kernel(q, k, v, segments, seed, *, dtype=jnp.float32):
    """The same by jax's kernel, and None for the logarithms, which it gives or a gradient."""
    T, N = q.shape[1:3]
    of = splash.tiling(T, 1)
    wider = lambda x, axis, to: np.pad(x, [(0, to - x.shape[axis]) if at == axis else (0, 0) for at in range(x.ndim)])
    given = wider(q, 1, of.padded), wider(k, 2, of.keys), wider(v, 2, of.keys)
    ids = None if segments is None else (jnp.asarray(wider(segments, 1, of.padded)),) * 2

    @jax.jit
    def run(q, k, v):
        kernel = splash.kernel(of, N, interpret=True)
        attend = lambda q, k, v: splash.splash_attention(kernel, q, k, v, ids, scale=SCALE)[0][:, :T]
        out, back = jax.vjp(attend, q, k, v)
        d_q, d_k, d_v = back(jnp.asarray(seed, dtype))
        return out, d_q[:, :T], d_k[:, :, :T], d_v[:, :, :T]

    out, *gradients = run(*(jnp.asarray(part, dtype) for part in given))
    return out, None, *gradients


def worst(found, wanted):
    """The largest error of each, over the largest number that it should have."""
    far = lambda got, want: np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))
    return [far(got, want) for got, want in zip(found, wanted, strict=True) if got is not None]


@pytest.mark.parametrize("side", [1, 4, 12])
def test_tiles_equal_one_query_at_a_time_in_value_and_gradient(side):
    case = inputs(12)
    assert max(worst(by_tiles(*case, side=side), exact(*case))) < 2e-6


@pytest.mark.parametrize("side", [1, 4])
def test_tiles_see_the_prompt_that_samples_share(side):
    q, k, v, _, seed = inputs(12)
    segments = np.array([[5, 5, 5, 1, 1, 2, 2, 2, 6, 3, 4, 0], [1, 1, 5, 5, 5, 5, 2, 3, 3, 0, 0, 0]])
    prompt_of = np.array([[5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 0], [1, 1, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0]])
    case = q, k, v, segments, seed, prompt_of
    assert max(worst(by_tiles(*case, side=side), exact(*case))) < 2e-6


def test_whole_rows_are_one_segment():
    q, k, v, _, seed = inputs(12, N=4, G=4)
    wanted = exact(q, k, v, np.zeros((2, 12), int), seed)
    assert max(worst(by_tiles(q, k, v, None, seed, side=4), wanted)) < 2e-6


def test_bfloat16_rounds_what_it_reads_and_no_sum():
    """Inputs that bfloat16 holds: what is left are its weights and results, 2^-8 of the largest at most each."""
    held = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) if x.dtype.kind == "f" else x
    case = [held(x) for x in inputs(32)]
    found = by_tiles(*case, side=8, dtype=jnp.bfloat16)
    assert found[0].dtype == found[2].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
    assert max(worst(found, exact(*case))) < 2**-7


def test_the_logarithm_of_the_sum_has_its_gradient():
    q, k, v, ids, seed = inputs(8)
    tiling = Tiling(8, 1, 4)
    at, pairs = jnp.asarray(tiling.positions()[0]), jnp.asarray(tiling.pairs()[0])
    weight = jnp.asarray(seed[..., 0], jnp.float32)

    def by_tiles(q, k, v):
        given = (jnp.asarray(ids),) * 2
        return jnp.sum(weight * flash_attention(q, k, v, given, at, pairs, side=4, scale=SCALE)[1])

    def whole(q, k, v):
        positions = jnp.tile(jnp.arange(8), (2, 1))
        mask = same_segment(causal_mask(positions, positions), jnp.asarray(ids), jnp.asarray(ids))
        scores = jnp.einsum("btnk,bnsk->bnts", q, jnp.repeat(k, 2, axis=1)) * SCALE
        return jnp.sum(
            weight * jnp.moveaxis(jax.nn.logsumexp(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1), 1, 2)
        )

    given = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    run = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*given)
    for got, wanted in zip(*map(jax.tree.leaves, (run(by_tiles), run(whole))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_tile_that_segments_hide_is_not_computed():
    """NaN there reaches nothing, though a weight of 0 times NaN would."""
    q, k, v, _, seed = inputs(12)
    segments = np.repeat([[1, 2, 3]], 2, axis=0).repeat(4, axis=1)
    prompt_of = np.where(segments == 3, 1, segments)  # the third of three tiles sees the first and itself
    k[:, :, 4:8], v[:, :, 4:8], seed[:, 4:8] = np.nan, np.nan, 0
    got = by_tiles(q, k, v, segments, seed, prompt_of, side=4)
    k[:, :, 4:8], v[:, :, 4:8] = 0, 0
    wanted = exact(q, k, v, segments, seed, prompt_of)
    for place, axis in ((0, 1), (1, 1), (2, 1), (3, 2), (4, 2)):
        kept = lambda of, axis=axis: np.delete(np.asarray(of), np.s_[4:8], axis=axis)
        np.testing.assert_allclose(kept(got[place]), kept(wanted[place]), rtol=1e-5, atol=1e-6)


def test_no_array_has_all_scores():
    """Temporaries of value and gradient grow as the sequence does, where the plain form's grow as its square."""

    def memory(T, attend):
        shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
        given = shape(1, T, 2, 8), shape(1, 2, T, 8), shape(1, 2, T, 8)
        run = jax.jit(jax.grad(lambda *of: jnp.sum(attend(*of) ** 2), argnums=(0, 1, 2)))
        return run.lower(*given).compile().memory_analysis().temp_size_in_bytes

    def by_tiles(q, k, v):
        tiling = Tiling(q.shape[1], 1, 64)
        at, pairs = jnp.asarray(tiling.positions()[0]), jnp.asarray(tiling.pairs()[0])
        return flash_attention(q, k, v, None, at, pairs, side=64, scale=SCALE)[0]

    def plain(q, k, v):
        at = jnp.arange(q.shape[1])[None]
        return attend(q, k, v, causal_mask(at, at), SCALE)

    assert memory(2048, by_tiles) < 2.2 * memory(1024, by_tiles)
    assert memory(1024, by_tiles) < 4 * 2 * 1024**2 / 2 < memory(1024, plain)


# --- which tiles meet ----------------------------------------------------------------------------


@given(parts=st.integers(1, 5), rows=st.integers(1, 12), side=st.integers(1, 5))
def test_every_query_has_one_place_and_meets_all_that_it_sees(parts, rows, side):
    of = Tiling(parts * rows, parts, side)
    positions, pairs = of.positions(), of.pairs()
    assert positions.shape == (parts, of.chunks * of.padded) and set(positions.flat) == set(range(of.length))
    for at, meet in zip(positions, pairs, strict=True):
        by_tile = at.reshape(-1, side)
        wanted = {(i, j) for i, tile in enumerate(by_tile) for j in range(of.keys // side) if j * side <= tile.max()}
        listed = [tuple(pair) for pair in meet.tolist()]
        spare = [pair for pair in listed if pair not in wanted]
        assert wanted <= set(listed) and len(set(listed)) + max(0, len(spare) - 1) == len(listed)
        assert all(j * side > by_tile[i].max() for i, j in spare)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_devices_that_share_a_sequence_have_half_of_all_tiles_each(parts):
    """And as many: 1/2 and half a tile a row, where each would have all keys."""
    of = Tiling(64 * parts, parts, 4)
    counts = [len({tuple(pair) for pair in meet.tolist()}) for meet in of.pairs()]
    everything = (of.rows // 4) * (of.keys // 4)
    assert len(set(counts)) == 1 and counts[0] == everything * (1 + 4 / of.length) / 2


# --- the TPU's kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize("length, widths, heads", [(300, (24, 16), (4, 2)), (128, (192, 128), (2, 2))])
def test_the_kernel_equals_one_query_at_a_time(length, widths, heads):
    """Unequal widths, grouped heads, packed rows, and a length that is no whole tile."""
    case = inputs(length, B=1, N=heads[0], G=heads[1], K=widths[0], H=widths[1])
    assert max(worst(by_kernel(*case), exact(*case))) < 1e-5


def test_the_kernel_gives_the_logarithms_of_the_sums():
    q, k, v, ids, seed = inputs(128, B=1)
    kernel = splash.kernel(splash.tiling(128, 1), 4, sums=True, interpret=True)
    given = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out, log_sum = jax.jit(lambda *of: splash.splash_attention(kernel, *of, (jnp.asarray(ids),) * 2, scale=SCALE))(
        *given
    )
    assert max(worst((out, log_sum), exact(q, k, v, ids, seed)[:2])) < 1e-5


@pytest.mark.parametrize(
    "length, parts, side, fused",
    [(4096, 1, 512, 512), (1000, 1, 512, 512), (640, 1, 128, 128), (16384, 1, 512, 2048), (65536, 1, 512, None)],
)
def test_the_queries_gradient_is_left_in_eight_parts_at_most(length, parts, side, fused):
    of = splash.tiling(length, parts)
    blocks = splash.blocks(of, number=2, segmented=False)
    assert of.side == side and blocks.use_fused_bwd_kernel == (fused is not None)
    assert blocks.block_kv_dkv == (fused or 2048)


@pytest.mark.parametrize("length, parts, side", [(4100, 1, 512), (2100, 1, 256), (640, 1, 128), (33024, 8, 256)])
def test_tiles_are_large_where_they_pad_an_eighth_more_than_small_ones_at_most(length, parts, side):
    """A length that is no multiple of 512, as of prompts and completions, has no tiles of 128 for that."""
    of, least = splash.tiling(length, parts), Tiling(length, parts, 128)
    assert of.side == side
    assert of.padded <= 9 / 8 * least.padded and of.keys <= 9 / 8 * least.keys


@pytest.mark.parametrize(
    "length, parts, queries", [(4096, 1, 512), (8192, 1, 1024), (32768, 1, 2048), (32768, 8, 2048)]
)
def test_long_sequences_read_keys_for_more_queries_at_a_time(length, parts, queries):
    """Where tiles behind the mask are a sixteenth of those that count at most."""
    of = splash.tiling(length, parts)
    assert splash.blocks(of, number=2, segmented=False).block_q == queries
    assert of.padded % queries == of.keys % queries == 0
    met = lambda side: of.keys // side * (of.keys // side + 1) // 2 * side**2
    assert met(queries) <= 17 / 16 * met(of.side)


@pytest.mark.parametrize(
    "number, segmented, queries, keys", [(2, True, 1024, 2048), (4, False, 1024, 1024), (4, True, 1024, 1024)]
)
def test_segments_and_wide_numbers_leave_room_for_fewer_at_a_time(number, segmented, queries, keys):
    """The TPU's compiler has no room for 2,048 packed queries, nor float32 ones, but for as many packed keys."""
    blocks = splash.blocks(splash.tiling(32768, 1), number=number, segmented=segmented)
    assert blocks.block_q == blocks.block_q_dq == blocks.block_kv_dkv == queries
    blocks = splash.blocks(splash.tiling(16384, 1), number=number, segmented=segmented)
    assert max(blocks.block_kv_dkv, blocks.block_q_dq or 0) == keys


@pytest.mark.parametrize("number", [2, 4])
def test_a_mask_of_chosen_keys_leaves_room_for_fewer_at_a_time(number):
    """The TPU's compiler has no room for one of 2,048 keys; where it is large altogether, tiles have bits."""
    for length in (8192, 16384):
        blocks = splash.blocks(splash.tiling(length, 1), number=number, segmented=False, chosen=True)
        assert max(blocks.block_q, blocks.block_kv_dkv, blocks.block_q_dq or 0) <= 1024
    fits = lambda length, parts: splash.mask_fits(splash.tiling(length, parts))
    assert fits(8192, 1) and fits(32768, 8) and not fits(16384, 1) and not fits(32768, 4)


@pytest.mark.parametrize("parts", [8, 1])  # the queries' gradient by the same kernel as the keys', or by its own
def test_blocks_of_several_tiles_compute_the_same(parts, monkeypatch):
    monkeypatch.setattr(splash, "_long", lambda of, most: 2 * of.side)
    monkeypatch.setattr(splash, "_PARTS", parts)
    monkeypatch.setattr(splash, "_MOST_KEYS", 128)
    monkeypatch.setattr(splash, "tiling", lambda length, parts: Tiling(length, parts, 128))
    monkeypatch.setattr(splash, "kernel", splash.kernel.__wrapped__)  # what is kept has other blocks
    of = Tiling(512, 1, 128)
    assert splash.blocks(of, number=4, segmented=True).use_fused_bwd_kernel == (parts == 8)
    case = inputs(512, B=1, N=2, G=2)
    assert max(worst(by_kernel(*case), exact(*case))) < 1e-5
