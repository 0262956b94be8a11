"""Drawing by slot gives what static batches draw, for the settings that both know."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.generation import draw as static
from tests.generation.test_slot_draw import R, Slots, V, logits_of, sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")

STATIC = [
    ({"temperature": 0.0, "repetition_penalty": 1.3}, False),
    ({"temperature": 0.6}, False),
    ({"temperature": 0.6, "top_p": 0.95}, True),
    ({"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.02}, False),
    ({"temperature": 0.9, "top_p": 0.7, "repetition_penalty": 1.2}, False),
    ({"temperature": 0.9, "top_p": 0.7, "repetition_penalty": 1.2}, True),
]


@pytest.mark.parametrize(("known", "record"), STATIC, ids=str)
def test_tokens_and_logprobs_are_those_of_static_batches(known, record):
    """Compiled: the log-probs are rounded otherwise where XLA fuses a product with a sum."""
    compare_with_static(known, record, turns=3, atol=2e-6)


def test_op_by_op_every_bit_is_that_of_static_batches(monkeypatch):
    """With noise made beforehand, which takes most of the time otherwise."""
    monkeypatch.setattr("deepseek_jax.ops.sampling.uniform_noise", lambda *_: jnp.linspace(0.05, 0.95, R))
    with jax.disable_jit():
        compare_with_static({"temperature": 0.9, "repetition_penalty": 1.2}, record=True, turns=1, atol=0)


def compare_with_static(known, record, turns, atol):
    B, config = 8, sampling(**known, stop_ids=(3, 7))
    logits, prompts = logits_of(1, B), [[row, row + 50, 2] for row in range(B)]
    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, np.array(prompts), True, axis=1)
    modes = static.Modes(
        greedy=config.temperature == 0,
        filtered=config.top_p < 1 or config.top_k > 0 or config.min_p > 0,
        penalised=config.repetition_penalty != 1,
        record=static.Record(support=record),
    )
    knobs = static.Knobs(
        temperature=jnp.float32(config.temperature),
        top_p=jnp.float32(config.top_p),
        top_k=jnp.int32(config.top_k),
        min_p=jnp.float32(config.min_p),
        penalty=jnp.float32(config.repetition_penalty),
        stop_ids=jnp.array([3, 7, 7, 7]),
    )
    words = jnp.zeros((B, 4, -(-V // 32)), jnp.uint32)
    state = static.State(
        cache=(),
        token_B=jnp.zeros(B, jnp.int32),
        position_B=jnp.full(B, 3, jnp.int32),
        done_B=jnp.zeros(B, bool),
        seen_BV=jnp.asarray(seen) if modes.penalised else None,
        tokens_BN=jnp.zeros((B, 4), jnp.int32),
        logprobs_BN=jnp.zeros((B, 4)),
        count=jnp.int32(0),
        record=static.Recorded(None, words if record else None, words if record and modes.penalised else None),
    )
    step = jax.jit(partial(static.draw, modes=modes))
    slots = Slots([(config, prompt, []) for prompt in prompts], seeds=range(20, 28))
    for turn in range(turns):
        now = jnp.asarray(logits + np.float32(0.3) * logits_of(turn + 2, B))
        state = step(state, now, jnp.arange(20, 28, dtype=jnp.uint32), jnp.full(B, 50), knobs)
        found = slots.draw(now, record_support=record)
        np.testing.assert_array_equal(found.token_R, state.tokens_BN[:, turn])
        np.testing.assert_allclose(found.logprob_R, state.logprobs_BN[:, turn], rtol=0, atol=atol)
        if record:
            np.testing.assert_array_equal(found.support_RW, state.record.support_BNW[:, turn])
        if record and modes.penalised:
            np.testing.assert_array_equal(found.penalised_RW, state.record.penalised_BNW[:, turn])
        elif record:
            assert not found.penalised_RW.any()
