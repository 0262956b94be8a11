"""A small model with a real engine behind the server."""

import dataclasses
from functools import cache

import jax
import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.model.decoder import Decoder, split
from tests.generation.test_generator import DENSE
from tests.serve.client import OPENING, tokenizer

CONTEXT = 192
SMALL = dict(max_num_seqs=8, max_num_batched_tokens=64, chunk=32, block_size=4, decode_steps=3, batch_sizes=(8,))


@cache
def model() -> tuple[ModelConfig, nnx.GraphDef, nnx.State]:
    config = dataclasses.replace(DENSE, vocab_size=tokenizer().vocab_size, max_position_embeddings=CONTEXT)
    graphdef, weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(5))))()
    return config, graphdef, weights


@pytest.fixture
def make_engine():
    """A real engine; its programs are compiled once for all tests."""

    def make(template: str = OPENING, **settings) -> Engine:
        return Engine(*model(), EngineConfig(**(SMALL | settings)), tokenizer=tokenizer(template))

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The same model as a folder."""
    config, graphdef, weights = model()
    target = tmp_path_factory.mktemp("served") / "tiny"
    save_model(Model(config, graphdef, weights), target, tokenizer=tokenizer(OPENING).files)
    return target
