"""On-policy distillation: what is sampled, what is learnt from it, and runs that were broken off."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.examples import Prompt
from deepseek_jax.data.prompts import batches
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.ops.divergence import Divergence
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.distill_loss import make_distill_objective
from deepseek_jax.train.on_policy import OnPolicyTrainer, run_on_policy
from deepseek_jax.train.sft import SFTTrainer
from deepseek_jax.train.sft_config import SFTConfig
from deepseek_jax.train.sft_loss import completion_tokens
from tests.train.test_distill_loss import model
from tests.train.test_sft import CONFIG, ROUTED, SETTINGS

TOKENIZER = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
SHORT = dataclasses.replace(CONFIG, max_position_embeddings=64)
STEPS, NEW = 6, 8


def prompts() -> list[Prompt]:
    tokens = lambda text: TOKENIZER.chat([{"role": "user", "content": text}])
    return [Prompt("", tokens(f"{n}+{n}=?"), {}) for n in range(8)]


def trainer(weights=(0.5, 0.5), **settings) -> OnPolicyTrainer:
    teachers = [model(ROUTED, 1), model(SHORT, 2)][: len(weights)]
    objective = make_distill_objective([each.graphdef for each in teachers], Divergence("reverse", 1.0, weights))
    given = (tuple(each.weights for each in teachers),)
    config = SFTConfig(**{**SETTINGS, "save_every": 2, **settings})
    learner = SFTTrainer(config, model(SHORT), steps=STEPS, width=32, objective=objective, given=given)
    generator = Generator(SHORT, abstract_weights(SHORT)[0])
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=1.0, stop_ids=TOKENIZER.eos_ids)
    return OnPolicyTrainer(learner, generator, TOKENIZER, sampling, samples=2, seed=0)


def test_what_is_learnt_is_what_the_student_drew_and_only_that():
    made = trainer()
    state = made.learner.first_state()
    drawn = made.sample(state, prompts()[:4], 0)
    assert [c.tokens.tolist() for c in made.sample(state, prompts()[:4], 0)] == [c.tokens.tolist() for c in drawn]
    assert any(
        a.tokens.tolist() != b.tokens.tolist() for a, b in zip(drawn, made.sample(state, prompts()[:4], 1), strict=True)
    )
    asked = [prompt.tokens for prompt in prompts()[:4] for _ in range(2)]
    examples = [completion_tokens(p, c.tokens) for p, c in zip(asked, drawn, strict=True)]
    assert [int(e.mask.sum()) for e in examples] == [len(c.tokens) for c in drawn]
    _, wanted = trainer().learner.step(trainer().learner.first_state(), examples, 0)
    _, found = made.step(state, prompts()[:4], 0)
    for name in ("loss", "kl", "grad_norm", "entropy"):
        assert found[name] == wanted[name], name
    assert found["completions/mean_length"] == pytest.approx(np.mean([len(c.tokens) for c in drawn]))


def run(folder: Path, *, at: int | None = None):
    made = trainer()
    step = made.step

    def dying(state, given, number):
        if number == at:
            raise InterruptedError
        return step(state, given, number)

    made.step = dying
    with MetricLog(folder) as log:
        state = run_on_policy(made, batches(prompts(), size=4, seed=0), folder=folder, log=log)
    timed = ("time", "step_time", "tokens_per_second", "rollout_time")
    return state, [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(folder)]


def test_a_stage_comes_nearer_and_one_that_was_killed_ends_as_an_unbroken_one(tmp_path):
    wanted, metrics = run(tmp_path / "whole")
    assert metrics[-1]["kl"] < 0.9 * metrics[0]["kl"]
    with pytest.raises(InterruptedError):
        run(tmp_path / "broken", at=3)
    state, found = run(tmp_path / "broken")
    assert found == metrics and [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_an_adapter_samples_and_learns():
    made = trainer(weights=(1.0,), lora_rank=2, pack=True)
    state = made.learner.first_state()
    for number in range(2):
        state, metrics = made.step(state, prompts()[:4], number)
    assert metrics["kl"] > 0 and metrics["grad_norm"] > 0


def test_samples_divide_the_batch():
    made = trainer()
    with pytest.raises(ValueError, match="samples: got 3 of each prompt, wanted a divisor of --batch-size 8"):
        OnPolicyTrainer(made.learner, made.generator, TOKENIZER, made.sampling, samples=3, seed=0)
