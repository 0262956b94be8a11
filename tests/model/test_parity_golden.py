"""Logits equal those that transformers gave, by the golden files of tools/make_golden.py; needs no torch."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import load_model
from tools.make_golden import GOLDEN, GOLDENS, write_folder

TOLERANCE = 5e-5  # float32, logits of magnitude 4
FILES = sorted(GOLDEN.glob("*.npz"))


def test_every_golden_case_has_its_file():
    assert {file.stem for file in FILES} == GOLDENS.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_logits_equal_the_golden_ones(file: Path, tmp_path: Path):
    with np.load(file) as golden:
        folder = tmp_path / "model"
        write_folder(folder, json.loads(str(golden["config"])), int(golden["seed"]))
        _, graphdef, weights = load_model(folder)

        @jax.jit
        def forward(weights, tokens):
            module = nnx.merge(graphdef, weights)
            return module.logits(module(tokens).x_BTD)

        got = forward(weights, golden["tokens"])
        assert got.dtype == np.float32
        assert np.abs(golden["logits"]).max() > 1  # the comparison says something
        np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=TOLERANCE)
