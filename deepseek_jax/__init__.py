"""DeepSeek-style language models in JAX, from a Hugging Face checkpoint to a GRPO-trained model.

    import deepseek_jax as dsj

    for completion in dsj.generate("MODEL", ["What is 17 plus 25?"]):
        print(completion.text)

Below is all that this module has, each with an example in docs/api.md; a name is imported when it is first used, so
that importing the package loads no array library and touches no device, file of others, or network. What is more
special is in the rooms, whose imports run one way: configuration, pure operations, modules, checkpoints, text,
generation, rewards, reinforcement learning, training.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the one list: type checkers read it, and so does `_homes`
    from deepseek_jax.checkpoint.adapters import load_adapter as load_adapter
    from deepseek_jax.checkpoint.adapters import new_adapter as new_adapter
    from deepseek_jax.checkpoint.adapters import save_adapter as save_adapter
    from deepseek_jax.checkpoint.convert import convert_hf as convert_hf
    from deepseek_jax.checkpoint.convert import export_hf as export_hf
    from deepseek_jax.checkpoint.folder import Model as Model
    from deepseek_jax.checkpoint.folder import load_model as load_model
    from deepseek_jax.checkpoint.hub import model_folder as model_folder
    from deepseek_jax.checkpoint.model_folder import open_folder as open_folder
    from deepseek_jax.checkpoint.save import save_model as save_model
    from deepseek_jax.config import ModelConfig as ModelConfig
    from deepseek_jax.config import preset as preset
    from deepseek_jax.data.examples import Prompt as Prompt
    from deepseek_jax.data.prompts import batches as batches
    from deepseek_jax.generation.engine import Engine as Engine
    from deepseek_jax.generation.engine_config import EngineConfig as EngineConfig
    from deepseek_jax.generation.generator import Generator as Generator
    from deepseek_jax.generation.sampling_config import SamplingConfig as SamplingConfig
    from deepseek_jax.generation.text import generate as generate
    from deepseek_jax.model.lora import LoRAConfig as LoRAConfig
    from deepseek_jax.model.lora import merge as merge
    from deepseek_jax.report.metrics import MetricLog as MetricLog
    from deepseek_jax.rewards.accuracy import accuracy_reward as accuracy_reward
    from deepseek_jax.rewards.combine import combine as combine
    from deepseek_jax.rewards.format import format_reward as format_reward
    from deepseek_jax.rewards.math import MathGrader as MathGrader
    from deepseek_jax.rewards.math import math_reward as math_reward
    from deepseek_jax.rl.loss import grpo_loss as grpo_loss
    from deepseek_jax.rl.loss_config import GRPOLossConfig as GRPOLossConfig
    from deepseek_jax.sharding import Layout as Layout
    from deepseek_jax.sharding import make_mesh as make_mesh
    from deepseek_jax.text.think import split_thinking as split_thinking
    from deepseek_jax.text.tokenizer import Tokenizer as Tokenizer
    from deepseek_jax.text.turns import chat_tokens as chat_tokens
    from deepseek_jax.train.distill_loss import DistillConfig as DistillConfig
    from deepseek_jax.train.distill_loss import make_distill_objective as make_distill_objective
    from deepseek_jax.train.grpo import GRPOTrainer as GRPOTrainer
    from deepseek_jax.train.grpo_config import GRPOConfig as GRPOConfig
    from deepseek_jax.train.grpo_stage import run_grpo as run_grpo
    from deepseek_jax.train.on_policy import OnPolicyTrainer as OnPolicyTrainer
    from deepseek_jax.train.on_policy import run_on_policy as run_on_policy
    from deepseek_jax.train.sft import SFTTrainer as SFTTrainer
    from deepseek_jax.train.sft import run_sft as run_sft
    from deepseek_jax.train.sft_config import SFTConfig as SFTConfig


def _homes() -> dict[str, str]:
    """The module of each name in the list above."""
    body = ast.parse(Path(__file__).read_bytes()).body
    (listed,) = (part for part in body if isinstance(part, ast.If))
    return {each.asname: part.module for part in listed.body for each in part.names}


_HOMES = _homes()
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
