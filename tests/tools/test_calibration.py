"""tools/calibration.py: its two measures beside plain twins, and that it asks and grades a model."""

import numpy as np
import pytest

from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands.toy import small_model
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.text.tokenizer import Tokenizer
from tools.calibration import auroc, ece, main


def test_measures_are_their_plain_twins():
    rng = np.random.default_rng(0)
    scores = np.round(rng.random(300), 2)
    right = rng.random(300) < scores**2
    missing = 0.0
    for place in range(10):
        rows = [n for n, score in enumerate(scores) if min(int(score * 10), 9) == place]
        missing += abs(sum(scores[n] for n in rows) - sum(right[n] for n in rows)) / 300
    assert ece(scores, right) == pytest.approx(missing)
    pairs = [(a > b) + (a == b) / 2 for a in scores[right] for b in scores[~right]]
    assert auroc(scores, right) == pytest.approx(np.mean(pairs))
    assert ece([1.0, 1.0], [True, True]) == 0 and ece([0.9], [False]) == pytest.approx(0.9)
    assert np.isnan(auroc([0.5], [True]))


@pytest.mark.slow
def test_a_model_is_asked_and_graded(tmp_path, capsys):
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    save_model(small_model(tokenizer, seed=0), tmp_path / "toy", tokenizer=tokenizer.files)
    main(tmp_path / "toy", questions=6, samples=4, max_tokens=12, slots=8, plot=tmp_path / "plot.png")
    printed = capsys.readouterr().out
    assert "6 questions, 4 answers each" in printed and "| agreement | 4 samples |" in printed
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
