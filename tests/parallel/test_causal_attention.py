"""Attention over devices gives what one device gives, forward and gradient; eight devices in a process of their own.

Compiled for TPUs that are not there, in a process of its own, it costs the tiles that the mask leaves.
"""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies

from deepseek_jax.config import preset
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.ops.attention import attend, causal_mask, same_segment
from deepseek_jax.ops.indexer import Index
from deepseek_jax.ops.kernels import splash
from deepseek_jax.parallel import causal_attention as module
from deepseek_jax.parallel.causal_attention import causal_attention
from deepseek_jax.plan.cost_analysis import cost_analysis
from deepseek_jax.sharding import LOCAL, Layout, make_mesh
from tests.laws import fixture_of

B, N, G, K, H = 2, 4, 2, 6, 5
SCALE = 0.37


def inputs(T: int, packed: bool, N: int = N, G: int = G):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    ids = jnp.asarray(np.sort(rng.integers(0, 4, size=(B, T)), axis=1), jnp.int32) if packed else None
    return (normal(B, T, N, K), normal(B, G, T, K), normal(B, G, T, H)), ids, normal(B, T, N, H)


def plain(q, k, v, ids):
    at = jnp.tile(jnp.arange(q.shape[1]), (q.shape[0], 1))
    mask = causal_mask(at, at)
    return attend(q, k, v, mask if ids is None else same_segment(mask, ids, ids), SCALE)


def equals_all_pairs_at_once(layout: Layout, T: int, packed: bool, *heads: int) -> None:
    given, ids, seed = inputs(T, packed, *heads)
    of_layout = lambda *of: causal_attention(*of, ids, scale=SCALE, layout=layout)[0]
    run = lambda f: jax.jit(jax.value_and_grad(lambda *of: jnp.sum(seed * f(*of)), argnums=(0, 1, 2)))(*given)
    pairs = zip(*map(jax.tree.leaves, (run(of_layout), run(lambda *of: plain(*of, ids)))), strict=True)
    for name, (got, wanted) in zip(("y", "d q", "d k", "d v"), pairs, strict=True):
        message = f"{name}, {T} tokens, packed {packed}, {layout.mesh}"
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5, err_msg=message)
    out = jax.jit(lambda *of: causal_attention(*of, ids, scale=SCALE, layout=layout, sums=True)[0])(*given)
    np.testing.assert_allclose(out, plain(*given, ids), rtol=1e-4, atol=1e-5)


def chosen_keys_equal_a_mask_of_float64_scores(layout: Layout, T: int, packed: bool, count: int) -> None:
    """Values and gradients; the mask is of the formula and of a sort, all pairs at once."""
    given, ids, seed = inputs(T, packed)
    rng = np.random.default_rng(1)
    iq, iw, ik = (rng.normal(size=of).astype(np.float32) for of in ((B, T, 3, 8), (B, T, 3), (B, T, 8)))
    iw[:, ::3] = 0  # all keys are then liked as much, and the earliest are taken
    at = np.arange(T)
    visible = np.broadcast_to(at <= at[:, None], (B, T, T))
    if packed:
        visible = visible & (np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None])
    dots = np.maximum(np.einsum("btjz,bsz->btsj", iq.astype(np.float64), ik.astype(np.float64)), 0)
    liked = np.where(visible, np.einsum("btsj,btj->bts", dots, iw.astype(np.float64)), -np.inf)
    rank = np.argsort(np.argsort(-liked, axis=-1, kind="stable"), axis=-1)
    mask = jnp.asarray(visible & (rank < count))
    assert 0.05 < mask.mean() / visible.mean() < 0.9
    index = Index(q=jnp.asarray(iq), weights=jnp.asarray(iw), k=jnp.asarray(ik), count=count)
    of_layout = lambda *of: causal_attention(*of, ids, scale=SCALE, layout=layout, index=index)[0]
    run = lambda f: jax.jit(jax.value_and_grad(lambda *of: jnp.sum(seed * f(*of)), argnums=(0, 1, 2)))(*given)
    wanted = run(lambda *of: attend(*of, mask, SCALE))
    for name, (got, of_mask) in zip(
        ("y", "d q", "d k", "d v"), zip(*map(jax.tree.leaves, (run(of_layout), wanted)), strict=True), strict=True
    ):
        message = f"{name}, {T} tokens, packed {packed}, {layout.mesh}"
        np.testing.assert_allclose(got, of_mask, rtol=1e-4, atol=2e-5, err_msg=message)


def on_mesh(**sizes: int) -> Layout:
    return Layout(mesh=make_mesh(**sizes))


# --- laws for eight devices ----------------------------------------------------------------------


def devices_that_share_nothing_equal_all_pairs_at_once():
    equals_all_pairs_at_once(Layout(mesh=make_mesh(jax.devices()[:4], expert=2, tensor=2)), 300, True)


def devices_that_share_a_sequence_equal_all_pairs_at_once():
    """Runs that are whole tiles, that are not, of unequal lengths, and one of them empty."""
    for sizes, T in (({"context": 4, "tensor": 2}, 24), ({"context": 2, "fsdp": 2, "tensor": 2}, 300)):
        for packed in (False, True):
            equals_all_pairs_at_once(on_mesh(**sizes), T, packed)
    equals_all_pairs_at_once(on_mesh(context=8), 24, True)
    equals_all_pairs_at_once(on_mesh(context=8), 8, False)


def devices_that_divide_heads_equal_all_pairs_at_once():
    """One head of each a device, several, and grouped ones; lengths that tiles divide or not."""
    for sizes, T, *heads in (
        ({"context": 2, "tensor": 2, "data": 2}, 300, 4, 4),
        ({"context": 4, "fsdp": 2}, 24, 8, 4),
        ({"context": 2, "data": 2, "tensor": 2}, 10, 16, 8),
    ):
        for packed in (False, True):
            equals_all_pairs_at_once(on_mesh(**sizes), T, packed, *heads)


def no_device_has_keys_of_all_heads():
    """Latents travel, and what is added up or gathered is of them: never keys and values of all heads."""
    layout, config = on_mesh(context=4, data=2), preset("tiny")
    graphdef, like = abstract_weights(config, jnp.float32, layout)
    B, T, a = 2, 512, config.attention
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=layout.sharding("batch", "sequence"))
    loss = lambda weights, ids: jnp.sum(nnx.merge(graphdef, weights)(ids).x_BTD ** 2)
    text = jax.jit(jax.grad(loss)).lower(like, ids).compile().as_text()
    of_all = config.num_attention_heads * T * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    sent = re.findall(r" = (.*?) (?:all-reduce|all-gather|reduce-scatter)\(", text)
    sizes = [math.prod(map(int, dims.split(","))) for of in sent for dims in re.findall(r"f32\[([\d,]+)\]", of)]
    assert sizes and max(sizes) < of_all


def devices_choose_keys_as_one_does():
    """Those that have other heads of the same queries share the choice, of tiles that they divide or not."""
    chosen_keys_equal_a_mask_of_float64_scores(on_mesh(context=2, tensor=2, data=2), 300, True, 20)
    chosen_keys_equal_a_mask_of_float64_scores(Layout(mesh=make_mesh(jax.devices()[:2], tensor=2)), 40, False, 7)


def a_shared_sequence_costs_a_device_half_of_its_rows():
    """Of the loop over tiles every device turns as often: half as often as to meet all keys, and half a tile a row."""
    layout, T = on_mesh(context=4, tensor=2), 4096
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    given = shape(1, T, 2, 8), shape(1, 2, T, 8), shape(1, 2, T, 8)
    run = jax.jit(lambda *of: causal_attention(*of, None, scale=SCALE, layout=layout)[0])
    [turns] = re.findall(r'"known_trip_count":\{"n":"(\d+)"', run.lower(*given).compile().as_text())
    assert int(turns) == (T // 4 // 128) * (T // 128 + 1) // 2


def the_kernel_on_a_mesh_equals_all_pairs_at_once():
    """As on TPUs, on a model of one: every device has its part of the kernel's tables."""
    real = splash.kernel
    kernel = lambda *of, **options: real(*of, **options, interpret=True)
    with mock.patch.object(splash, "kernel", kernel), mock.patch.object(module, "_platform", lambda layout: "tpu"):
        equals_all_pairs_at_once(on_mesh(context=2, tensor=2, data=2), 300, True)
        equals_all_pairs_at_once(on_mesh(context=2, tensor=2, data=2), 300, True, 4, 4)


LAWS = (
    devices_that_share_nothing_equal_all_pairs_at_once,
    devices_that_share_a_sequence_equal_all_pairs_at_once,
    devices_that_divide_heads_equal_all_pairs_at_once,
    no_device_has_keys_of_all_heads,
    devices_choose_keys_as_one_does,
    a_shared_sequence_costs_a_device_half_of_its_rows,
)
SLOW = (the_kernel_on_a_mesh_equals_all_pairs_at_once,)
found = fixture_of(LAWS)
found_slow = fixture_of(SLOW)


@pytest.mark.parametrize("law", [law.__name__ for law in LAWS])
def test_law(law, found):
    assert not found[law], found[law]


@pytest.mark.slow
def test_the_kernel_on_a_mesh(found_slow):
    assert not any(found_slow.values()), found_slow


# --- one device ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "count"), [(23, 6), (300, 40)])
def test_chosen_keys_equal_a_mask(T, count):
    chosen_keys_equal_a_mask_of_float64_scores(LOCAL, T, packed=T > 256, count=count)


def test_a_choice_of_keys_has_no_array_of_all_scores():
    """Temporaries of value and gradient grow as the sequence does, but for a bit a pair."""

    def memory(T):
        shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
        given = shape(1, T, 2, 8), shape(1, 2, T, 8), shape(1, 2, T, 8)
        of_index = shape(1, T, 3, 8), shape(1, T, 3), shape(1, T, 8)

        def loss(of_index, *of):
            q, weights, k = of_index
            index = Index(q=q, weights=weights, k=k, count=64)
            return jnp.sum(causal_attention(*of, None, scale=SCALE, layout=LOCAL, index=index)[0] ** 2)

        run = jax.jit(jax.grad(loss, argnums=(1, 2, 3)))
        return run.lower(of_index, *given).compile().memory_analysis().temp_size_in_bytes

    few, many = memory(2048), memory(4096)
    assert many - 4096**2 / 8 < 2.2 * (few - 2048**2 / 8)
    assert many < 4 * 4096**2 / 2


@pytest.mark.parametrize("T", [1, 7, 256, 257, 400])
def test_any_length_equals_all_pairs_at_once(T):
    equals_all_pairs_at_once(LOCAL, T, packed=T > 256)


@pytest.mark.parametrize(
    "platform, run, length, side",
    [("cpu", 100, 100, 100), ("cpu", 1024, 1024, 128), ("cpu", 200, 200, 128), ("cpu", 160, 160, 96)]
    + [("gpu", 4096, 4096, 512), ("gpu", 512, 4096, 512), ("gpu", 256, 4096, 256), ("gpu", 1000, 1000, 128)],
)
def test_tiles_suit_what_holds_them(platform, run, length, side):
    """A CPU's caches; elsewhere an eighth of the sequence, and no more than a run."""
    assert module._side(run, length, 8, platform) == side


# --- TPUs ----------------------------------------------------------------------------------------


def pairs_met(length: int, queries: int, keys: int) -> int:
    """In tiles of so many queries and keys that the mask leaves."""
    return sum(-(-end // keys) * keys * queries for end in range(queries, length + queries, queries))


def updates_cost_the_tiles_that_meet(topology: str) -> None:
    """R1's widths, on devices with sequences of their own and that share one; long ones, and Qwen's grouped heads."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    cases = (
        (4096, 192, 128, 4, 4, 1),
        (4096, 192, 128, 4, 4, 4),
        (4096, 128, 128, 4, 2, 4),
        (16384, 128, 128, 4, 2, 1),
    )
    for T, K, H, N, G, context in cases:
        layout = Layout(mesh=make_mesh(devices, context=context, data=len(devices) // context))
        B = len(devices) // context
        shaped = lambda dims, *axes, layout=layout, dtype="bfloat16": jax.ShapeDtypeStruct(
            dims, dtype, sharding=layout.sharding(*axes)
        )
        q = shaped((B, T, N, K), "batch", "sequence", None, None)
        k, v = (shaped((B, G, T, width), "batch", None if G % context else "head", None, None) for width in (K, H))
        ids = shaped((B, T), "batch", "sequence", dtype="int32")

        def loss(q, k, v, ids, layout=layout):
            return jnp.sum(causal_attention(q, k, v, ids, scale=SCALE, layout=layout)[0].astype(jnp.float32) ** 2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, ids).compile()
        found = cost_analysis(compiled.as_text(), layout.mesh.shape)
        long, wide = (512, 512) if T == 4096 else (1024, 2048)
        forward, backward = pairs_met(T, long, 512) * (K + H), pairs_met(T, 512, wide) * (3 * K + 2 * H)
        wanted = 2 * N / context * (forward + backward)
        assert found.unknown_kernels == () and found.flops == wanted, (found.flops, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpus(topology):
    if find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install -e '.[pod]'")
    # there is no TPU to look for or to share
    no_tpu = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))))
    code = (
        f"from tests.parallel import test_causal_attention as laws; laws.updates_cost_the_tiles_that_meet({topology!r})"
    )
    environment = {**os.environ, **no_tpu, "PYTHONPATH": path}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
