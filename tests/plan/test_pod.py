"""What is compiled for pods is what the program runs: the same state, the same batch, the same computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.generator import Generator
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.transfer import serving_layout
from deepseek_jax.plan import compiled
from deepseek_jax.plan.compiled import Task
from deepseek_jax.plan.memory import train_memory, transfer_memory
from deepseek_jax.plan.meshes import Sizes
from deepseek_jax.plan.model_bytes import train_state_bytes
from deepseek_jax.rewards.combine import combine
from deepseek_jax.sharding import Layout, make_mesh
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.text.turns import MaskedTokens
from deepseek_jax.train.grpo import GRPOTrainer
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.sft import SFTTrainer
from deepseek_jax.train.sft_config import MOST_PER_ROW, SFTConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = dataclasses.replace(
    preset("tiny"),
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    attention=MLAConfig(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=dataclasses.replace(preset("tiny").moe, moe_intermediate_size=8, first_k_dense_replace=1),
)
WIDTH = 32


def layout() -> Layout:
    return Layout(mesh=make_mesh(jax.devices()[:1]), scan_layers=True, remat="all_but_attention")


def task(step="grpo", **changes) -> Task:
    serving = serving_layout(CONFIG, layout()) if step == "sync" else None
    return Task(config=CONFIG, layout=layout(), step=step, batch=8, context=WIDTH, serving=serving, **changes)


def trainer(settings: GRPOConfig) -> GRPOTrainer:
    """As the experiment makes it: of weights in float32."""
    graphdef, _ = abstract_weights(CONFIG, layout=layout())
    weights = jax.jit(lambda: split(Decoder(CONFIG, rngs=nnx.Rngs(0), layout=layout()))[1])()
    model, tokenizer = Model(CONFIG, graphdef, weights), Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    serving = serving_layout(CONFIG, layout())
    generator = Generator(CONFIG, abstract_weights(CONFIG, layout=serving)[0])
    reward = combine({"length": lambda prompts, completions, **_: list(map(len, completions))}, {"length": 1.0})
    return GRPOTrainer(settings, model, tokenizer, generator, reward, width=WIDTH, seed=0)


@pytest.mark.parametrize(
    ("dtype", "moments"),
    [
        ("bf16", "float32"),
        pytest.param("bf16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("f32", "float32", marks=pytest.mark.slow),
    ],
)
def test_the_update_that_is_compiled_is_the_one_that_runs(dtype, moments):
    """Whole programs, to the letter, at the shapes and dtypes of state and batch that a run's step came with.

    Rows of one sample each, as R1's are, whose completions are long beside their prompts.
    """
    mine = task(dtype=dtype, moments=moments)
    settings = dataclasses.replace(mine.settings, prompts_per_step=2, group_size=4, max_new_tokens=29)
    of, seen = trainer(settings), []
    update = of.update
    of.update = lambda state, batch: seen.append(update.trace(state, batch)) or (state, {})
    of.step(of.first_state(), lambda: [Prompt("1+1", [3, 4, 3], {})] * 2, 0)
    [ran], traced = seen, compiled.trace(mine).traced
    shapes = lambda traced: jax.tree.map(lambda info: (info.shape, info.dtype), traced.args_info)
    assert shapes(traced) == shapes(ran)
    assert str(traced.jaxpr) == str(ran.jaxpr)


def test_the_fine_tuning_that_is_compiled_is_the_one_that_runs():
    """Of packed rows, by a stage's own settings: to the letter, as above."""
    run = SFTConfig(batch_size=8, pack=True, lr=1e-3, loss_mean="examples")
    mine = task("train", run=run)
    graphdef, _ = abstract_weights(CONFIG, layout=layout())
    weights = jax.jit(lambda: split(Decoder(CONFIG, rngs=nnx.Rngs(0), layout=layout()))[1])()
    of = SFTTrainer(mine.settings, Model(CONFIG, graphdef, weights), steps=1, width=WIDTH, per_row=MOST_PER_ROW)
    rows = [MaskedTokens(np.arange(WIDTH + 1, dtype=np.int32) % 24, np.ones(WIDTH + 1, bool))] * 8
    ran, traced = of.update.trace(of.first_state(), of.batch(rows)), compiled.trace(mine).traced
    shapes = lambda traced: jax.tree.map(lambda info: (info.shape, info.dtype), traced.args_info)
    assert shapes(traced) == shapes(ran)
    assert str(traced.jaxpr) == str(ran.jaxpr)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("f32", marks=pytest.mark.slow)])
def test_the_sync_that_is_compiled_is_the_one_that_runs(dtype):
    mine = task("sync", dtype=dtype)
    of = trainer(dataclasses.replace(mine.settings, prompts_per_step=2, group_size=4, max_new_tokens=9))
    state, program = of.first_state(), compiled.trace(mine)
    ran = of._to_sampler.program(state.train.weights).trace(state.train.weights)
    assert str(program.traced.jaxpr) == str(ran.jaxpr)
    found = of.policy(state)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(program.serving) == shapes(found)
    planned = transfer_memory(CONFIG, mine.state, Sizes(), Sizes())
    assert planned.serving == compiled._on_a_chip(program.serving)
    assert planned.weights == compiled._on_a_chip(program.weights)


def test_settings_are_a_runs_own():
    """But for the parts of an update and the questions of a rollout, whatever is not asked for is the default."""
    found = task(micro_batches=3, moments="bfloat16").settings
    wanted = GRPOConfig(prompts_per_step=3, micro_batches=3, dtype="bfloat16", moments="bfloat16")
    assert found == wanted


@pytest.mark.parametrize(
    ("step", "moments"),
    [
        ("train", "float32"),
        ("grpo", "bfloat16"),
        pytest.param("train", "bfloat16", marks=pytest.mark.slow),
        pytest.param("grpo", "float32", marks=pytest.mark.slow),
    ],
)
def test_planner_and_compiler_count_the_state_that_is_traced(step, moments):
    """Weights and moments to the byte, but for the optimizer's counters."""
    mine = task(step, moments=moments)
    program = compiled.trace(mine)
    kept = train_state_bytes(CONFIG, mine.state)
    assert compiled._on_a_chip(program.weights) == kept.weights
    counters = sum(leaf.dtype.itemsize for leaf in jax.tree.leaves(program.moments) if not leaf.ndim)
    assert compiled._on_a_chip(program.moments) - counters == kept.moments and counters <= 8
    planned = train_memory(CONFIG, mine.state, Sizes(), mine.batch, mine.context)
    assert (planned.weights, planned.optimizer) == (kept.weights, kept.moments)
    assert {leaf.dtype for leaf in jax.tree.leaves(program.weights)} == {jnp.dtype("float32")}
