"""grpo_loss against its float64 twin, value, gradient and metrics, and the laws it has to keep."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.ops.metrics import BatchTotals, Min, masked_min, merge, values
from deepseek_jax.rl import kl
from deepseek_jax.rl.advantage import group_advantages
from deepseek_jax.rl.loss import GRPOLossConfig, grpo_loss
from tests.rl import twins
from tests.rl.twins import Sample

B, T = 6, 7
# Of losses and gradients, whose size is about 1: float32 against float64, and float32 summed in another order.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
V32 = {"kl_estimator": "unbiased", "off_policy_mask_threshold": 0.05}
GSPO = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08}
CONFIGS = {
    "grpo": GRPOLossConfig(),
    "clip_higher": GRPOLossConfig(epsilon=0.1, epsilon_high=0.28, beta=0.0),
    "bnpo": GRPOLossConfig(loss_type="bnpo", beta=0.5, kl_estimator="k2"),
    "dapo": GRPOLossConfig(loss_type="dapo", epsilon_high=0.28, entropy_coef=0.3),
    "dr_grpo": GRPOLossConfig(loss_type="dr_grpo", max_completion_length=9, epsilon=0.3, epsilon_high=0.05),
    "cispo": GRPOLossConfig(loss_type="cispo", epsilon_high=1.2, beta=0.0),
    "sapo": GRPOLossConfig(loss_type="sapo", sapo_temperature_neg=1.5),
    "luspo": GRPOLossConfig(loss_type="luspo", **GSPO, entropy_coef=0.1),
    "v32": GRPOLossConfig(**V32, beta=0.5),
    "dual_clip": GRPOLossConfig(loss_type="dapo", delta=1.25, importance_sampling_clip_max=1.1, beta=0.0),
    "token_mask": GRPOLossConfig(
        loss_type="cispo",
        epsilon_high=5.0,
        importance_sampling_mode="token_mask",
        importance_sampling_clip_max=1.2,
        importance_sampling_clip_min=0.8,
    ),
    "sequence_truncate": GRPOLossConfig(
        **GSPO, importance_sampling_mode="sequence_truncate", importance_sampling_clip_min=0.7, entropy_coef=0.5
    ),
    "vespo": GRPOLossConfig(loss_type="vespo", vespo_k_pos=1.5, vespo_lambda_neg=1.0, beta=0.1),
    "vespo_corrected": GRPOLossConfig(
        loss_type="vespo",
        beta=0.0,
        importance_sampling_mode="token_mask",
        importance_sampling_clip_max=1.5,
        importance_sampling_clip_min=0.7,
        entropy_coef=0.2,
    ),
    "high_entropy": GRPOLossConfig(loss_type="dapo", top_entropy_quantile=0.5, entropy_coef=0.3, beta=0.5),
    "high_entropy_of_samples": GRPOLossConfig(**GSPO, top_entropy_quantile=0.2, importance_sampling_clip_max=1.1),
    "sequence_kl": GRPOLossConfig(**GSPO, use_bias_correction_kl=True, beta=0.5),
    "sequence_mask": GRPOLossConfig(
        **V32, delta=1.4, importance_sampling_mode="sequence_mask", importance_sampling_clip_max=1.3, entropy_coef=0.2
    ),
}
NAMES = sorted(CONFIGS)
few = settings(max_examples=8)
seeds = st.integers(0, 2**31)


def samples(seed, spread=0.4, count=B, longest=T) -> list[Sample]:
    """Random samples, rounded to float32 so that the twin sees the same numbers. Each token has its own advantage."""
    rng = np.random.default_rng(seed)
    found = []
    for n in rng.integers(1, longest + 1, count):
        old = -rng.exponential(1.0, n)
        near = lambda width, old=old, n=n: old + rng.normal(size=n) * width
        one = [near(spread), old, near(spread), rng.normal(size=n), rng.exponential(1.0, n), near(spread / 2)]
        high = rng.random(n) < 0.5
        found.append(Sample(*(a.astype(np.float32).astype(np.float64) for a in one), high))
    return found


def padded(batch, seed=0, width=T, junk=0.0) -> dict[str, np.ndarray]:
    """A row a sample, each starting anywhere. Where the mask is false stands junk."""
    rng = np.random.default_rng(seed)
    arrays = {name: np.full((len(batch), width), junk, np.float32) for name in Sample._fields}
    arrays["mask"] = np.zeros((len(batch), width), bool)
    for row, sample in enumerate(batch):
        start = rng.integers(0, width - len(sample.old) + 1)
        place = slice(start, start + len(sample.old))
        arrays["mask"][row, place] = True
        for name in Sample._fields:
            arrays[name][row, place] = getattr(sample, name)
    return arrays


def packed(rows, width, junk=0.0) -> dict[str, np.ndarray]:
    """Samples of a row one after another, a prompt of two uncounted tokens before each."""
    arrays = {name: np.full((len(rows), width), junk, np.float32) for name in Sample._fields}
    arrays["mask"] = np.zeros((len(rows), width), bool)
    arrays["segments"] = np.zeros((len(rows), width), np.int32)
    for row, members in enumerate(rows):
        end = 0
        for number, sample in enumerate(members, 1):
            start, end = end + 2, end + 2 + len(sample.old)
            arrays["segments"][row, start - 2 : end] = number
            arrays["mask"][row, start:end] = True
            for name in Sample._fields:
                arrays[name][row, start:end] = getattr(sample, name)
    return arrays


@partial(jax.jit, static_argnames=("config", "per_row"))
def ours(arrays, totals, *, config, per_row):
    def loss(logprobs, entropy):
        return grpo_loss(
            logprobs,
            arrays["old"],
            arrays["ref"],
            arrays["advantages"],
            arrays["mask"],
            config,
            totals=totals,
            segments_BT=arrays.get("segments"),
            per_row=per_row,
            entropy_BT=entropy,
            sampler_logprobs_BT=arrays.get("sampler"),
            high_entropy_BT=arrays["high"] != 0 if config.top_entropy_quantile < 1 else None,
        )

    inputs = arrays["logprobs"], arrays["entropy"]
    (value, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*inputs)
    return value, gradients, metrics


def run(arrays, config, *, totals=None, per_row=1):
    """Loss, its gradients in logprobs and entropy, and metrics."""
    loss, gradients, metrics = ours(arrays, totals, config=config, per_row=per_row)
    return float(loss), np.asarray(gradients[0]), np.asarray(gradients[1]), metrics


def batch_totals(batch):
    count = lambda of: jnp.float32(sum(of(s) for s in batch))
    return BatchTotals(count(lambda s: 1), count(lambda s: len(s.old)), count(lambda s: s.high.sum()))


def by_sample(array, arrays):
    """What stands at the counted tokens, row by row and sample by sample."""
    segments = arrays.get("segments", arrays["mask"].astype(np.int32))
    rows = zip(array, segments, arrays["mask"], strict=True)
    return [a[(s == k) & m] for a, s, m in rows for k in range(1, s.max() + 1)]


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=seeds, spread=st.sampled_from([0.05, 0.4, 1.0]))
def test_loss_gradients_and_metrics_equal_the_twin(name, seed, spread):
    config, batch = CONFIGS[name], samples(seed, spread)
    arrays = padded(batch, seed)
    loss, gradient, of_entropy, metrics = run(arrays, config)
    np.testing.assert_allclose(loss, twins.loss(batch, config), **CLOSE)
    for found, wanted in zip(by_sample(gradient, arrays), twins.gradient(batch, config), strict=True):
        np.testing.assert_allclose(found, wanted, **CLOSE)
    np.testing.assert_array_equal(gradient[~arrays["mask"]], 0)
    acting = arrays["mask"] & (arrays["high"] == 1) if config.top_entropy_quantile < 1 else arrays["mask"]
    bonus = config.entropy_coef / max(acting.sum(), 1)
    np.testing.assert_allclose(of_entropy, np.where(acting, -bonus, 0), **CLOSE)
    wanted = twins.metrics(batch, config)
    assert values(metrics).keys() == wanted.keys()
    assert values(metrics) == pytest.approx(wanted, rel=2e-6, abs=1e-6)


def test_the_configs_make_every_choice_both_ways():
    """Or a comparison with the twin would say little: each kind of clipping takes some tokens and leaves others."""
    shares = {}
    for name in NAMES:
        found = [twins.metrics(samples(seed), CONFIGS[name]) for seed in range(20)]
        shares |= {(name, key): np.mean([f[key] for f in found]) for key in found[0]}
    for name, key in [
        ("grpo", "clip_ratio/low_mean"),
        ("clip_higher", "clip_ratio/high_mean"),
        ("sequence_truncate", "clip_ratio/low_mean"),
        ("sequence_truncate", "clip_ratio/high_mean"),
        ("cispo", "cispo_clip_ratio"),
        ("v32", "sampling/off_policy_masked"),
    ]:
        assert 0.05 < shares[name, key] < 0.95, (name, key)
    for name, bound in [("dual_clip", "max"), ("token_mask", "min"), ("sequence_mask", "min")]:
        reached = 1.1 if bound == "max" else 0.0
        assert shares[name, f"sampling/importance_sampling_ratio/{bound}"] == pytest.approx(reached, abs=0.3)
        assert shares[name, "sampling/importance_sampling_ratio/mean"] != pytest.approx(reached, abs=0.05)


@pytest.mark.parametrize("name", [name for name in NAMES if CONFIGS[name].loss_type not in ("cispo", "vespo")])
def test_the_twins_gradient_is_that_of_its_value(name):
    """Central differences; in CISPO and VESPO a weight is held, so that their gradient is not their value's."""
    config, batch = CONFIGS[name], samples(5)
    for i, wanted in enumerate(twins.gradient(batch, config)):
        for t in range(len(wanted)):
            moved = []
            for h in (1e-6, -1e-6):
                shifted = [s._replace(logprobs=s.logprobs.copy()) for s in batch]
                shifted[i].logprobs[t] += h
                moved.append(twins.loss(shifted, config))
            assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(wanted[t], abs=1e-7)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@few
@given(seed=seeds)
def test_the_first_step_of_a_group_has_loss_zero_and_a_gradient(loss_type, seed):
    """Ratio 1, KL 0, advantages that sum to 0; where tokens are averaged, samples must be of one length for it."""
    config = GRPOLossConfig(loss_type=loss_type)
    rewards = np.random.default_rng(seed).normal(size=(2, B // 2)).astype(np.float32)
    A = np.asarray(group_advantages(jnp.asarray(rewards))).reshape(-1)
    batch = samples(seed)
    if loss_type != "grpo":
        batch = [s._replace(**{name: np.full(4, getattr(s, name)[0]) for name in Sample._fields}) for s in batch]
    batch = [
        s._replace(old=s.logprobs, ref=s.logprobs, sampler=s.logprobs, advantages=np.full(len(s.old), a))
        for s, a in zip(batch, A, strict=True)
    ]
    arrays = padded(batch, seed)
    loss, gradient, _, metrics = run(arrays, config)
    assert loss == pytest.approx(0.0, abs=1e-6)
    for found, a in zip(by_sample(gradient, arrays), A, strict=True):
        np.testing.assert_allclose(found, -a / len(found) / B, **CLOSE)
    numbers = values(metrics)
    assert numbers["ratio"] == 1.0 and numbers["kl"] == 0.0 and numbers["clip_ratio/region_mean"] == 0.0
    assert numbers["sampling/sampling_logp_difference/max"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_zero_advantages_leave_kl_and_entropy_alone(name):
    """What equal rewards become."""
    config = CONFIGS[name]
    batch = [s._replace(advantages=np.zeros(len(s.old))) for s in samples(2)]
    arrays = padded(batch)
    loss, gradient, _, _ = run(arrays, config)
    only = replace(config, off_policy_mask_threshold=None)
    np.testing.assert_allclose(loss, twins.loss(batch, only), **CLOSE)
    if not config.beta:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_padding_never_changes_the_loss(name, junk):
    batch = samples(11)
    clean, dirty = padded(batch), padded(batch, junk=junk)
    wanted = run(clean, CONFIGS[name])
    # all together, then each alone, so that no two kinds of junk cancel
    for arrays in [dirty, *({**clean, key: dirty[key]} for key in Sample._fields)]:
        found = run(arrays, CONFIGS[name])
        assert found[0] == wanted[0] and values(found[3]) == values(wanted[3])
        np.testing.assert_array_equal(found[1], wanted[1])
        np.testing.assert_array_equal(found[2], wanted[2])


def test_width_of_the_padding_does_not_matter():
    batch, config = samples(4), CONFIGS["sequence_mask"]
    narrow, wide = padded(batch), padded(batch, width=T + 9)
    loss, gradient, _, metrics = run(narrow, config)
    wide_loss, wide_gradient, _, wide_metrics = run(wide, config)
    np.testing.assert_allclose(wide_loss, loss, **CLOSE)
    np.testing.assert_allclose(wide_gradient[wide["mask"]], gradient[narrow["mask"]], **CLOSE)
    assert values(wide_metrics) == pytest.approx(values(metrics), rel=1e-6, abs=1e-6)


def test_the_reference_is_not_looked_at_without_beta():
    arrays = padded(samples(0), junk=np.nan)
    arrays["ref"] = np.full((B, T), np.nan, np.float32)
    loss, gradient, _, metrics = run(arrays, CONFIGS["clip_higher"])
    assert np.isfinite(loss) and np.isfinite(gradient).all() and values(metrics)["kl"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_tokens_adds_nothing_but_is_one_of_the_samples(name):
    batch, config = samples(1), CONFIGS[name]
    arrays = padded(batch)
    arrays["mask"][2] = False
    arrays["advantages"][2] = np.nan
    loss, gradient, _, metrics = run(arrays, config)
    batch[2] = Sample(*(a[:0] for a in batch[2]))
    np.testing.assert_allclose(loss, twins.loss(batch, config), **CLOSE)
    np.testing.assert_array_equal(gradient[2], 0)
    np.testing.assert_allclose(gradient[arrays["mask"]], np.concatenate(twins.gradient(batch, config)), **CLOSE)
    wanted = twins.metrics(batch[:2] + batch[3:], config) | {"policy_loss": values(metrics)["policy_loss"]}
    assert values(metrics) == pytest.approx(wanted, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_tokens_gives_zero(name):
    arrays = padded(samples(1), junk=np.nan)
    arrays["mask"][:] = False
    loss, gradient, of_entropy, metrics = run(arrays, CONFIGS[name])
    assert loss == 0.0 and not gradient.any() and not of_entropy.any()
    assert all(np.isfinite(v) for v in values(metrics).values())


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "luspo", "sequence_mask"])  # each way to add up tokens
def test_parts_of_a_batch_sum_to_the_whole(name):
    """Losses and gradients add up and metrics merge, though the parts differ in tokens; cut groups do not matter."""
    for seed in range(4):
        batch = samples(seed)
        arrays = padded(batch, seed)
        loss, gradient, of_entropy, metrics = run(arrays, CONFIGS[name])
        cut = [{key: array[i : i + 2] for key, array in arrays.items()} for i in (0, 2, 4)]
        parts = [run(part, CONFIGS[name], totals=batch_totals(batch)) for part in cut]
        np.testing.assert_allclose(sum(p[0] for p in parts), loss, **CLOSE)
        np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), gradient, **CLOSE)
        np.testing.assert_allclose(np.concatenate([p[2] for p in parts]), of_entropy, **CLOSE)
        merged = merge(merge(parts[0][3], parts[1][3]), parts[2][3])
        assert values(merged) == pytest.approx(values(metrics), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["luspo", "sequence_mask"])
def test_packing_never_changes_the_loss(name):
    for seed in range(3):
        batch = samples(seed)
        batch[3] = Sample(*(a[:0] for a in batch[3]))  # a truncated one, masked out: its prompt stands in the row
        rows = [batch[:3], batch[3:5], batch[5:]]
        plain, tight = padded(batch, seed), packed(rows, 3 * (T + 2) + 1, junk=np.nan)
        loss, gradient, of_entropy, metrics = run(plain, CONFIGS[name])
        found, found_gradient, found_of_entropy, found_metrics = run(tight, CONFIGS[name], per_row=4)
        np.testing.assert_allclose(found, loss, **CLOSE)
        pairs = [(gradient, found_gradient), (of_entropy, found_of_entropy)]
        for wanted, got in pairs:
            lists = zip(by_sample(wanted[[0, 1, 2, 4, 5]], _without(plain, 3)), _nonempty(got, tight), strict=True)
            for a, b in lists:
                np.testing.assert_allclose(b, a, **CLOSE)
            np.testing.assert_array_equal(got[~tight["mask"]], 0)
        assert values(found_metrics) == pytest.approx(values(metrics), rel=1e-6, abs=1e-6)


def _without(arrays, row):
    return {key: np.delete(array, row, axis=0) for key, array in arrays.items()}


def _nonempty(array, arrays):
    return [a for a in by_sample(array, arrays) if len(a)]


def test_rows_of_a_packed_batch_may_be_cut_apart():
    config, batch = CONFIGS["sequence_mask"], samples(8)
    arrays = packed([batch[:1], batch[1:4], batch[4:]], 3 * (T + 2))
    cut = [{key: array[i : i + 1] for key, array in arrays.items()} for i in range(3)]
    parts = [run(part, config, totals=batch_totals(batch), per_row=3) for part in cut]
    np.testing.assert_allclose(sum(p[0] for p in parts), twins.loss(batch, config), **CLOSE)
    gradient = np.concatenate([p[1] for p in parts])
    np.testing.assert_allclose(gradient[arrays["mask"]], np.concatenate(twins.gradient(batch, config)), **CLOSE)
    merged = merge(merge(parts[0][3], parts[1][3]), parts[2][3])
    assert values(merged) == pytest.approx(twins.metrics(batch, config), rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_samples_does_not_matter(name):
    arrays = padded(samples(9))
    order = np.random.default_rng(9).permutation(B)
    loss, gradient, _, metrics = run(arrays, CONFIGS[name])
    moved, moved_gradient, _, moved_metrics = run({k: a[order] for k, a in arrays.items()}, CONFIGS[name])
    np.testing.assert_allclose(moved, loss, **CLOSE)
    np.testing.assert_allclose(moved_gradient, gradient[order], **CLOSE)
    assert values(moved_metrics) == pytest.approx(values(metrics), rel=1e-6, abs=1e-6)


def test_gradients_reach_the_policy_alone():
    arrays, config = padded(samples(3)), CONFIGS["sequence_mask"]

    @jax.jit
    def gradients(arrays):
        def loss(old, ref, advantages, sampler):
            given = arrays["logprobs"], old, ref, advantages, arrays["mask"], config
            return grpo_loss(*given, entropy_BT=arrays["entropy"], sampler_logprobs_BT=sampler)[0]

        others = [arrays[key] for key in ("old", "ref", "advantages", "sampler")]
        return jax.grad(loss, argnums=(0, 1, 2, 3))(*others)

    for gradient in gradients(arrays):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", ["token_mask", "sequence_truncate"])
def test_an_exact_sampler_is_not_corrected(name):
    """Its weights are 1, with and without saying so."""
    arrays = padded([s._replace(sampler=s.old) for s in samples(6)])
    plain = {key: array for key, array in arrays.items() if key != "sampler"}
    said, unsaid = run(arrays, CONFIGS[name]), run(plain, CONFIGS[name])
    np.testing.assert_allclose(said[0], unsaid[0], **CLOSE)
    np.testing.assert_allclose(said[1], unsaid[1], **CLOSE)
    assert values(said[3])["sampling/importance_sampling_ratio/min"] == 1.0
    assert not any("importance_sampling_ratio" in key for key in unsaid[3])
    # Without a sampler of its own, what is reported is how far the policy has moved from the one that sampled.
    moved = values(unsaid[3])["sampling/sampling_logp_difference/max"]
    assert moved == pytest.approx(max(np.abs(s.logprobs - s.old).max() for s in samples(6)), rel=1e-6)


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_advantage_a_sample_is_one_at_each_of_its_tokens():
    rng = np.random.default_rng(0)
    new, old, ref = (jnp.asarray(-rng.exponential(1.5, (B, T)), jnp.float32) for _ in range(3))
    of_samples = jnp.asarray(rng.normal(size=B), jnp.float32)
    mask = jnp.asarray(np.arange(T) < rng.integers(1, T + 1, B)[:, None])
    of_tokens = jnp.broadcast_to(of_samples[:, None], (B, T))
    losses = [grpo_loss(new, old, ref, a, mask, GRPOLossConfig())[0] for a in (of_samples, of_tokens)]
    assert losses[0] == losses[1] != 0
    with pytest.raises(ValueError, match=r"advantages: got shape \[6\]"):  # of packed rows it would be no one's
        grpo_loss(new, old, ref, of_samples, mask, GRPOLossConfig(), segments_BT=mask.astype(jnp.int32), per_row=1)


def test_known_values():
    """One token of ratio 5, by hand."""

    @partial(jax.jit, static_argnames="config")
    def loss(A, config):
        arrays = [jnp.full((1, 1), x, jnp.float32) for x in (np.log(0.5), np.log(0.1), np.log(0.5))]
        return grpo_loss(*arrays, A.reshape(1, 1), jnp.ones((1, 1), bool), config)[0]

    one = lambda A, **settings: float(loss(jnp.float32(A), GRPOLossConfig(beta=0.0, **settings)))
    assert one(1) == pytest.approx(-1.2, rel=1e-6) and one(-1) == pytest.approx(5, rel=1e-6)
    dual = {"delta": 3.0, "epsilon_high": 0.28}
    assert one(1, **dual) == pytest.approx(-1.28, rel=1e-6) and one(-1, **dual) == pytest.approx(3, rel=1e-6)
    assert one(1, loss_type="cispo", epsilon_high=4.0) == pytest.approx(-4 * np.log(0.5), rel=1e-6)
    assert one(2, loss_type="dr_grpo", max_completion_length=8) == pytest.approx(-2.4 / 8, rel=1e-6)
    assert one(1, loss_type="sapo") == pytest.approx(-4 / (1 + np.exp(-4)), rel=1e-6)


@pytest.mark.parametrize("off_policy", [False, True])
def test_which_kl_estimators_pull_towards_the_reference(off_policy):
    """Expected gradients over a whole vocabulary, beside that of the reverse KL itself: why k1 is refused."""
    rng = np.random.default_rng(0)
    policy, ref, old = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=7), jnp.float32)) for _ in range(3))
    sampled = old if off_policy else policy
    reverse_kl = lambda logits: jnp.sum(jnp.exp(jax.nn.log_softmax(logits)) * (jax.nn.log_softmax(logits) - ref))
    wanted = jax.grad(reverse_kl)(policy)

    def expected(estimator):
        mean = lambda logits: jnp.sum(jnp.exp(sampled) * estimator(jax.nn.log_softmax(logits)))
        return np.asarray(jax.grad(mean)(policy))

    k1 = expected(lambda logp: logp - ref)
    k2 = expected(lambda logp: kl.k2(ref - logp))
    k3 = expected(lambda logp: kl.k3(ref - logp))
    unbiased = expected(lambda logp: kl.unbiased(ref - logp, jnp.exp(logp - sampled)))
    np.testing.assert_allclose(unbiased, wanted, atol=1e-6)
    assert np.abs(k3 - wanted).max() > 0.01
    if off_policy:
        assert np.abs(k2 - wanted).max() > 0.01
    else:
        np.testing.assert_allclose(k2, wanted, atol=1e-6)
        np.testing.assert_allclose(k1, 0, atol=1e-6)


def test_the_smallest_of_nothing_is_zero_and_gives_way_to_any_other():
    nothing = masked_min(jnp.ones(3), jnp.zeros(3, bool))
    assert values({"a": nothing}) == {"a": 0.0}
    assert values(merge({"a": nothing}, {"a": Min(jnp.float32(5))})) == {"a": 5.0}


NOT_NUMBERS = [-0.1, float("nan"), float("inf")]


@pytest.mark.parametrize(
    "bad",
    [{"epsilon": x} for x in (*NOT_NUMBERS, 1.5)]
    + [{"epsilon_high": x} for x in NOT_NUMBERS]
    + [{"beta": x} for x in NOT_NUMBERS]
    + [{"entropy_coef": x} for x in NOT_NUMBERS]
    + [{"off_policy_mask_threshold": x} for x in NOT_NUMBERS]
    + [{"delta": x} for x in (*NOT_NUMBERS, 1.2)]
    + [{"sapo_temperature_pos": x} for x in (*NOT_NUMBERS, 0.0)]
    + [{"sapo_temperature_neg": x} for x in (*NOT_NUMBERS, 0.0)]
    + [{"importance_sampling_clip_max": x} for x in (*NOT_NUMBERS, 0.9)]
    + [{"importance_sampling_clip_min": x} for x in (*NOT_NUMBERS, 1.1)]
    + [{"max_completion_length": x} for x in (0, -1, float("nan"))]
    + [
        {"loss_type": "ppo"},
        {"importance_sampling_level": "word"},
        {"kl_estimator": "k1"},
        {"kl_estimator": "k4"},
        {"importance_sampling_mode": "clip", "importance_sampling_clip_max": 2.0},
        {"importance_sampling_mode": "token_mask"},
        {"max_completion_length": None, "loss_type": "dr_grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "dapo"},
        {"importance_sampling_level": "sequence", "loss_type": "bnpo"},
        {"importance_sampling_level": "sequence", "loss_type": "dr_grpo", "max_completion_length": 8},
        {"importance_sampling_level": "sequence", "loss_type": "cispo", "epsilon_high": 5.0},
        {"importance_sampling_level": "token", "loss_type": "luspo"},
        {"epsilon_high": None, "loss_type": "cispo"},
        {"epsilon_high": 0.0, "loss_type": "cispo"},
        {"delta": 7.0, "loss_type": "cispo", "epsilon_high": 5.0},
        {"delta": 2.0, "loss_type": "sapo"},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(bad):
    """The first of the settings is the one to be named."""
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got [^\n]+, wanted [^\n]+$"):
        GRPOLossConfig(**bad)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages_BT": (B + 1,)}, r"advantages: got shape \[7\], wanted \[6, 7\]"),
        ({"sampler_logprobs_BT": (B, 1)}, r"sampler_logprobs: got shape \[6, 1\], wanted \[6, 7\]"),
        ({"mask_BT": (B, T + 1)}, r"mask: got shape \[6, 8\], wanted \[6, 7\]"),
        ({"per_row": 2}, "per_row: got 2, wanted 1"),
        ({"per_row": 0}, "per_row: got 0, wanted 1"),
        ({"config": GRPOLossConfig(entropy_coef=0.1)}, r"entropy: got None, wanted entropies \[B, T\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    """By the function itself: a user has no checks of shapes as these tests have them."""
    names = ("logprobs_BT", "old_logprobs_BT", "ref_logprobs_BT", "advantages_BT", "mask_BT")
    arguments = {name: jnp.zeros((B, T)) for name in names} | {"config": GRPOLossConfig()}
    made = {k: jnp.zeros(v) if isinstance(v, tuple) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        grpo_loss(**arguments | made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "got 'sequence' with vespo"),
        ({"loss_type": "vespo", "delta": 2.0}, "delta: got 2.0 with vespo"),
        (
            {"loss_type": "vespo", "importance_sampling_mode": "sequence_mask", "importance_sampling_clip_max": 2.0},
            "importance_sampling_mode: got 'sequence_mask' with vespo",
        ),
        ({"vespo_lambda_pos": 0.0}, "vespo_lambda_pos: got 0.0"),
        ({"top_entropy_quantile": 1.1}, "top_entropy_quantile: got 1.1"),
        ({"use_bias_correction_kl": True, "kl_estimator": "k2"}, "use_bias_correction_kl: got True"),
        ({"entropy_target": 1.0}, "entropy_target: got 1.0, wanted use_adaptive_entropy"),
        ({"use_adaptive_entropy": True, "entropy_coef_min": 2.0}, "entropy_coef_min: got 2.0"),
    ],
)
def test_new_settings_that_contradict_others_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOLossConfig(**changes)
