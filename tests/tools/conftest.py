"""What the tests of command lines share."""

import dataclasses

import jax
import pytest
from flax import nnx

from deepseek_jax.checkpoint.convert import convert_hf
from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands.generate import main as generate_main
from deepseek_jax.config import preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as a Hugging Face folder, and beside it `converted`."""
    moe = dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0)
    tokenizer = Tokenizer.characters(ALPHABET + "\n ", chat_template=TEMPLATE)
    config = dataclasses.replace(preset("tiny"), num_hidden_layers=1, moe=moe, vocab_size=tokenizer.vocab_size)
    weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()
    model = Model(config, abstract_weights(config)[0], weights)
    target = tmp_path_factory.mktemp("models") / "hf"
    save_model(model, target, tokenizer=tokenizer.files)
    convert_hf(open_folder(target), target.with_name("converted"))
    return target


@pytest.fixture
def generate(command_line):
    """The command of that name."""
    return command_line(generate_main)
