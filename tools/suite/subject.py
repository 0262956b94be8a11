"""The model that the suite measures."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.config import ModelConfig
from tools.suite.grpo_steps import tiny
from tools.suite.peers import Peer, why_none


class Subject:
    """A folder's model, ours and transformers', each loaded when it is first wanted.

    Attributes:
        folder: Hugging Face folder.
        dtype: of weights and computation.
        no_peer: why transformers does not run beside it; empty where it does.
    """

    def __init__(self, folder: Path, dtype: str):
        self.folder, self.dtype, self.no_peer = folder, dtype, why_none("transformers")

    @cached_property
    def model(self) -> tuple[ModelConfig, nnx.GraphDef, nnx.State]:
        return load_model(self.folder, dtype=jnp.dtype(self.dtype))

    @cached_property
    def peer(self) -> Peer:
        return Peer(self.folder, self.dtype)

    @cached_property
    def trained_peer(self) -> Peer:
        """With float32 masters, as ours are."""
        return Peer(self.folder, "float32")

    @property
    def plan_dtype(self) -> str:
        """As the planner names it."""
        return {"float32": "f32", "bfloat16": "bf16"}[self.dtype]

    def prompts(self, sequences: int, length: int) -> np.ndarray:
        """Random tokens [B, T] int64, the same for everyone."""
        return np.random.default_rng(0).integers(0, self.model[0].vocab_size, (sequences, length))


@contextmanager
def subject(folder: Path | None, dtype: str | None) -> Iterator[Subject]:
    """The model of a folder, or a tiny random DeepSeek-V3; float32 on a CPU, else bfloat16, unless told."""
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with tempfile.TemporaryDirectory() as scratch:
        yield Subject(folder or tiny(Path(scratch) / "model"), dtype)
