"""Values of the reasoning-structure score."""

import pytest

from deepseek_jax.rewards.structure import structure_reward


def score(text):
    (value,) = structure_reward(["step first check"], [text], [[]], answer=["4"])
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("word", 0.001),
        ("Step", 0.201),
        ("first", 0.201),
        ("step first", 0.202),
        ("footstep steps firstly", 0.003),
        (r"\boxed{4}", 0.301),
        (r"\boxed 4 \BOXED{4}", 0.003),
        ("THEREFORE", 0.201),
        ("thus", 0.201),
        ("since", 0.201),
        ("because", 0.201),
        ("so, thus", 0.202),
        ("also some", 0.002),
        ("Check.", 0.301),
        ("verify", 0.301),
        ("checked verifying", 0.002),
        ("next", 0.101),
        ("next next next", 0.103),
        ("then", 0.101),
        ("now", 0.101),
        ("finally", 0.101),
        ("In conclusion:", 0.102),
        ("nextthen known", 0.002),
        ("word " * 500, 0.5),
        ("word " * 5000, 0.5),
        (r"first \boxed{4} so check next then now finally conclusion", 1.0 + 0.009 + 0.5),
    ],
)
def test_values(text, expected):
    assert score(text) == pytest.approx(expected, abs=1e-12)


def test_padding_and_keywords_earn_the_maximum():
    assert score(r"step \boxed{} so check next then now finally conclusion " + "x " * 1000) == pytest.approx(2.0)


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match=r"structure_reward: completions\[0\]: got int"):
        structure_reward([""], [3], [[]])
