"""What the stages of a training run work with: model, tokenizer, sampler, questions and rewards."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
from flax import nnx

from deepseek_jax.checkpoint.folder import Model, lay_out, load_model
from deepseek_jax.commands.run_options import SamplingMeshOptions
from deepseek_jax.commands.toy import small_model
from deepseek_jax.commands.train_data import asked
from deepseek_jax.commands.train_settings import Config
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.generator import Generator, bucket
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.precision import dtype_of
from deepseek_jax.model.transfer import Transfer, sampled_config
from deepseek_jax.rewards.recipe import Rewards
from deepseek_jax.sharding import Layout
from deepseek_jax.text.tokenizer import Tokenizer


class Setup(NamedTuple):
    """What both stages work with. `to_sampler` lays weights out for the generator; they stay where they are too."""

    layout: Layout
    model: Model
    tokenizer: Tokenizer
    generator: Generator
    to_sampler: Callable[[nnx.State], nnx.State]
    prompts: grain.DatasetIterator
    width: int
    held_out: list[Prompt]
    cold_start: list[tuple[list[int], list[int]]]
    rewards: Rewards


def prepare(config: Config, graded: Rewards) -> Setup:
    """The model, its tokenizer, and questions split into training and held-out ones."""
    layout = config.mesh.layout
    if config.base.model is None:
        tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
        model = lay_out(small_model(tokenizer, config.seed), layout)
    else:
        tokenizer = Tokenizer.from_folder(config.base.model)
        if not tokenizer.eos_ids:
            raise ValueError(
                f"{config.base.model}: names no end-of-sequence token, wanted one for completions to end with; add "
                "eos_token to tokenizer_config.json or eos_token_id to generation_config.json"
            )
        # what an adapter leaves as it is needs no float32
        dtype = dtype_of(config.grpo.dtype if config.grpo.lora_rank else "float32")
        model = load_model(config.base.model, dtype=dtype, layout=layout)
    prompts, longest, held_out, examples = asked(config, tokenizer)
    # whole multiples of 32 columns, so that what differs little compiles to the same
    width = -(-(longest + config.grpo.max_new_tokens - 1) // 32) * 32
    config.grpo.check_model(model.config, longest)
    parts = config.grpo.updates_per_rollout * config.grpo.micro_batches
    layout.check_batch(config.grpo.prompts_per_step * config.grpo.group_size // parts, width)
    if examples:
        layout.check_batch(config.toy.cold_start_batch // config.grpo.micro_batches, example_width(examples))
    generator = make_sampler(config.mesh, model.config, layout)
    to_sampler = Transfer(generator.config, layout, generator.layout, dtype_of(config.grpo.dtype))
    return Setup(layout, model, tokenizer, generator, to_sampler, prompts, width, held_out, examples, graded)


def make_sampler(mesh: SamplingMeshOptions, architecture: ModelConfig, layout: Layout) -> Generator:
    """The generator, in a layout of its own on the devices of training."""
    serving = mesh.serving(architecture, layout)
    sampled = sampled_config(architecture)
    return Generator(sampled, abstract_weights(sampled, layout=serving)[0])


def example_width(examples: Sequence[tuple[list[int], list[int]]]) -> int:
    """Columns of a cold start's batch."""
    return bucket(max(len(p) + len(c) for p, c in examples) - 1)
