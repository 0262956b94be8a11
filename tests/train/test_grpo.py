"""The GRPO stage: what its options do to a step, and that none of them breaks a resumed run."""

import dataclasses
import itertools
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.examples import Prompt
from deepseek_jax.data.prompts import batches
from deepseek_jax.generation.completion import Completion
from deepseek_jax.generation.generator import Generator
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.report.samples import read_samples
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.rl.rollout import Rollout
from deepseek_jax.rl.shared_rows import Shape
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train import grpo
from deepseek_jax.train.grpo import GRPOTrainer, _counted, total_tokens, update_reference
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.grpo_stage import run_grpo
from deepseek_jax.train.loop import NonFiniteError, ended_nonfinite

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENIZER = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
CONFIG = dataclasses.replace(
    preset("tiny"),
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    attention=MLAConfig(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=dataclasses.replace(preset("tiny").moe, moe_intermediate_size=8, first_k_dense_replace=0),
)
SMALL = {"steps": 6, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 9, "lr": 1e-2, "warmup": 1}


@cache
def model():
    graphdef, _ = abstract_weights(CONFIG)
    return Model(CONFIG, graphdef, jax.jit(lambda: split(Decoder(CONFIG, rngs=nnx.Rngs(0)))[1])())


@cache
def generator():
    return Generator(CONFIG, model().graphdef)


def digits(prompts, completions, completion_ids, **columns):
    return [sum(ch.isdigit() for ch in c) / (1 + len(i)) for c, i in zip(completions, completion_ids, strict=True)]


def prompts(count=6):
    tokens = lambda text: TOKENIZER.chat([{"role": "user", "content": text}])
    return [Prompt(t, tokens(t), {}) for t in (f"{n}+{n + 1}=?" for n in range(count))]


UPDATES = {}


def trainer(reward=digits, **changes):
    """With the compiled update of the first trainer whose update is the same: compiling is what these tests do most."""
    config = GRPOConfig(**SMALL | changes)
    of = GRPOTrainer(
        config, model(), TOKENIZER, generator(), combine({"digits": reward}, {"digits": 1.0}), width=32, seed=3
    )
    settings = config.loss, config.adamw, config.step_config, config.lora, of._updates, tuple(of.score.items())
    of.update = UPDATES.setdefault(settings, of.update)
    return of


def one_step(of: GRPOTrainer, number=0):
    return of.step(of.first_state(), lambda: prompts(2), number)


def flat(state) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_close(first, second, atol):
    for name, leaf in flat(first).items():
        np.testing.assert_allclose(flat(second)[name], leaf, rtol=0, atol=atol, err_msg=name)


# Adam divides by the gradient's own size, so that a gradient of rounding would move a weight by a whole step.
SGD_LIKE = 2e-5


def gradients(of: GRPOTrainer):
    """First moments after one update from zero, a tenth of the clipped gradient, with a reference far away."""
    state = of.first_state()
    apart = state._replace(reference=jax.tree.map(lambda w: 1.1 * w, state.reference))
    learned = of.step(apart, lambda: prompts(2), 0)
    return flat(learned.state.train.moments), learned.metrics


@cache
def gradients_of(loss):
    return gradients(trainer(loss=loss, share_prompts=False))


def plain_gradients(loss_type="grpo"):
    return gradients_of(GRPOLossConfig(loss_type=loss_type, beta=0.1))


@pytest.mark.parametrize(
    ("loss_type", "changes"),
    [
        ("grpo", {}),
        ("grpo", {"pack": True}),
        ("grpo", {"micro_batches": 4, "share_prompts": False}),
        pytest.param("grpo", {"pack": True, "share_prompts": False}, marks=pytest.mark.slow),
        pytest.param("grpo", {"micro_batches": 2}, marks=pytest.mark.slow),
        pytest.param("dapo", {"pack": True, "micro_batches": 2}, marks=pytest.mark.slow),
    ],
)
def test_shared_prompts_packing_and_micro_batches_change_no_gradient(loss_type, changes):
    wanted, metrics = plain_gradients(loss_type)
    found, others = gradients(trainer(loss=GRPOLossConfig(loss_type=loss_type, beta=0.1), **changes))
    assert any(np.abs(g).max() > 1e-4 for g in wanted.values())
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=SGD_LIKE, err_msg=name)
    # The moments are of a gradient clipped to norm 1, and would not show a wrong scale: these do.
    assert abs(metrics["loss"]) > 1e-3 and metrics["kl"] > 1e-2 and metrics["grad_norm"] > 1
    for name in ("loss", "policy_loss", "kl", "grad_norm", "entropy", "ratio", "reward", "router/balance_loss"):
        assert others[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def test_a_group_lies_in_a_row_behind_its_prompt_and_goes_into_one_update():
    of = trainer(updates_per_rollout=2)
    asked = [Prompt(str(n), list(range(5 + n, 15 + n)), {}) for n in range(2)]
    tokens = lambda n: np.full(n, 3, np.int32)
    completions = [Completion(tokens(n), np.zeros(n, np.float32), True) for n in (9, 1, 4, 9, 2, 2, 9, 9)]
    rollout = Rollout(asked, completions, np.arange(8.0, dtype=np.float32).reshape(2, 4), {})
    batches = list(of.batches(rollout, 0))
    assert of.shape == Shape(1, 64, 4)
    for number, batch in enumerate(batches):
        assert batch.tokens_BT.shape == (1, 64)
        assert batch.tokens_BT[0, :10].tolist() == asked[number].tokens  # the last one is the first sample's own
        assert sorted(batch.lengths_BK[0]) == sorted(len(c.tokens) for c in completions[4 * number : 4 * number + 4])
        assert (batch.segments_BT > 0).sum() == 9 + batch.lengths_BK.sum()
    alone = next(trainer(updates_per_rollout=4).batches(rollout, 0))  # two samples of each group an update
    assert alone.prompt_of_BT is None and alone.tokens_BT.shape == (2, 32)
    assert trainer(share_prompts=False).shape == Shape(8, 32, 1)


def test_metrics_have_the_names_that_dashboards_know():
    wanted = {
        *("reward", "reward_std", "frac_reward_zero_std", "rewards/digits/mean", "rewards/digits/std"),
        *("kl", "entropy", "loss", "grad_norm", "learning_rate", "num_tokens"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
        *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
        *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
    }
    assert wanted <= plain_gradients()[1].keys()


def test_the_sampler_is_the_trainer():
    """float32: log-probs within 1e-5, and the same experts for every token."""
    metrics = one_step(trainer(record_routes=True)).metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["sampling/experts_differ"] == 0.0


def test_kept_routing_changes_nothing_on_policy_and_something_off_policy():
    kept, free = (trainer(keep_routing=k, record_routes=True, lr=0.1, warmup=0) for k in (True, False))
    first, rollout = kept.first_state(), one_step(kept).rollout
    on_policy = [of.learn(of.first_state(), rollout, 0)[0].train for of in (kept, free)]
    assert_close(on_policy[0].weights, on_policy[1].weights, 1e-6)
    # Now the weights are far from the sampler's: the router would choose other experts, and is not asked.
    moved = lambda: first._replace(train=jax.tree.map(np.array, on_policy[0]))
    further = [of.learn(moved(), rollout, 1) for of in (kept, free)]
    assert further[0][1]["sampling/experts_differ"].value() > 0
    kept_weights, free_weights = (flat(state.train.weights) for state, _ in further)
    assert any((leaf != free_weights[name]).any() for name, leaf in kept_weights.items())


def test_a_kept_sampling_mask_makes_a_truncated_sampler_on_policy():
    metrics = one_step(trainer(top_p=0.8, keep_sampling_mask=True)).metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["entropy"] < one_step(trainer()).metrics["entropy"] - 0.1  # of fewer tokens
    with pytest.raises(ValueError, match="keep_sampling_mask: got False with top_p 0.8"):
        GRPOConfig(top_p=0.8)


def test_the_correction_for_the_sampler_is_one_where_sampler_and_trainer_are_the_same():
    loss = GRPOLossConfig(beta=0.0, importance_sampling_clip_max=2.0)
    of = trainer(loss=loss)
    learned = one_step(of)
    for name in ("min", "mean", "max"):
        assert learned.metrics[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1, abs=1e-4)
    assert learned.state.reference is None
    # A sampler that said 0.3 nats more than the trainer: the weight is trainer over sampler, not the inverse.
    drawn = learned.rollout
    off = drawn._replace(completions=[c._replace(logprobs=c.logprobs + 0.3) for c in drawn.completions])
    _, metrics = of.learn(of.first_state(), off, 0)
    assert metrics["sampling/importance_sampling_ratio/mean"].value() == pytest.approx(np.exp(-0.3), abs=1e-4)
    assert metrics["sampling/sampling_logp_difference/mean"].value() == pytest.approx(0.3, abs=1e-4)


def test_cut_off_completions_do_not_count_when_masked():
    everything = trainer(mask_truncated_completions=True, max_new_tokens=1)
    learned = one_step(everything)
    finished = sum(c.finished for c in learned.rollout.completions)
    assert finished < 8
    batch = next(iter(everything.batches(learned.rollout, 0)))
    assert batch.mask_BT.sum() == finished


@pytest.mark.parametrize(
    ("advantage", "scale", "wanted"),
    [
        ("group", "none", [[-0.25, 0.75, -0.25, -0.25], [0, 0, 0, 0]]),
        ("group", "group", [[-0.4999, 1.4997, -0.4999, -0.4999], [0, 0, 0, 0]]),
        ("rloo", "group", [[-1 / 3, 1, -1 / 3, -1 / 3], [0, 0, 0, 0]]),
    ],
)
def test_advantages_by_hand(advantage, scale, wanted):
    of = trainer(advantage=advantage, scale_rewards=scale)
    found = of.advantages(np.array([[0, 1, 0, 0], [1, 1, 1, 1]], np.float32), 0)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_what_compares_sampler_and_trainer_is_of_the_first_update():
    """Later updates of a rollout meet weights that have moved, which says nothing of the sampler."""
    metrics = one_step(trainer(record_routes=True, num_iterations=3, updates_per_rollout=2, lr=0.1, warmup=0)).metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5 and metrics["sampling/experts_differ"] == 0.0
    assert metrics["ratio"] != pytest.approx(1, abs=1e-2)


def test_more_tokens_than_an_int32_holds():
    of = trainer()
    state = of.first_state()._replace(tokens=_counted(2**31 - 10))
    after = of.step(state, lambda: prompts(2), 0)
    assert after.metrics["num_tokens"] == total_tokens(after.state.tokens) > 2**31


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at_once": 0}, "at_once: got 0"),
        ({"lr": -1.0}, "learning_rate: got -1"),
        ({"warmup": -3}, "warmup_steps: got -3"),
        ({"top_k": -3, "keep_sampling_mask": True}, "top_k: got -3"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"profile_steps": "50:99"}, "profile_steps: got '50:99'"),
        ({"lora_rank": 2, "lora_alpha": -1.0}, "alpha: got -1"),
        ({"advantage": "foo"}, "advantage: got 'foo'"),
        ({"advantage": "rloo", "scale_rewards": "none"}, "scale_rewards: got 'none' with advantage 'rloo'"),
        ({"advantage": "reinforce", "sampling_rounds": 2}, "sampling_rounds: got 2 with advantage 'reinforce'"),
        (
            {"loss": GRPOLossConfig(loss_type="dr_grpo", max_completion_length=4096)},
            "max_completion_length: got 4096, wanted max_new_tokens, 9",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**SMALL | changes)


def test_the_reference_follows_every_so_many_steps_and_as_far_as_told():
    of = trainer(reference_every=2, reference_mixup=0.25)
    state = of.first_state()
    start = flat(state.reference)
    state = of.step(state, lambda: prompts(2), 0).state
    assert_close(state.reference, start_tree(), 0)
    state = of.step(state, lambda: prompts(2), 1).state
    now = flat(state.train.weights)
    for name, leaf in flat(state.reference).items():
        np.testing.assert_allclose(leaf, start[name] + 0.25 * (now[name] - start[name]), atol=1e-7, err_msg=name)
    whole = update_reference(start_tree(), state.train.weights, 1.0, jnp.dtype("float32"))
    assert_close(whole, state.train.weights, 0)


def test_an_adapter_learns_beside_weights_that_stay():
    """And the sampler is the trainer with it, too."""
    before = flat(start_tree())
    of = trainer(lora_rank=2, lora_targets=("q_a_proj", "o_proj"), warmup=0, loss=GRPOLossConfig(beta=0.1))
    first = one_step(of)
    second = of.step(first.state, lambda: prompts(2), 1)
    assert second.metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert first.metrics["kl"] < 1e-8 < second.metrics["kl"]
    given = {id(leaf) for leaf in jax.tree.leaves(of.policy(second.state))}
    assert {id(leaf) for leaf in jax.tree.leaves(of.frozen)} < given  # the sampler's are no copies
    merged = flat(of.trained(second.state))
    moved = {name for name, leaf in before.items() if (merged[name] != leaf).any()}
    assert moved and all(".q_a" in name.replace("['", ".") or ".o" in name.replace("['", ".") for name in moved)
    for name, leaf in flat(start_tree()).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


def start_tree():
    return model().weights


# --- a resumed stage --------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


def run(folder, of: GRPOTrainer, *, until: int | None = None, seen: list | None = None):
    """The stage; killed when the rewards of step `until` are asked for."""
    asked = prompts()
    data = batches(asked, size=2, seed=5)
    inner, calls = of.step, []

    def step(state, draw, number):
        if number == until:
            raise Killed

        def noted():
            drawn = draw()
            calls.append((number, [p.text for p in drawn]))
            return drawn

        return inner(state, noted, number)

    of.step = step
    with MetricLog(folder) as log:
        try:
            return run_grpo(of, data, folder=folder, log=log).train.weights
        except Killed:
            return None
        finally:
            if seen is not None:
                seen += calls


def sometimes(prompts, completions, completion_ids, **columns):
    """Equal rewards for every group of even questions, so that dynamic sampling draws again."""
    return [len(i) * (int(p[0]) % 2) for p, i in zip(prompts, completion_ids, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_rounds": 3, "reference_every": 2, "reference_mixup": 0.5, "loss": GRPOLossConfig(beta=0.1)},
        pytest.param(
            {"pack": True, "keep_routing": True, "updates_per_rollout": 2, "num_iterations": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_stage_repeats_and_loses_no_prompt_and_ends_bit_identical(tmp_path, changes):
    make = lambda: trainer(reward=sometimes, save_every=2, samples_every=1, **changes)
    whole_seen, seen = [], []
    whole = run(tmp_path / "whole", make(), seen=whole_seen)
    for until in (1, 3, 4):
        assert run(tmp_path / "broken", make(), until=until, seen=seen) is None
    broken = run(tmp_path / "broken", make(), seen=seen)
    for name, leaf in flat(whole).items():
        assert flat(broken)[name].tobytes() == leaf.tobytes(), name
    # Steps that were lost are done again on the very same prompts.
    assert all(of in whole_seen for of in seen) and all(of in seen for of in whole_seen)
    if "sampling_rounds" in changes:
        assert len(whole_seen) > 6
    assert len(read_samples(tmp_path / "whole")) == 6
    assert read_samples(tmp_path / "broken") == read_samples(tmp_path / "whole")
    timeless = lambda folder: [{k: v for k, v in row.items() if not k.endswith("time")} for row in read_metrics(folder)]
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "whole")


# --- what is not finite ------------------------------------------------------------------------------


def stage(folder, **changes):
    of = trainer(save_every=2, warmup=0, **changes)
    data = batches(prompts(), size=2, seed=0)
    return run_grpo(of, data, folder=folder, log=MetricLog(folder))


def test_a_run_stops_at_the_step_whose_numbers_are_not_finite(tmp_path):
    """Nothing good is overwritten, and with another learning rate the run goes on from what is left."""
    with pytest.raises(NonFiniteError, match="grpo: step 1 of 6: weights or .*not finite.*last good checkpoint: none"):
        stage(tmp_path / "inf", lr=math.inf)
    assert read_metrics(tmp_path / "inf" / "metrics.jsonl")[-1]["nonfinite_updates"] == 1

    updates = itertools.count(1)

    def explodes(state, batch):
        state, metrics = whole_update(state, batch)
        if next(updates) == 4:
            state = state._replace(weights=jax.tree.map(lambda w: w * np.nan, state.weights))
        return state, metrics

    of = trainer(save_every=2)
    whole_update, of.update = of.update, explodes
    data = lambda: batches(prompts(), size=2, seed=0)
    with pytest.raises(NonFiniteError, match=r"step 5 of 6: weights or .*last good checkpoint: .*/checkpoints/grpo/4"):
        run_grpo(of, data(), folder=tmp_path / "nan", log=MetricLog(tmp_path / "nan"))
    assert ended_nonfinite(tmp_path / "inf") and ended_nonfinite(tmp_path / "nan")
    assert not ended_nonfinite(tmp_path)


def test_the_checkpoint_of_the_best_accuracy_stays(tmp_path):
    accuracies = iter([0.25, 0.75, 0.5, 0.5, 0.5, 0.5])
    of = trainer(save_every=1, eval_every=1)
    data = batches(prompts(), size=2, seed=0)
    run_grpo(of, data, folder=tmp_path, log=MetricLog(tmp_path), evaluate=lambda weights: next(accuracies))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints" / "grpo").iterdir()) == [2, 5, 6]


def test_spikes_are_left_out_and_counted():
    of = trainer(skip_grad_norm=1e-6)
    before = of.first_state()
    kept = jax.tree.map(np.asarray, before.train)
    learned = of.step(before, lambda: prompts(2), 0)
    assert learned.metrics["skipped_updates"] == 1 and learned.metrics["nonfinite_updates"] == 0
    for name, leaf in flat(kept.weights).items():
        np.testing.assert_array_equal(flat(learned.state.train.weights)[name], leaf)
    assert one_step(trainer(skip_grad_norm=1e6)).metrics["skipped_updates"] == 0
    assert "skipped_updates" not in one_step(trainer()).metrics


# --- options of TRL 1.16 -----------------------------------------------------------------------------


def test_unknown_rewards_teach_nothing_whatever_they_are_compared_with():
    nan = np.nan
    rewards = np.array([[1, 0, nan, nan], [nan] * 4], np.float32)
    for advantage in ("group", "rloo", "reinforce", "reinforce_baseline"):
        found = trainer(advantage=advantage).advantages(rewards, 0)
        assert (found[np.isnan(rewards)] == 0).all() and found[0, 0] == -found[0, 1] > 0.4
    np.testing.assert_allclose(trainer().advantages(rewards, 0)[0, 0], 1 / np.sqrt(2), rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "lora_targets": ("o_proj",)}], ids=["weights", "adapter"])
def test_all_that_is_scored_is_computed_in_what_samples(changes, monkeypatch):
    """Reference, policy and entropy alike; else the update would meet other numbers than chose its tokens."""
    seen, real = {}, grpo.frozen_scores

    def spy(graphdef, weights, *args, **options):
        params, _ = nnx.split_state(weights, nnx.Param, ...)
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
        seen.setdefault(options.get("wanted", "logprobs_BT"), set()).update(dtypes)
        return real(graphdef, weights, *args, **options)

    monkeypatch.setattr(grpo, "frozen_scores", spy)
    loss = GRPOLossConfig(loss_type="dapo", beta=0.1, top_entropy_quantile=0.5)
    of = trainer(loss=loss, dtype="bfloat16", **changes)
    of.update = lambda train, batch: (train, {})  # comes after the scores, and takes longest to compile
    one_step(of)
    assert seen == {"logprobs_BT": {"bfloat16"}, "entropy_BT": {"bfloat16"}}


@pytest.mark.parametrize("changes", [{"micro_batches": 4}, {"pack": True}], ids=str)
def test_high_entropy_tokens_are_those_of_the_whole_batch(changes):
    loss = GRPOLossConfig(loss_type="dapo", beta=0.1, top_entropy_quantile=0.3, entropy_coef=0.1)
    (wanted, metrics), (found, others) = gradients_of(loss), gradients(trainer(loss=loss, **changes))
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=SGD_LIKE, err_msg=name)
    for name in ("loss", "policy_loss", "grad_norm", "entropy_coef"):
        assert others[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def test_the_adaptive_weight_goes_through_a_resume(tmp_path):
    loss = GRPOLossConfig(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=10.0, beta=0.0)
    of = lambda: trainer(loss=loss, save_every=2)
    assert run(tmp_path, of(), until=3) is None
    state = run_grpo(of(), batches(prompts(), size=2, seed=5), folder=tmp_path, log=MetricLog(tmp_path))
    weights = [row["entropy_coef"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    np.testing.assert_allclose(weights, [0.015, 0.02, 0.025, 0.03, 0.035, 0.04], rtol=1e-5)
    assert float(state.entropy[0]) == pytest.approx(0.04)


def test_each_reward_by_itself_then_summed():
    of = trainer(multi_objective_aggregation="normalize_then_sum")
    rewards = np.array([[1, 0, np.nan, 2], [1, 1, 1, 1]], np.float32)
    found = of.advantages(rewards, 0, {"digits": [1.0, 0.0, None, 2.0, 1.0, 1.0, 1.0, 1.0]})
    assert found[0, 2] == 0 and found[0, 1] < 0 < found[0, 3] and (found[1] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_p": 0.1}, "keep_sampling_mask: got False with min_p 0.1"),
        ({"repetition_penalty": 1.1}, "keep_sampling_mask: got False with repetition_penalty 1.1"),
        ({"min_p": 2.0, "keep_sampling_mask": True}, "min_p: got 2.0"),
        ({"skip_grad_norm": 0.0}, "skip_grad_norm: got 0.0"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation: got 'sum'"),
        ({"multi_objective_aggregation": "normalize_then_sum", "advantage": "rloo"}, "advantage: got 'rloo'"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch"}, "scale_rewards: got 'batch'"),
    ],
)
def test_new_options_that_contradict_others_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)


@pytest.mark.slow
def test_two_hundred_steps_in_bfloat16_learn_what_float32_does():
    """Samples part ways after a few steps, so that runs are compared as runs of two seeds are: by their mean rewards.

    The bound is what two seeds in float32 differ by, and a tenth of what is learnt.
    """

    def rewards(dtype: str, seed: int) -> np.ndarray:
        of = trainer(steps=200, prompts_per_step=4, group_size=8, lr=3e-3, dtype=dtype)
        of.seed, state, found = seed, of.first_state(), []
        for number in range(200):
            learned = of.step(state, lambda: prompts(4), number)
            state = learned.state
            found.append(learned.metrics["reward"])
        return np.array(found).reshape(4, 50).mean(axis=1)

    wanted, other, found = rewards("float32", 3), rewards("float32", 4), rewards("bfloat16", 3)
    print(wanted, other, found)
    learnt = wanted[-1] - wanted[0]
    assert learnt > 0.1
    assert np.abs(found - wanted).max() <= np.abs(other - wanted).max() + learnt / 10
