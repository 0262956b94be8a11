"""Two tokenizers have the same tokens or they have not, however their files are written."""

import dataclasses
import json

import pytest

from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.text.vocabulary import vocabulary_difference

ONE = Tokenizer.characters("abc", chat_template="x")


def with_file(change) -> Tokenizer:
    values = json.loads(ONE.files["tokenizer.json"])
    change(values)
    return dataclasses.replace(ONE, files={**ONE.files, "tokenizer.json": json.dumps(values).encode()})


def test_how_the_file_is_written_and_the_template_do_not_count():
    other = Tokenizer.characters("abc", chat_template="y")
    assert vocabulary_difference(ONE, other) is None
    assert vocabulary_difference(ONE, with_file(lambda values: values.pop("version"))) is None


def test_another_token_is_named_with_its_id():
    assert vocabulary_difference(ONE, Tokenizer.characters("acb", chat_template="x")) == (
        "id 10 is 'b' here and 'c' there"
    )
    assert vocabulary_difference(ONE, Tokenizer.characters("abcd", chat_template="x")) == (
        "id 12 is None here and 'd' there"
    )

    def renamed(values):
        values["added_tokens"][0]["content"] = "<nothing>"

    assert vocabulary_difference(ONE, with_file(renamed)) == "id 0 is '<pad>' here and '<nothing>' there"


def test_a_unigram_vocabulary_is_a_list():
    def unigram(values):
        values["added_tokens"] = []
        values["model"]["vocab"] = [[text, 0.0] for text in ("<pad>", "x")]

    assert vocabulary_difference(ONE, with_file(unigram)) == "id 1 is '<bos>' here and 'x' there"


@pytest.mark.parametrize(
    "broken", [{}, {"model": 3}, {"model": {"vocab": 3}}, {"model": {"vocab": {"a": 0}}, "added_tokens": [3]}]
)
def test_a_file_without_a_vocabulary_is_a_line(broken):
    def change(values):
        values.clear()
        values.update(broken)

    with pytest.raises(ValueError, match="no vocabulary in it"):
        vocabulary_difference(ONE, with_file(change))
