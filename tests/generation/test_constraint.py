"""Completions under a grammar keep to it, however they are run, and change nothing for those beside them."""

import numpy as np
import pytest

from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.constraint import ConstraintError
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.text.tokenizer import Tokenizer
from tests.generation.test_engine import WAYS, alone, engine, same, some_requests
from tests.generation.test_generator import V

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENIZER = Tokenizer.characters("abcdefghijklmn\n", chat_template="{{ messages[0]['content'] }}")
THINK, CLOSE, EOS = 3, 4, 2
assert TOKENIZER.vocab_size == V


class Cycle:
    """Token 10 + (number of tokens so far) % 3 or one above it, and after `length` of them an end."""

    def __init__(self, length: int):
        self.length, self.taken = length, []

    def mask(self):
        step = len(self.taken)
        wanted = [EOS] if step == self.length else [10 + 2 * (step % 3), 11 + 2 * (step % 3)]
        bits = np.zeros(1, np.uint32)
        for token in wanted:
            bits[0] |= np.uint32(1 << token)
        return bits

    def accept(self, tokens):
        for token in tokens:
            if not self.mask()[0] >> token & 1:
                raise ConstraintError(f"got {token}")
            self.taken.append(token)


def drawn(found) -> list[int]:
    return found.request.tokens[found.request.prompt_length :]


def constrained(of, count: int, *, prompt=(1, 9), **settings) -> dict[int, Cycle]:
    grammars = [Cycle(2 + number % 4) for number in range(count)]
    sampling = SamplingConfig(**{"max_new_tokens": 12, "stop_ids": (EOS,), **settings})
    return {of.add(prompt, sampling, seed=n, constraint=grammar): grammar for n, grammar in enumerate(grammars)}


SOON = {("gqa", "plain"), ("gqa", "preempted"), ("gqa", "lookup"), ("mla-moe", "plain")}
CASES = [(kind, way) for kind in ("gqa", "mla-moe") for way in ("plain", "no-overlap", "preempted", "lookup")]


@pytest.mark.parametrize(
    "kind, way", [pytest.param(*case, marks=() if case in SOON else pytest.mark.slow) for case in CASES]
)
def test_every_token_is_one_that_the_grammar_has_there(kind, way):
    more = dict(drafts="lookup", draft_tokens=2) if way == "lookup" else WAYS[way]
    of = engine(kind, tokenizer=TOKENIZER, **more)
    asked = some_requests(3, 6)
    expected = alone(kind, asked, tokenizer=TOKENIZER)
    others = {of.add(each.prompt, each.sampling, seed=each.seed): at for at, each in enumerate(asked)}
    grammars = constrained(of, 6) | constrained(of, 2, temperature=0.0)
    ended = {update.id: update.live for update in of.run() if update.finished}
    same([ended[id] for id in others], expected, asked)
    for id, grammar in grammars.items():
        assert ended[id].error is None and ended[id].stopped
        assert drawn(ended[id]) == [*grammar.taken, EOS] and len(grammar.taken) == grammar.length
    (pool,) = of.scheduler.cache.pools
    assert pool.used == 0


def test_it_holds_whatever_runs_beside_it():
    """The same tokens alone and in a crowd, with and without overlap."""
    found = []
    for settings in (dict(), dict(overlap=False), dict(decode_steps=1)):
        of = engine("gqa", tokenizer=TOKENIZER, **settings)
        ids = constrained(of, 5)
        ended = {update.id: update.live for update in of.run() if update.finished}
        found.append([drawn(ended[id]) for id in ids])
    for number in range(5):
        of = engine("gqa", tokenizer=TOKENIZER)
        sampling = SamplingConfig(max_new_tokens=12, stop_ids=(EOS,))
        of.add((1, 9), sampling, seed=number, constraint=Cycle(2 + number % 4))
        *_, last = of.run()
        found.append([drawn(last.live)])
    assert found[0] == found[1] == found[2] == [each for (each,) in found[3:]]


def test_a_thought_is_free_and_the_grammar_begins_behind_it():
    of = engine("gqa", tokenizer=TOKENIZER)
    thinks = dict(thinking_budget=3, max_new_tokens=20, logit_bias={EOS: -50.0})
    ids = constrained(of, 4, prompt=(1, 9, THINK), **thinks)
    ended = {update.id: update.live for update in of.run() if update.finished}
    for id, grammar in ids.items():
        tokens = drawn(ended[id])
        close = tokens.index(CLOSE)
        assert close <= 4 and tokens[close + 1 :] == [*grammar.taken, EOS] and len(grammar.taken) == grammar.length


def test_a_grammar_without_a_way_on_ends_its_request_alone():
    class Broken(Cycle):
        def mask(self):
            if len(self.taken) == 2:
                raise ConstraintError("no way on")
            return super().mask()

    of = engine("gqa", tokenizer=TOKENIZER)
    sampling = SamplingConfig(max_new_tokens=12, stop_ids=(EOS,))
    broken = of.add((1, 9), sampling, seed=0, constraint=Broken(9))
    (good,) = constrained(of, 1)
    ended = {update.id: update.live for update in of.run() if update.finished}
    assert str(ended[broken].error) == "no way on" and ended[good].error is None


def test_what_cannot_be_beside_a_grammar_is_said():
    sampling = SamplingConfig(max_new_tokens=4)
    with pytest.raises(ValueError, match="^constraint: got one for an engine without a tokenizer, wanted"):
        engine("gqa").add((1,), sampling, seed=0, constraint=Cycle(1))
    of = engine("gqa", tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="^min_new_tokens: got some beside a constraint, wanted 0"):
        of.add((1,), SamplingConfig(max_new_tokens=4, min_new_tokens=1), seed=0, constraint=Cycle(1))
    of = engine("gqa", tokenizer=TOKENIZER, record=Record(support=True))
    with pytest.raises(ValueError, match="^record: got support beside a constraint, wanted none"):
        of.add((1,), sampling, seed=0, constraint=Cycle(1))
    assert not of.has_work
