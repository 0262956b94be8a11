"""Experts that are given: what a layer makes of them, and what a whole model does."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import preset
from deepseek_jax.model.layers import Maker, MoE, Step
from deepseek_jax.model.scoring import check_routes, score
from deepseek_jax.sharding import LOCAL, Layout
from tests.model.test_packing import MLA, PER_ROW, alone, laid, same, scored, texts

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, A, E = 1, MLA.moe.num_experts_per_tok, MLA.moe.n_routed_experts
ALONE = texts(packed=False)
REAL = np.maximum.accumulate(ALONE.mask[:, ::-1], axis=1)[:, ::-1]  # up to a sample's last counted target
rng = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    """Random experts, each at most once a token."""
    return np.argsort(rng.random((*shape, E)), axis=-1)[..., :A].astype(np.int16)


@cache
def chosen() -> np.ndarray:
    """What the routers choose for the samples, in rows of their own."""
    graphdef, weights = laid("mla", LOCAL)
    run = jax.jit(lambda weights, *texts: score(nnx.merge(graphdef, weights), *texts).experts_BTLA)
    return np.asarray(run(weights, *ALONE[:3]))


def counts(experts: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(experts[mask][:, layer].ravel(), minlength=E) for layer in range(experts.shape[2])])


@pytest.mark.parametrize(
    "layout",
    [pytest.param(LOCAL, marks=pytest.mark.slow), Layout(scan_layers=True, remat="layers")],
    ids=["layers", "stacked"],
)
def test_replaying_the_routers_own_choice_changes_nothing(layout):
    """Scores, statistics and gradients. What is given for padding is not looked at."""
    routes = np.where(REAL[..., None, None], chosen(), drawn(*REAL.shape, L))
    same(scored("mla", layout, ALONE, routes_BTLA=routes), alone("mla"))


def test_replay_in_packed_rows_equals_replay_in_rows_of_their_own():
    packed = texts(packed=True)
    routes, apart = drawn(*packed.mask.shape, L), np.zeros((*ALONE.mask.shape, L, A), np.int16)
    for number in range(1, packed.numbers.max() + 1):
        apart[ALONE.numbers == number] = routes[packed.numbers == number]
    forward = partial(scored, "mla", LOCAL, gradients=False)
    together = forward(packed, segments_BT=packed.segments, per_row=PER_ROW, routes_BTLA=routes)
    one_a_row = forward(ALONE, routes_BTLA=apart)
    same(together, one_a_row)
    np.testing.assert_array_equal(one_a_row["load"], counts(apart, REAL))
    assert np.abs(one_a_row["logprobs"] - alone("mla")["logprobs"]).max() > 0.1
    # the routers say what they would have chosen all the same; the first one of them reads what it always does
    np.testing.assert_array_equal(one_a_row["experts"][:, 0], alone("mla")["experts"][:, 0])


def step_of(real) -> Step:
    """Of a layer of experts alone, which asks for no positions."""
    nowhere = jnp.zeros((*real.shape, 0))
    return Step("whole", jnp.zeros(real.shape, jnp.int32), nowhere, nowhere, jnp.asarray(real))


@pytest.mark.parametrize("topk_method", ["noaux_tc", "greedy"])
def test_a_layer_with_given_experts_equals_a_numpy_twin(topk_method):
    groups = {} if topk_method == "noaux_tc" else {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    moe = dataclasses.replace(preset("tiny").moe, topk_method=topk_method, routed_scaling_factor=2.5, **groups)
    config = dataclasses.replace(preset("tiny"), hidden_size=12, initializer_range=0.5, moe=moe)
    layer = MoE(12, moe, Maker(config, nnx.Rngs(0), jnp.float32))
    x, routes, real = rng.normal(size=(2, 5, 12)), drawn(2, 5), rng.random((2, 5)) < 0.7
    out, stats = jax.jit(lambda x: layer(x, step_of(real), routes_BTA=routes))(jnp.asarray(x, jnp.float32))

    weight = lambda of: np.asarray(of[...], np.float64)
    silu = lambda z: z / (1 + np.exp(-z))
    mlp = lambda x, gate, up, down: (silu(x @ gate) * (x @ up)) @ down
    logits = x @ weight(layer.router)
    scores = 1 / (1 + np.exp(-logits)) if topk_method == "noaux_tc" else np.exp(logits)
    scores = scores if topk_method == "noaux_tc" else scores / scores.sum(-1, keepdims=True)
    matrices = [weight(of) for of in (layer.experts.gate, layer.experts.up, layer.experts.down)]
    shared = [weight(of) for of in (layer.shared.gate, layer.shared.up, layer.shared.down)]
    for token in np.argwhere(real):
        row, column = token
        experts = routes[row, column]
        w = scores[row, column, experts]
        w = 2.5 * (w / w.sum() if topk_method == "noaux_tc" else w)
        wanted = mlp(x[row, column], *shared)
        wanted += sum(of * mlp(x[row, column], *(m[e] for m in matrices)) for of, e in zip(w, experts, strict=True))
        np.testing.assert_allclose(out[row, column], wanted, rtol=2e-5, atol=2e-5)
    best = np.argsort(-scores, axis=-1)[..., :A]
    if topk_method == "greedy":
        np.testing.assert_array_equal(stats.experts_BTA, best)
        plain, _ = layer(jnp.asarray(x, jnp.float32), step_of(real))
        np.testing.assert_allclose(out[~real], plain[~real], atol=2e-5)  # padding goes where its router sends it


def test_the_weights_of_given_experts_have_the_routers_gradient():
    """Against differences of the loss; with the experts fixed it is smooth."""
    config = dataclasses.replace(preset("tiny"), hidden_size=12, initializer_range=0.5)
    layer = MoE(12, config.moe, Maker(config, nnx.Rngs(0), jnp.float32))
    x, routes = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32), drawn(2, 5)
    seed, way = (jnp.asarray(rng.normal(size=of.shape), jnp.float32) for of in (x, layer.router))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def loss(params):
        out, _ = nnx.merge(graphdef, params, rest)(x, step_of(np.ones((2, 5), bool)), routes_BTA=routes)
        return jnp.sum(seed * out)

    def moved(step):
        there = jax.tree.map(lambda a: a, params)
        there["router"] = there["router"].replace(params["router"][...] + step * way)
        return float(loss(there))

    slope = float(jnp.sum(jax.grad(loss)(params)["router"][...] * way))
    assert slope == pytest.approx((moved(0.01) - moved(-0.01)) / 0.02, rel=1e-2) and abs(slope) > 0.1


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_choice_that_nobody_reads_is_not_kept(scan_layers):
    """The compiled program of a trainer that does not ask for it holds no array of every layer's choice."""
    layout = Layout(scan_layers=scan_layers)
    graphdef, weights = laid("mla", layout)
    params, rest = nnx.split_state(weights, nnx.Param, ...)
    B, T = ALONE.mask.shape

    def lowered(asks: bool):
        def loss(params, *texts):
            found = score(nnx.merge(graphdef, params, rest), *texts)
            return jnp.sum(found.logprobs_BT), (found.load_LE, found.experts_BTLA if asks else None)

        return jax.jit(jax.grad(loss, has_aux=True)).lower(params, *ALONE[:3])

    assert f"tensor<{B}x{T}x{L}x{A}xi32>" in lowered(asks=True).as_text()
    program = lowered(asks=False).compile().as_text()
    assert f"f32[{B},{T}" in program  # as arrays are written there
    assert f"s32[{B},{T},{L},{A}]" not in program and f"s32[{L},{B},{T},{A}]" not in program


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (np.zeros((3, L, A + 1), np.int16), rf"got int16 \[3, {L}, {A + 1}\], wanted integers \[..., {L}, {A}\]"),
        (np.zeros((3, L + 1, A), np.int16), rf"got int16 \[3, {L + 1}, {A}\]"),
        (np.zeros((3, L, A), np.float32), "got float32"),
        (np.full((3, L, A), E, np.int32), f"got experts {E} to {E}, wanted 0 to {E - 1}"),
        (np.full((3, L, A), -1, np.int32), "got experts -1 to -1"),
    ],
)
def test_routes_of_another_model_are_refused(routes, message):
    with pytest.raises(ValueError, match=message):
        check_routes(routes, MLA)


def test_routes_of_this_model_are_not_refused():
    check_routes(drawn(7, L), MLA)
    check_routes(np.zeros((0, L, A), np.int16), MLA)
    with pytest.raises(ValueError, match="routes: got some for a model without experts"):
        check_routes(drawn(7, L), dataclasses.replace(MLA, moe=None))
