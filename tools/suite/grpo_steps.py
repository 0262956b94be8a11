"""Whole steps of GRPO on the same weights, ours and TRL's: sampling, reward, update."""

import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.config import preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.generator import Generator
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.grpo import GRPOTrainer
from deepseek_jax.train.grpo_config import GRPOConfig

_ENDLESS = 1_000_000  # steps: both end when nobody asks for another


class StepLoad(NamedTuple):
    """Questions, samples of each, new tokens of every sample, and the weight of the KL term."""

    texts: Sequence[str]
    group_size: int
    tokens: int
    kl: float = 0.0


def repeated(text: str, tokens: int, tokenizer: Tokenizer) -> str:
    """A text again and again, until there are at least so many tokens."""
    whole = text
    while len(tokenizer.encode(whole, add_bos=False)) < tokens:
        whole += text
    return whole


class _Ended(Exception):
    """Nobody asks for another step."""


class OurSteps:
    """A step a call, which gives its seconds.

    Attributes:
        parts: of every step, seconds of its sampling with the reward, and of its update.
    """

    def __init__(self, folder: Path, load: StepLoad, *, share_prompts: bool = True, dtype: str = "float32"):
        model, tokenizer = load_model(folder, dtype=jnp.dtype(dtype)), Tokenizer.from_folder(folder)
        config = GRPOConfig(
            steps=_ENDLESS,
            prompts_per_step=len(load.texts),
            group_size=load.group_size,
            max_new_tokens=load.tokens,
            loss=GRPOLossConfig(beta=load.kl),
            lr=1e-6,
            balance_alpha=0.0,
            bias_gamma=0.0,
            share_prompts=share_prompts,
            dtype=dtype,
        )
        self.load, self.parts = load, []
        self._asked = [Prompt(text, tokenizer.encode(text, add_bos=False), {}) for text in load.texts]
        width = max(len(p.tokens) for p in self._asked) + load.tokens - 1
        reward = combine({"vowels": _vowels}, {"vowels": 1.0})
        generator = Generator(model.config, model.graphdef)
        self._trainer = GRPOTrainer(config, model, tokenizer, generator, reward, width=width, seed=0)
        worker = self._trainer.rollout_worker
        endless = dataclasses.replace(worker.sampling, stop_ids=())
        self._trainer.rollout_worker = dataclasses.replace(worker, sampling=endless)
        self._state = self._trainer.first_state()

    def __call__(self) -> float:
        start = time.perf_counter()
        learned = self._trainer.step(self._state, lambda: self._asked, 0)
        assert all(len(c.tokens) == self.load.tokens for c in learned.rollout.completions)
        self._state = jax.block_until_ready(learned.state)
        self.parts.append((learned.metrics["rollout_time"], learned.metrics["update_time"]))
        return time.perf_counter() - start


def _vowels(prompts, completions, completion_ids, **columns) -> list[float]:
    """A reward that costs nothing and differs within a group."""
    return [sum(letter in "aeiou13579" for letter in text) / (1 + len(text)) for text in completions]


@contextmanager
def trl_steps(folder: Path, load: StepLoad, dtype: str = "float32") -> Iterator[Callable[[], float]]:
    """TRL's GRPOTrainer, a step a call, which gives its seconds. It runs in a thread and waits between its steps."""
    turns: Queue[bool] = Queue()
    answers: Queue[float | BaseException] = Queue()

    def train() -> None:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                _trl_trainer(folder, load, dtype, scratch, turns, answers).train()
        except _Ended:
            pass
        except BaseException as problem:  # whoever waits for a step has it
            answers.put(problem)

    thread = threading.Thread(target=train, name="trl", daemon=True)
    thread.start()

    def once() -> float:
        turns.put(True)
        answer = answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    try:
        yield once
    finally:
        turns.put(False)
        thread.join()


def _trl_trainer(folder: Path, load: StepLoad, dtype: str, scratch: str, turns: Queue, answers: Queue) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig as TheirConfig
    from trl import GRPOTrainer as TheirTrainer

    own = Tokenizer.from_folder(folder)
    end = own.decode([own.eos_ids[0]], skip_special=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=end, pad_token=end)
    config = TheirConfig(
        output_dir=scratch,
        per_device_train_batch_size=len(load.texts) * load.group_size,
        num_generations=load.group_size,
        max_completion_length=load.tokens,
        max_steps=_ENDLESS,
        learning_rate=1e-6,
        beta=load.kl,
        loss_type="grpo",
        temperature=1.0,
        generation_kwargs={"min_new_tokens": load.tokens},
        gradient_checkpointing=False,
        max_grad_norm=1.0,
        bf16=dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
    )

    class Turns(TrainerCallback):
        """A step begins when it is asked for, and its seconds are the answer."""

        def on_step_begin(self, *_, **__):
            if not turns.get():
                raise _Ended
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            answers.put(time.perf_counter() - self.start)

    return TheirTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: _vowels(None, completions, None),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(load.texts)}),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )


def tiny(folder: Path, experts: int | None = None) -> Path:
    """A random model of the preset `tiny` with a tokenizer, as a Hugging Face folder.

    Args:
        folder: to be made.
        experts: routed experts, 8 of them a token in 8 groups, as in R1 with its 256; None is the preset's.
    """
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    config = dataclasses.replace(
        preset("tiny"), vocab_size=32, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids[0]
    )
    if experts is not None:
        like_r1 = {"n_routed_experts": experts, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **like_r1))
    graphdef, weights = split(Decoder(config, rngs=nnx.Rngs(0)))
    save_model(Model(config, graphdef, weights), folder, tokenizer=tokenizer.files)
    return folder
