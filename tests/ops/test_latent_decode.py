"""The decoding kernel against plain latent attention; on a mesh, and compiled for TPUs, in processes of their own."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies

from deepseek_jax.model.cache import LatentCache
from deepseek_jax.ops.attention import attend_latents
from deepseek_jax.ops.kernels.latent_decode import latent_decode
from deepseek_jax.parallel.attention import decode_attention
from deepseek_jax.plan.cost_analysis import StepCost, cost_analysis
from deepseek_jax.sharding import LOCAL, Layout, make_mesh

# The kernel is not compiled as it will be used in any case.
pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[2]
SCALE = 0.2
decode = jax.jit(functools.partial(latent_decode, scale=SCALE, interpret=True))


def inputs(B, N, S, *, C=32, R=8, L=None, dtype=jnp.float32, seed=0):
    """Queries, and a cache of one layer or of a stack of L."""
    rng = np.random.default_rng(seed)
    stack = () if L is None else (L,)
    shapes = (B, N, C), (B, N, R), (B, *stack, S, C), (B, *stack, S, R)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@jax.jit
def plain(q_latent, q_rope, c, r, position, layer=None):
    """attend_latents in float32."""
    q_latent, q_rope, c, r = (x.astype(jnp.float32) for x in (q_latent, q_rope, c, r))
    c, r = (c, r) if layer is None else (c[:, layer], r[:, layer])
    mask = jnp.arange(c.shape[1]) <= jnp.asarray(position)[:, None, None]
    return attend_latents(q_latent[:, None], q_rope[:, None], c, r, mask, SCALE)[:, 0]


def spoiled(cache, position):
    """NaN in all slots past each sequence's position."""
    B, S = len(position), cache.shape[-2]
    past = (jnp.arange(S) > jnp.asarray(position)[:, None]).reshape(B, *(1,) * (cache.ndim - 3), S, 1)
    return jnp.where(past, jnp.nan, cache)


@pytest.mark.parametrize(
    ("N", "S", "position", "L"),
    [
        (4, 16, (0, 7, 15), None),
        (1, 64, (63,), 3),
        (8, 1024, (0, 511, 512, 1023), 3),  # two blocks: the ends of each
        (4, 1100, (1023, 1024, 1099), None),  # the last block is cut off
    ],
)
def test_equals_attend_latents(N, S, position, L):
    *q, c, r = inputs(len(position), N, S, L=L)
    layer = None if L is None else L - 1
    got = decode(*q, spoiled(c, position), spoiled(r, position), jnp.array(position), layer and jnp.int32(layer))
    np.testing.assert_allclose(got, plain(*q, c, r, position, layer), rtol=0, atol=1e-5)


def test_each_layer_of_a_stack_is_its_own():
    *q, c, r = inputs(1, 1, 64, L=3)
    for layer in range(3):
        got = decode(*q, c, r, jnp.array([40]), jnp.int32(layer))
        np.testing.assert_allclose(got, plain(*q, c, r, (40,), layer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_bfloat16_rounds_the_weights_and_the_result_only(dtype):
    """Each rounds by 2^-9 of at most the largest latent; queries of either dtype, output in theirs."""
    *q, c, r = inputs(3, 16, 1024, dtype=jnp.bfloat16)
    position = (100, 700, 1023)
    q = [x.astype(dtype) for x in q]
    got = decode(*q, spoiled(c, position), spoiled(r, position), jnp.array(position), None)
    assert got.dtype == dtype
    largest = float(jnp.max(jnp.abs(c.astype(jnp.float32))))
    np.testing.assert_allclose(got.astype(jnp.float32), plain(*q, c, r, position), rtol=0, atol=2**-8 * largest)


def test_large_scores_do_not_overflow():
    """The maximum moves from block to block, downwards in one sequence and upwards in the others."""
    *q, c, r = inputs(3, 2, 1024)
    rising = jnp.linspace(0, 300, 1024)[:, None]
    c = c * jnp.stack([rising, rising[::-1], rising])
    position = (1023, 1023, 700)
    wanted = plain(*q, c, r, position)
    np.testing.assert_allclose(decode(*q, c, r, jnp.array(position), None), wanted, rtol=1e-5, atol=1e-3)


@given(st.lists(st.integers(0, 1023), min_size=3, max_size=3), st.integers(0, 99))
def test_any_positions(position, seed):
    *q, c, r = inputs(3, 2, 1024, seed=seed)
    got = decode(*q, spoiled(c, position), spoiled(r, position), jnp.array(position), None)
    np.testing.assert_allclose(got, plain(*q, c, r, position), rtol=0, atol=1e-5)


def test_a_position_beyond_the_last_slot_sees_all():
    *q, c, r = inputs(3, 4, 16)
    np.testing.assert_array_equal(*(decode(*q, c, r, jnp.array([3, 15, at]), None) for at in (15, 40)))


def test_rotated_keys_may_be_stored_wider_than_they_are():
    q_latent, q_rope, c, r = inputs(2, 4, 32)
    arguments = jnp.array([[3], [31]]), None
    wide = jnp.pad(r, ((0, 0), (0, 0), (0, 8)))
    attend = functools.partial(decode_attention, q_latent[:, None], q_rope[:, None], c, scale=SCALE, layout=LOCAL)
    np.testing.assert_allclose(attend(wide, *arguments), attend(r, *arguments), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [None, 1])
def test_without_a_mesh_decoding_is_plain_attention_off_tpu(layer):
    q_latent, q_rope, c, r = inputs(2, 4, 32, L=None if layer is None else 2)
    position = jnp.array([3, 31])
    place = None if layer is None else jnp.int32(layer)
    arguments = q_latent[:, None], q_rope[:, None], c, r, position[:, None], place
    got = decode_attention(*arguments, scale=SCALE, layout=LOCAL)
    np.testing.assert_allclose(got[:, 0], plain(q_latent, q_rope, c, r, position, layer), rtol=0, atol=1e-5)


def test_two_tokens_a_sequence_are_refused():
    with pytest.raises(ValueError, match="got 2 tokens a sequence, wanted 1"):
        two = jnp.zeros((1, 2, 4, 32)), jnp.zeros((1, 2, 4, 8))
        cache = jnp.zeros((1, 16, 32)), jnp.zeros((1, 16, 8))
        decode_attention(*two, *cache, jnp.zeros((1, 2), jnp.int32), None, scale=SCALE, layout=LOCAL)


# --- on eight devices, and for TPUs --------------------------------------------------------------


def in_a_process(law: Callable[..., None], *arguments: str, **environment: str) -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **environment}
    code = f"from tests.ops import test_latent_decode as laws; laws.{law.__name__}(*{arguments})"
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr


def a_mesh_changes_nothing() -> None:
    layout = Layout(mesh=make_mesh(data=2, expert=2, tensor=2), workload="serve")
    q_latent, q_rope, c, r = inputs(16, 4, 32, L=2)
    position = jnp.arange(16) * 2
    run = jax.jit(functools.partial(decode_attention, scale=SCALE, layout=layout))
    got = run(q_latent[:, None], q_rope[:, None], c, r, position[:, None], jnp.int32(1))
    assert got.sharding.is_equivalent_to(layout.sharding("cache_batch", None, None, None), 4)
    np.testing.assert_allclose(got[:, 0], plain(q_latent, q_rope, c, r, position, 1), rtol=0, atol=1e-5)


def test_on_eight_devices():
    in_a_process(a_mesh_changes_nothing, XLA_FLAGS="--xla_force_host_platform_device_count=8")


# DeepSeek-V3's heads and latents, 16 sequences a chip; rotated keys stored in as many lanes as a TPU has.
HEADS, SLOTS, LATENT, ROPE, LANES, LAYERS = 128, 4096, 512, 64, 128, 61


def layout_for(topology: str) -> Layout:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Layout(mesh=make_mesh(devices, expert=len(devices) // 2, tensor=2), workload="serve", scan_layers=True)


def cost_of(function: Callable, topology: str, layers: int, *, with_layer: bool) -> StepCost:
    """Of function(queries, caches, positions and perhaps layer), with the caches as they lie by default."""
    layout = layout_for(topology)
    B = 16 * layout.mesh.size
    of = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        (B, *sizes), dtype, sharding=layout.sharding("cache_batch")
    )
    arguments = [of(1, HEADS, LATENT), of(1, HEADS, ROPE), of(layers, SLOTS, LATENT), of(layers, SLOTS, LANES)]
    arguments += [of(1, dtype=jnp.int32)]
    arguments += [jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.sharding())] if with_layer else []
    jitted = jax.jit(functools.partial(function, layout=layout), donate_argnums=(2, 3))
    return cost_analysis(jitted.lower(*arguments).compile().as_text(), dict(layout.mesh.shape))


def attend_once(q_latent, q_rope, c, r, positions, layer, layout):
    return decode_attention(q_latent, q_rope, c, r, positions, layer, scale=SCALE, layout=layout)


def decode_tokens(q_latent, q_rope, c, r, positions, layout, tokens):
    """The loops of decoding: tokens, and inside layers, each of which writes the cache and attends to its own."""

    wide = jnp.pad(q_rope[:, :, 0], ((0, 0), (0, 0), (0, LANES - ROPE)))

    def layer(carried, place):
        q, cache, positions = carried
        cache = cache.write(LatentCache(q[:, :, 0], wide, None), positions, place)
        q = decode_attention(q, q_rope, cache.c_BSC, cache.r_BSR, positions, place, scale=SCALE, layout=layout)
        return (q, cache, positions), None

    def token(carried, _):
        (q, cache, positions), _ = jax.lax.scan(layer, carried, jnp.arange(LAYERS))
        return (q, cache, positions + 1), None

    cache = LatentCache(c, r, None)
    return jax.lax.scan(token, (q_latent, cache, positions), length=tokens)[0]


def a_call_reads_one_layer_once(topology: str) -> None:
    found = cost_of(attend_once, topology, 4, with_layer=True)
    assert found.flops == 16 * flops_of_a_sequence()
    assert found.bytes_accessed == pytest.approx(16 * bytes_of_a_sequence(), rel=0.1)
    assert found.collectives == ()


def a_token_reads_every_layer_once(topology: str) -> None:
    """The difference of two numbers of tokens: what is done once before and after them does not count."""
    few, many = (
        cost_of(functools.partial(decode_tokens, tokens=tokens), topology, LAYERS, with_layer=False)
        for tokens in (4, 12)
    )
    assert many.flops - few.flops == 8 * LAYERS * 16 * flops_of_a_sequence()
    moved = (many.bytes_accessed - few.bytes_accessed) / 8
    assert moved == pytest.approx(LAYERS * 16 * bytes_of_a_sequence(), rel=0.1)


def flops_of_a_sequence() -> int:
    return 2 * HEADS * SLOTS * (2 * LATENT + LANES)


def bytes_of_a_sequence() -> int:
    """bfloat16: one layer's cache, the queries and the output."""
    return 2 * (SLOTS * (LATENT + LANES) + HEADS * (2 * LATENT + LANES))


@pytest.mark.slow
@pytest.mark.parametrize("law", [a_call_reads_one_layer_once, a_token_reads_every_layer_once])
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x4", "v6e:2x4"])
def test_compiles_for_tpus(topology, law):
    if find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install -e '.[pod]'")
    # there is no TPU to look for or to share
    in_a_process(law, topology, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
