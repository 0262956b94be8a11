"""Laws of the multi-token prediction modules: their wiring, what each draft depends on, and what is counted."""

import dataclasses
import zlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import MLAConfig, ModelConfig, preset
from deepseek_jax.model.decoder import Decoder, abstract_weights
from deepseek_jax.model.layers import Step
from deepseek_jax.model.scoring import score, score_ahead
from deepseek_jax.ops.rope import angles

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEPTHS = 2
CONFIG = dataclasses.replace(
    preset("tiny"),
    vocab_size=29,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    rms_norm_eps=1e-3,  # large enough that leaving it out would show
    attention=MLAConfig(q_lora_rank=12, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
    moe=dataclasses.replace(preset("tiny").moe, moe_intermediate_size=12),
    num_nextn_predict_layers=DEPTHS,
)
B, T = 3, 11
TEXT = np.random.RandomState(0).randint(0, CONFIG.vocab_size, (B, T + 1))
LENGTHS = np.array([T, 6, 3])
REAL = np.arange(T) < LENGTHS[:, None]


@cache
def random_weights(config: ModelConfig = CONFIG) -> tuple[nnx.GraphDef, nnx.State]:
    """Every weight random and none at its first value, each by its own name."""
    graphdef, abstract = abstract_weights(config)
    leaves = []
    for path, leaf in nnx.to_flat_state(abstract):
        shape, name = leaf.get_raw_value().shape, ".".join(map(str, path))
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        leaves.append((path, leaf.replace(jnp.asarray(0.2 * noise + name.endswith("norm"), jnp.float32))))
    return graphdef, nnx.from_flat_state(leaves)


def model() -> Decoder:
    return nnx.merge(*random_weights())


@partial(jax.jit, static_argnames="graphdef")
def drafts_of(graphdef, weights, text, mask=None):
    """States and logits of the model and of each module over whole texts [B, T + 1], and the modules' routing."""
    model = nnx.merge(graphdef, weights)
    hidden = model(text[:, :-1], mask)
    drafts = model.draft(hidden.x_BTD, text[:, 1:], mask)
    states = [hidden.x_BTD, *(draft.x_BTD for draft in drafts)]
    return states, [model.logits(x) for x in states], [draft.stats[0] for draft in drafts]


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


# --- weights -------------------------------------------------------------------------------------


def test_a_model_without_modules_has_nothing_of_them():
    graphdef, with_modules = abstract_weights(CONFIG)
    plain, weights = abstract_weights(dataclasses.replace(CONFIG, num_nextn_predict_layers=0))
    shapes = lambda state: {path: leaf.get_raw_value().shape for path, leaf in nnx.to_flat_state(state)}
    kept = {path: shape for path, shape in shapes(with_modules).items() if path[0] != "mtp"}
    assert list(shapes(weights).items()) == list(kept.items())
    assert list(weights) == ["embed", "head", "layers", "norm"]
    assert nnx.merge(plain, weights).draft(jnp.zeros((1, 2, 24)), jnp.zeros((1, 2), int)) == ()


def test_a_module_holds_two_norms_a_projection_a_moe_layer_and_a_norm():
    """Embedding and head are not among its weights: it shares the model's."""
    paths = {path for path, _ in nnx.to_flat_state(abstract_weights(CONFIG)[1])}
    moe_layer = {path[2:] for path in paths if path[:2] == ("layers", 1)}
    assert ("mlp", "router") in moe_layer
    for depth in range(DEPTHS):
        own = {path[2:] for path in paths if path[:2] == ("mtp", depth)}
        assert own == {("token_norm",), ("hidden_norm",), ("project",), ("norm",), *(("layer", *p) for p in moe_layer)}
    assert model().mtp[0].project.shape == (48, 24)


# --- wiring --------------------------------------------------------------------------------------


def norm(x, weight):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps) * np.asarray(weight, np.float64)


def silenced(weights: nnx.State) -> nnx.State:
    """The same weights, but the modules' layers add nothing to what they are given."""
    last = ("o", "down")
    of_module = lambda path: path[0] == "mtp" and path[-1] in last
    flat = nnx.to_flat_state(weights)
    return nnx.from_flat_state([(p, v.replace(jnp.zeros_like(v[...])) if of_module(p) else v) for p, v in flat])


@pytest.mark.parametrize("layer", ["silent", "random"])
def test_drafts_equal_a_numpy_twin(layer):
    """Everything around the layer in float64; a silent layer is an identity, a random one is asked."""
    graphdef, weights = random_weights()
    weights = silenced(weights) if layer == "silent" else weights
    module = nnx.merge(graphdef, weights)
    states, logits, _ = drafts_of(graphdef, weights, TEXT)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    step = Step("whole", positions, *angles(CONFIG.rope, CONFIG.rotary_dim, positions), jnp.ones((B, T), bool))
    ask = lambda layer, z: layer(jnp.float32(z), step)[0]
    embed, head = (np.asarray(w[...], np.float64) for w in (module.embed, module.head))
    h = np.asarray(states[0], np.float64)
    for depth, mtp in enumerate(module.mtp, 1):
        known = T + 1 - depth  # positions whose token so far ahead is in the text
        e = np.zeros((B, T, 24))
        e[:, :known] = embed[TEXT[:, depth:]]
        z = np.concatenate([norm(e, mtp.token_norm[...]), norm(h, mtp.hidden_norm[...])], axis=-1)
        z = z @ np.asarray(mtp.project[...], np.float64)
        h = norm(z if layer == "silent" else np.asarray(ask(mtp.layer, z), np.float64), mtp.norm[...])
        assert logits[depth].dtype == jnp.float32 and np.abs(h @ head).max() > 2
        close(logits[depth][:, :known], (h @ head)[:, :known])


# --- what a draft depends on ---------------------------------------------------------------------


@pytest.mark.parametrize("changed", [0, 4, T])
def test_module_d_at_position_i_sees_the_tokens_up_to_i_plus_d(changed):
    graphdef, weights = random_weights()
    other = TEXT.copy()
    other[:, changed] = (other[:, changed] + 1) % CONFIG.vocab_size
    before, after = (drafts_of(graphdef, weights, text)[1] for text in (TEXT, other))
    for depth in range(DEPTHS + 1):
        first = max(0, changed - depth)  # the first position that sees the change
        np.testing.assert_array_equal(after[depth][:, :first], before[depth][:, :first])
        moved = np.abs(np.asarray(after[depth] - before[depth])).max(axis=-1)
        assert np.all(moved[:, first : T + 1 - max(depth, 1)] > 1e-4)


def test_padding_on_the_right_never_changes_a_draft_that_has_its_tokens():
    graphdef, weights = random_weights()
    _, wanted, wanted_stats = drafts_of(graphdef, weights, TEXT, REAL)
    inside = np.arange(T + 1) < LENGTHS[:, None] + 1
    for pad in (0, 28):
        _, logits, stats = drafts_of(graphdef, weights, np.where(inside, TEXT, pad), REAL)
        for depth in range(DEPTHS + 1):
            # token i + depth is the text's own
            whole = np.arange(T) < LENGTHS[:, None] + 1 - max(depth, 1)
            close(logits[depth][whole], wanted[depth][whole])
        for depth in range(DEPTHS):
            np.testing.assert_array_equal(stats[depth].load_BE, wanted_stats[depth].load_BE)
            close(stats[depth].balance_B, wanted_stats[depth].balance_B)


# --- routing and scores --------------------------------------------------------------------------


def test_routing_counts_the_positions_whose_predicted_token_is_real():
    graphdef, weights = random_weights()
    for mask, lengths in ((REAL, LENGTHS), (None, np.array([T, T, T]))):
        _, _, stats = drafts_of(graphdef, weights, TEXT, mask)
        for depth, of_module in enumerate(stats, 1):
            np.testing.assert_array_equal(of_module.load_BE.sum(axis=-1), 2 * np.maximum(lengths - depth, 0))


def test_scores_ahead_are_log_softmax_of_the_drafts_logits():
    """And the model's own scores are those of `score`. Targets count from the third token on."""
    graphdef, weights = random_weights()
    mask = REAL & (np.arange(T) >= 1)
    inputs = (TEXT[:, :-1], TEXT[:, 1:], mask)
    run = lambda function: jax.jit(lambda weights, *inputs: function(nnx.merge(graphdef, weights), *inputs))(
        weights, *inputs
    )
    (scored, further), plain = run(score_ahead), run(score)
    close(scored.logprobs_BT, plain.logprobs_BT)
    close(scored.entropy_BT, plain.entropy_BT)
    assert scored.load_LE.shape == (1 + DEPTHS, 8) and plain.load_LE.shape == (1, 8)
    np.testing.assert_array_equal(scored.load_LE[:1], plain.load_LE)

    _, logits, stats = drafts_of(graphdef, weights, TEXT, REAL)
    balance = [float(jnp.sum(s.balance_B)) for s in stats]
    assert min(balance) > 0.5 and float(scored.balance) == pytest.approx(float(plain.balance) + sum(balance), rel=1e-5)
    assert len(further) == DEPTHS
    for depth, (logprobs, counted) in enumerate(further, 1):
        np.testing.assert_array_equal(scored.load_LE[depth], stats[depth - 1].load_BE.sum(axis=0))
        exact = np.asarray(logits[depth], np.float64)
        exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
        seen = 0
        for row in range(B):
            for i in range(T):
                target = i + depth + 1
                assert counted[row, i] == (2 <= target <= LENGTHS[row])
                if counted[row, i]:
                    assert logprobs[row, i] == pytest.approx(exact[row, i, TEXT[row, target]], abs=1e-5)
                    seen += 1
        assert seen == np.maximum(LENGTHS - depth, 0).sum()
