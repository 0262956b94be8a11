"""The decoding kernels against one query at a time in float64, as plain JAX and on jax's model of a TPU.

Compiled for TPUs that are not there, in a process of their own, they move what they read and no more.
"""

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.ops.kernels import paged_decode
from deepseek_jax.ops.pool import CacheView, KVCache, LatentCache, Pool
from deepseek_jax.plan.cost_analysis import StepCost, cost_analysis
from tests.ops.paged_cases import CODES, Case, make_case, oracle, pool_of, seen_by, spelled

# The kernels are not compiled as they will be used in any case.
pytestmark = pytest.mark.usefixtures("quick_compilation")

SCALE = 0.3
S, M, TILE = 4, 5, 8  # tokens a block, blocks a row, keys a tile: the third tile has one block only
LENGTHS = [0, 1, 3, 4, 0, 0, 8, 9, 17, 18]  # idle rows first, alone and in a row; whole tiles, and what is left of one


def latent_case(seed, seen, **options) -> Case:
    return make_case(seed, seen, s=S, M=M, N=4, widths=(16, 8), **options)


def grouped_case(seed, seen, **options) -> Case:
    case = make_case(seed, seen, s=S, M=M, N=6, widths=(8, 8), heads=(2,), **options)
    return case._replace(queries=case.queries[:1])


def exact(case: Case) -> np.ndarray:
    pools = case.pools if len(case.queries) == 1 else [pool[:, None] for pool in case.pools]
    return oracle(case.queries, pools[: len(case.queries)], pools[2 - len(case.queries)], *case[2:], SCALE)


@functools.cache
def compiled(T: int, grouped: bool, dtype: str, interpret=True):
    """One program for all cases of a shape."""
    decode = paged_decode.grouped_decode if grouped else paged_decode.latent_decode

    def run(queries, pool, table, seen):
        return decode(*queries, pool, table, seen, SCALE, keys_at_once=TILE, interpret=interpret)

    run = jax.jit(run)

    def of_case(case: Case, pool: Pool | None = None):
        queries = [jnp.asarray(q, dtype) for q in case.queries]
        return run(queries, pool_of(case, dtype) if pool is None else pool, case.table_BM, case.seen_BT)

    return of_case


@pytest.mark.parametrize(
    ("make", "T", "shared"), [(latent_case, 1, False), (latent_case, 3, True), (grouped_case, 3, True)]
)
def test_equals_one_query_at_a_time(make, T, shared):
    """Idle rows get zeros; NaN wherever no row looks reaches nothing."""
    case = make(T, seen_by(LENGTHS, T), shared=shared)
    got = compiled(T, make is grouped_case, "float32")(case)
    np.testing.assert_allclose(got, exact(case), rtol=0, atol=2e-6)
    assert not np.any(got[0])


@pytest.mark.parametrize("make", [latent_case, grouped_case])
@given(
    seen=st.lists(st.lists(st.integers(0, S * M), min_size=3, max_size=3), min_size=10, max_size=10),
    seed=st.integers(0, 99),
)
def test_whatever_each_query_sees(make, seen, seed):
    case = make(seed, np.array(seen, np.int32))
    got = compiled(3, make is grouped_case, "float32")(case)
    np.testing.assert_allclose(got, exact(case), rtol=0, atol=2e-6)


def test_large_scores_do_not_overflow():
    """Scores of up to a thousand: the maximum moves from tile to tile."""
    case = latent_case(6, seen_by(LENGTHS, 3))
    case = case._replace(queries=[300 * q for q in case.queries])
    np.testing.assert_allclose(compiled(3, False, "float32")(case), exact(case), rtol=0, atol=5e-4)


def test_more_keys_than_the_table_has_are_all_of_them():
    case = latent_case(7, seen_by([20] * 10, 1))
    run = compiled(1, False, "float32")
    np.testing.assert_array_equal(run(case._replace(seen_BT=case.seen_BT + 5)), run(case))


def test_bfloat16_rounds_the_weights_and_the_result_only():
    """Each rounds by 2^-9 of at most the largest latent."""
    case = latent_case(3, seen_by(LENGTHS, 1))
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    case = case._replace(queries=[*map(rounded, case.queries)], pools=[*map(rounded, case.pools)])
    got = compiled(1, False, "bfloat16")(case)
    assert got.dtype == jnp.bfloat16
    largest = np.nanmax(np.abs(case.pools[0]))
    np.testing.assert_allclose(np.asarray(got, np.float64), exact(case), rtol=0, atol=2**-8 * largest)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (latent_case, jnp.float8_e4m3fn),
        (grouped_case, jnp.int8),
        pytest.param(latent_case, jnp.int8, marks=pytest.mark.slow),
        pytest.param(grouped_case, jnp.float8_e4m3fn, marks=pytest.mark.slow),
    ],
)
def test_codes_are_what_they_mean(make, dtype):
    """Queries are bfloat16; weights by their values' scale and the result are rounded, by 2^-9 of the largest value."""
    case = make(12, seen_by(LENGTHS, 3), shared=True)
    case = case._replace(queries=[np.asarray(jnp.asarray(q, jnp.bfloat16), np.float64) for q in case.queries])
    pool = pool_of(case, dtype, lanes=8)
    coded = spelled(pool, case)
    got = compiled(3, make is grouped_case, "bfloat16")(case, pool)
    assert got.dtype == jnp.bfloat16 and not np.any(got[0])
    largest = np.nanmax(np.abs(coded.pools[1 if make is grouped_case else 0]))
    np.testing.assert_allclose(np.asarray(got, np.float64), exact(coded), rtol=0, atol=2**-8 * largest)


def test_copies_are_of_what_is_seen_and_have_arrived_before_it_is_read():
    """On a model of a TPU that makes a copy when it is waited for, into memory of NaN, and none of a block there isn't.

    The other tests' copies are made when they are started.
    """
    case = latent_case(4, seen_by(LENGTHS, 1))
    case = case._replace(table_BM=np.where(case.table_BM == 0, 10_000, case.table_BM))
    late = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    got = compiled(1, False, "float32", late)(case)
    np.testing.assert_allclose(got, exact(case), rtol=0, atol=2e-6)


def test_what_fits_is_a_matter_of_the_width():
    latents = lambda *widths: LatentCache(*(of(9, 16, width) for width in widths))
    assert [paged_decode.fits(latents(512, r, 64)) for r in (64, 128, 192, 256)] == [False, True, False, True]
    codes = lambda s: LatentCache(of(9, s, 512, dtype=jnp.int8), of(9, s, 128), None)
    assert [paged_decode.fits(codes(s)) for s in (16, 64)] == [True, False]  # the latter's pools would be copied
    heads = lambda width, scales: KVCache(of(9, 8, 16, width), of(9, 8, 16, width), of(9, 1, 16, scales))
    assert [paged_decode.fits(heads(*widths)) for widths in ((128, 128), (64, 128), (128, 16))] == [True, False, False]


# --- compiled for TPUs ---------------------------------------------------------------------------

ROWS, CONTEXT, TOKENS, LAYERS = 16, 4096, 2, 5


def cost_of(function, topology: str, *arguments, donated=()) -> StepCost:
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), arguments)
    compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    return cost_analysis(compiled.as_text(), {"chip": 1})


def of(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def of_latents(pages: int, s: int, codes=None) -> LatentCache:
    return LatentCache(of(pages, s, 512, dtype=codes or jnp.bfloat16), of(pages, s, 128), None)


def of_heads(pages: int, s: int, codes=None) -> KVCache:
    part = of(pages, 8, s, 128, dtype=codes or jnp.bfloat16)
    return KVCache(part, part, codes and of(pages, 1, s, 128))


def calls_move_what_the_rows_see(topology: str, s: int) -> None:
    """Pools of twice what the tables hold. R1's latents; then Llama-like heads, whose groups are not of eight."""
    T, M, pages = 3, CONTEXT // s, 2 * ROWS * CONTEXT // s
    of_rows = of(ROWS, M, dtype=jnp.int32), of(ROWS, T, dtype=jnp.int32)
    latent, grouped = (of(ROWS, T, 128, 512), of(ROWS, T, 128, 64)), (of(ROWS, T, 32, 128),)
    # rotated queries are widened from 64 to 128
    others = 2 * ROWS * T * 128 * (640 + 512 + 64 + 128), 2 * ROWS * T * 32 * 256
    for codes in (None, *CODES):
        size = 1 if codes else 2
        of_token = size * 512 + 2 * 128, size * 8 * 256 + (2 * 128 if codes else 0)
        calls = (
            (paged_decode.latent_decode, latent, of_latents(pages, s, codes), of_token[0], others[0]),
            (paged_decode.grouped_decode, grouped, of_heads(pages, s, codes), of_token[1], others[1]),
        )
        for decode, queries, pool, keys, rest in calls:
            found = cost_of(functools.partial(decode, scale=SCALE), topology, *queries, pool, *of_rows)
            keys *= ROWS * CONTEXT
            assert 0.99 * keys < found.bytes_accessed < 1.02 * (keys + rest)


def tokens_move_every_layer_once(topology: str, s: int, codes=None) -> None:
    """The loops of decoding: tokens, and inside layers, each of which writes its own part of a stack and reads it."""
    M, pages = CONTEXT // s, ROWS * CONTEXT // s

    def decode(q, q_rope, pool, table, seen, tokens):
        def layer(carried, layer_idx):
            latest_BC, pool, seen = carried
            ids = table + layer_idx * pages
            new = LatentCache(latest_BC[:, None], latest_BC[:, None, :64], None)
            pool = pool.write(new, CacheView(ids, seen + 1))
            out = paged_decode.latent_decode(q, q_rope, pool, ids, seen + 1, SCALE)
            return (out[:, 0, 0], pool, seen), None

        def token(carried, _):
            (*others, seen), _ = jax.lax.scan(layer, carried, jnp.arange(LAYERS))
            return (*others, seen + 1), None

        return jax.lax.scan(token, (q[:, 0, 0], pool, seen), length=tokens)[0]

    arguments = of(ROWS, 1, 128, 512), of(ROWS, 1, 128, 64), of_latents(LAYERS * pages, s, codes)
    of_rows = of(ROWS, M, dtype=jnp.int32), of(ROWS, 1, dtype=jnp.int32)
    few, many = (
        cost_of(functools.partial(decode, tokens=tokens), topology, *arguments, *of_rows, donated=(2,))
        for tokens in (TOKENS, 2 * TOKENS)
    )
    # queries and output may stay in VMEM; rotated queries are widened from 64 to 128
    keys, others = ROWS * CONTEXT * ((1 if codes else 2) * 512 + 2 * 128), 2 * ROWS * 128 * (640 + 512 + 64 + 128)
    moved = (many.bytes_accessed - few.bytes_accessed) / TOKENS
    assert 0.99 * LAYERS * keys < moved < 1.01 * LAYERS * (keys + others)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("s", [16, 64])
def test_compiles_for_tpus(topology, s):
    if find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install -e '.[pod]'")
    at = f"{topology!r}, {s}"
    kinds = (None, "*laws.CODES[:1]") if s == 16 else (None,)  # of codes, what `fits`
    loops = "; ".join(f"laws.tokens_move_every_layer_once({at}, {codes})" for codes in kinds)
    laws = f"laws.calls_move_what_the_rows_see({at}); {loops}"
    # there is no TPU to look for or to share
    no_tpu = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    code = f"from tests.ops import test_paged_decode as laws; {laws}"
    environment = {**os.environ, **no_tpu, "PYTHONPATH": path}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
