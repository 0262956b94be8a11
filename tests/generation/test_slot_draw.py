"""Drawing by slot against a float64 twin in NumPy, the static batches' drawing, and the laws of rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.slot_draw import draw
from deepseek_jax.generation.slots import empty_params, empty_state, params_of, put_rows, state_of
from deepseek_jax.generation.thinking import NO_TAGS
from deepseek_jax.ops.sampling import uniform_noise

V, S, R = 300, 9, 8  # more than a block of the search, and a slot more than rows
compiled = jax.jit(draw, static_argnames="record_support")
put = jax.jit(put_rows)


class Slots:
    """Requests in slots of an engine, and a step of drawing for some of them."""

    def __init__(self, requests, *, tags=NO_TAGS, opened=False, seeds=None, slots=None):
        """requests: (sampling, prompt, tokens drawn so far) each; slots: theirs."""
        self.tags, self.slots = tags, list(slots or range(len(requests)))
        seeds = seeds or range(len(requests))
        self.params, self.state = empty_params(S, V), empty_state(S, V)
        rows = []
        for slot, seed, (sampling, prompt, drawn) in zip(self.slots, seeds, requests, strict=True):
            row = params_of(sampling, seed=seed, limit=sampling.limit(len(prompt), 10_000), vocab_size=V)
            for numbers, value in zip(self.params, row, strict=True):
                numbers[slot] = value
            budget = sampling.thinking_budget
            rows.append(state_of(prompt, drawn, opened=opened, budget=budget, vocab_size=V, tags=tags))
        stacked = jax.tree.map(lambda *of: np.stack(of), *rows)
        self.state = put(self.state, np.array(self.slots, np.int32), stacked)
        self.positions = np.array([len(prompt) + len(drawn) for _, prompt, drawn in requests], np.int32)

    def draw(self, logits, *, live=None, record_support=False):
        """The next token of each request. Rows of padding, with NaN for logits, fill up the step."""
        count = len(self.slots)
        live = np.ones(count, bool) if live is None else np.asarray(live)
        padded = lambda values, blank: jnp.asarray(np.concatenate([values, np.array([blank] * (R - count))]))
        self.state, drawn = compiled(
            jnp.asarray(np.concatenate([logits, np.full((R - count, V), np.nan)]), jnp.float32),
            jax.tree.map(jnp.asarray, self.params),
            self.state,
            padded(self.slots, S).astype(jnp.int32),
            padded(self.positions, 0).astype(jnp.int32),
            padded(live, False).astype(bool),
            self.tags,
            record_support=record_support,
        )
        self.positions = self.positions + live
        return jax.tree.map(lambda a: np.asarray(a)[:count], drawn)


def sampling(**settings) -> SamplingConfig:
    return SamplingConfig(**{"max_new_tokens": 50, **settings})


def logits_of(seed, rows, scale=3.0):
    return (np.random.default_rng(seed).normal(size=(rows, V)) * scale).astype(np.float32)


# --- a twin in float64 ----------------------------------------------------------------------------


def shaped_twin(logits, config, prompt, drawn):
    """Bias and penalties, token by token."""
    logits = logits.astype(np.float64)
    for token, value in config.logit_bias.items():
        logits[token] += np.float32(value)
    for token in set(prompt) | set(drawn):
        factor = np.float32(config.repetition_penalty)
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(drawn):
        logits[token] -= np.float32(config.presence_penalty)
        logits[token] -= np.float32(config.frequency_penalty) * drawn.count(token)
    if len(drawn) < config.min_new_tokens:
        logits[list(config.stop_ids)] = -np.inf
    return logits


def filtered_twin(logits, config):
    """By sorting. None where rounding may decide what is kept."""
    order = np.argsort(-logits, kind="stable")
    keep, sure = np.isfinite(logits), True
    if 0 < config.top_k < V:
        gap = logits[order[config.top_k - 1]] - logits[order[config.top_k]]
        sure &= not gap < 1e-5
        keep &= logits >= logits[order[config.top_k - 1]]
    if config.top_p < 1:
        p = softmax(np.where(keep, logits, -np.inf))
        reached = np.cumsum(p[order])
        last = int(np.argmax(reached >= np.float32(config.top_p)))
        sure &= np.abs(reached - config.top_p).min() > 1e-5
        keep &= logits >= logits[order[last]]
    if config.min_p > 0:
        p = softmax(np.where(keep, logits, -np.inf))
        ratio = p / p.max()
        sure &= not (np.abs(ratio - config.min_p)[keep] < 1e-5).any()
        keep &= ratio >= np.float32(config.min_p)
    return (np.where(keep, logits, -np.inf), keep) if sure else None


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


CONFIGS = st.builds(
    sampling,
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 500]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.75, -0.5]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-9, 9, width=32), max_size=4),
    min_new_tokens=st.integers(0, 6),
    stop_ids=st.lists(st.integers(0, V + 3), max_size=4).map(tuple),
    top_logprobs=st.sampled_from([0, 0, 1, 7, 20]),
)
BUDGETED = st.builds(dataclasses.replace, CONFIGS, thinking_budget=st.sampled_from([None, 0, 1, 2]))
TOKENS = st.lists(st.integers(0, V - 1), max_size=8)
REQUESTS = st.tuples(CONFIGS, TOKENS.filter(bool), TOKENS)
THINKING = st.tuples(BUDGETED, TOKENS.filter(bool), TOKENS)
TAGS = NO_TAGS._replace(message=np.arange(64, dtype=np.int32), length=np.int32(2))


@given(requests=st.lists(REQUESTS, min_size=8, max_size=8), seed=st.integers(0, 2**31))
def test_a_draw_equals_the_twin_in_float64(requests, seed):
    logits = logits_of(seed, 8)
    found = Slots(requests, seeds=range(seed, seed + 8)).draw(logits)
    checked = 0
    for row, (config, prompt, drawn) in enumerate(requests):
        config = dataclasses.replace(config, stop_ids=tuple(t for t in config.stop_ids if t < V))
        T = config.temperature or 1.0
        shaped = shaped_twin(logits[row], config, prompt, drawn)
        logp = np.log(softmax(logits[row].astype(np.float64) / np.float32(T)))
        token = int(found.token_R[row])
        assert found.logprob_R[row] == pytest.approx(logp[token], abs=2e-5)
        k = config.top_logprobs
        ids, values = found.top_ids_RK[row], found.top_logprobs_RK[row]
        np.testing.assert_allclose(values[:k], np.sort(logp)[::-1][:k], atol=2e-5)
        np.testing.assert_allclose(logp[ids[:k]], values[:k], atol=2e-5)
        assert (ids[k:] == -1).all() and np.isneginf(values[k:]).all()
        stopped = token in config.stop_ids and len(drawn) >= config.min_new_tokens
        assert found.stopped_R[row] == found.done_R[row] == stopped and not found.forced_R[row]
        if config.temperature == 0:
            assert shaped[token] > shaped.max() - 1e-5
            continue
        twin = filtered_twin(shaped / np.float32(T), config)
        if twin is None:
            continue
        kept, keep = twin
        noise = float(uniform_noise(jnp.uint32(seed + row)[None], jnp.int32(len(prompt) + len(drawn))[None])[0])
        ends = np.cumsum(softmax(kept))
        assert keep[token]
        assert ends[token] > noise - 1e-5 and (token == 0 or ends[token - 1] <= noise + 1e-5)
        checked += 1
    assume(checked > 0 or all(config.temperature == 0 for config, _, _ in requests))


# --- laws of rows -----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(request=THINKING, others=st.lists(THINKING, min_size=14, max_size=14), data=st.data())
def test_other_rows_change_no_bit_of_a_row(request, others, data):
    """Their logits, settings, slots, whether they live, and NaN among them; and the row may be any."""
    results, record = [], data.draw(st.booleans())
    own = logits_of(5, 2)
    for turn in range(2):
        place = data.draw(st.integers(0, 7))
        around = list(others[7 * turn : 7 * turn + 7])
        slots = data.draw(st.permutations(range(S)))[:8]
        live = np.array(data.draw(st.lists(st.booleans(), min_size=8, max_size=8)))
        live[place] = True
        requests = [*around[:place], request, *around[place:]]
        subject = Slots(requests, seeds=[9] * 8, slots=slots, tags=TAGS, opened=True)
        subject.positions[:] = 5
        found = []
        for step in range(2):
            logits = logits_of(data.draw(st.integers(0, 99)), 8)
            logits[data.draw(st.integers(0, 7))] = np.nan
            logits[place] = own[step]
            found.append(subject.draw(logits, live=live, record_support=record))
        state = jax.tree.map(lambda a, slot=slots[place]: np.asarray(a)[slot], subject.state)
        results.append(jax.tree.map(lambda a, at=place: a[at].tobytes(), found) + [[a.tobytes() for a in state]])
    assert results[0] == results[1]


def test_rows_that_are_not_live_leave_no_trace():
    """Nor do rows of padding, whose slot is none."""
    requests = [(sampling(presence_penalty=1.0, top_logprobs=3), [1], [2, 3])] * 3
    subject = Slots(requests)
    before = jax.tree.map(np.asarray, subject.state)
    subject.slots[2] = S  # padding
    found = subject.draw(np.full((3, V), np.nan), live=[False, False, True])
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, subject.state))
    found = subject.draw(logits_of(0, 3), live=[False, True, False])
    assert not found.token_R[[0, 2]].any() and not found.done_R[[0, 2]].any() and not found.logprob_R[[0, 2]].any()
    assert (found.top_ids_RK[[0, 2]] == -1).all() and (found.top_ids_RK[1, :3] >= 0).all()
    np.testing.assert_array_equal(np.asarray(subject.state.drawn), [2, 3, 2, *[0] * 6])


def test_no_mix_of_settings_compiles_anew():
    requests = [
        sampling(temperature=0.0),
        sampling(top_k=5, top_p=0.5, min_p=0.1),
        sampling(presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.2),
        sampling(logit_bias={3: 4.0, 5: -1.0}, stop_ids=(1, 2, 3), min_new_tokens=4),
        sampling(thinking_budget=3, top_logprobs=20),
        sampling(logit_bias=dict.fromkeys(range(300), 1.0), stop_ids=tuple(range(16))),
    ]
    sizes = set()
    for first in range(6):
        subject = Slots([(requests[(first + row) % 6], [row], []) for row in range(4)], tags=(NO_TAGS, TAGS)[first % 2])
        subject.draw(logits_of(first, 4), live=np.arange(4) >= first % 3)
        sizes.add(compiled._cache_size())
    assert len(sizes) == 1


@given(request=THINKING, seed=st.integers(0, 2**31))
def test_a_state_made_anew_from_its_tokens_is_the_state(request, seed):
    """As for a request that was preempted."""
    config, prompt, drawn = request
    subject = Slots([(config, prompt, drawn)], tags=TAGS, opened=True)
    for step in range(3):
        drawn = [*drawn, int(subject.draw(logits_of(seed + step, 1)).token_R[0])]
    anew = state_of(prompt, drawn, opened=True, budget=config.thinking_budget, vocab_size=V, tags=TAGS)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[0], b), subject.state, anew)


@given(drafts=st.lists(st.integers(0, 2), min_size=12, max_size=12), temperature=st.sampled_from([0.0, 1.0]))
def test_draws_behind_wrong_drafts_leave_no_trace(drafts, temperature):
    """Speculation draws several positions in turn, each live while the drafts before it were drawn."""
    config = sampling(
        temperature=temperature, thinking_budget=3, frequency_penalty=0.5, min_new_tokens=5, stop_ids=(1,)
    )
    logits = logits_of(4, 20, scale=2.0)
    logits[:, 3:] -= 9.0  # three tokens share the draws, so that drafts are right now and then
    plain, ahead = (Slots([(config, [1], [])], tags=TAGS, opened=True) for _ in range(2))
    wanted = [int(plain.draw(logits[plain.positions]).token_R[0]) for _ in range(8)]
    found = []
    for turn in range(8):
        live = len(found) < 8
        for draft in [*drafts[turn : turn + 2], None]:
            drawn = ahead.draw(logits[ahead.positions], live=[live])
            found += drawn.token_R.tolist() if live else []
            live &= len(found) < 8 and int(drawn.token_R[0]) == draft
    assert found == wanted and len(set(found)) > 1
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.asarray, of.state) for of in (plain, ahead)))


# --- what each setting does -------------------------------------------------------------------------


def test_frequencies_pass_a_chi_square_test():
    """Two rows at 4,000 positions each, with bias, penalties and filters, against the twin's distribution."""
    configs = [
        sampling(temperature=1.3, top_k=30, top_p=0.95, presence_penalty=1.0, frequency_penalty=0.5),
        sampling(temperature=0.8, min_p=0.03, logit_bias={4: 2.0, 9: -1.0}, repetition_penalty=1.5),
    ]
    prompt, drawn, logits, n = [3, 4, 9], [4, 4, 17], logits_of(8, 1, scale=1.2)[0], 4000
    subject = Slots([(config, prompt, drawn) for config in configs], seeds=[5, 6])
    params, live = jax.tree.map(jnp.asarray, subject.params), jnp.ones(R, bool)
    rows, logits_RV, found = jnp.arange(R) % 2, jnp.broadcast_to(logits, (R, V)), []
    for first in range(0, n, R // 2):  # a slot in several rows, at a position each
        positions = first + jnp.arange(R) // 2
        found.append(compiled(logits_RV, params, subject.state, rows, positions, live, NO_TAGS)[1].token_R)
    tokens = np.concatenate(found).reshape(n, 2).T
    for row, config in enumerate(configs):
        kept, keep = filtered_twin(shaped_twin(logits, config, prompt, drawn) / config.temperature, config)
        wanted = n * softmax(kept)
        counts = np.bincount(tokens[row], minlength=V)
        assert not counts[~keep].any()
        many = wanted >= 5
        free = many.sum()  # the others are one bin more
        bins = [*np.stack([counts, wanted], 1)[many], (counts[~many].sum(), wanted[~many].sum())]
        statistic = sum((count - mean) ** 2 / mean for count, mean in bins if mean > 0)
        assert free > 10 and statistic < free + 3.1 * np.sqrt(2 * free) + 4  # beyond the 0.1 % point


def test_penalties_count_the_completions_tokens_and_not_the_prompts():
    """vLLM: presence and frequency know the output alone, repetition both."""
    flat = np.zeros((3, V), np.float32)
    flat[:, 5], flat[:, 6], flat[:, 7] = 1.0, 1.2, 1.1  # 6 is in the prompt, 7 was drawn twice
    ways = [{"presence_penalty": 0.5}, {"frequency_penalty": 0.05}, {"repetition_penalty": 2.0}]
    requests = [(sampling(temperature=0.0, **way), [6], [7, 7]) for way in ways]
    np.testing.assert_array_equal(Slots(requests).draw(flat).token_R, [6, 6, 5])
    flat[:, 6] = 0
    requests[1] = (sampling(temperature=0.0, frequency_penalty=0.04), [6], [7, 7])  # 1.1 - 2 x 0.04 > 1
    np.testing.assert_array_equal(Slots(requests).draw(flat).token_R, [5, 7, 5])


def test_no_stop_id_comes_before_the_least_tokens_and_the_limit_ends():
    config = sampling(temperature=0.0, stop_ids=(8, V + 9), min_new_tokens=2, max_new_tokens=4)
    logits = np.zeros((1, V), np.float32)
    logits[0, 8], logits[0, 11] = 5.0, 4.0
    subject = Slots([(config, [1], [])])
    found = [subject.draw(logits) for _ in range(3)]
    assert [int(f.token_R[0]) for f in found] == [11, 11, 8]
    assert [bool(f.stopped_R[0]) for f in found] == [bool(f.done_R[0]) for f in found] == [False, False, True]
    subject = Slots([(dataclasses.replace(config, stop_ids=()), [1], [])])
    found = [subject.draw(logits) for _ in range(4)]
    assert [bool(f.done_R[0]) for f in found] == [False, False, False, True]
    assert not any(f.stopped_R[0] for f in found)


def test_beside_a_record_the_best_token_is_scored_as_without():
    config = sampling(temperature=0.0, min_new_tokens=2, stop_ids=(8,), logit_bias={4: 1.0})
    logits = logits_of(3, 1)
    plain, recorded = (Slots([(config, [1], [])]).draw(logits, record_support=record) for record in (False, True))
    assert plain.token_R == recorded.token_R
    np.testing.assert_allclose(plain.logprob_R, recorded.logprob_R, atol=1e-6)
    assert np.unpackbits(recorded.support_RW.view(np.uint8)).sum() == V


def test_a_small_vocabulary_has_fewer_best_tokens_than_asked_for():
    few = 6
    row = params_of(sampling(temperature=0.0, top_logprobs=20), seed=0, limit=9, vocab_size=few)
    params = jax.tree.map(lambda a: jnp.asarray(a)[None], row)
    logits = jnp.arange(6.0)[None]
    args = params, empty_state(1, few), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.ones(1, bool), NO_TAGS
    found = compiled(logits, *args)[1]
    assert found.top_ids_RK.tolist() == [[5, 4, 3, 2, 1, 0, *[-1] * 14]] and found.top_logprobs_RK.shape == (1, 20)


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=f"^logit_bias: got token {V}, wanted ids below the model's vocab_size {V}$"):
        params_of(sampling(logit_bias={V: 1.0}), seed=0, limit=1, vocab_size=V)


# --- transformers -----------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"repetition_penalty": 1.4}, [("RepetitionPenaltyLogitsProcessor", (1.4,))]),
        ({"logit_bias": {3: 2.5, 70: -4.0}}, [("SequenceBiasLogitsProcessor", ([[[3], 2.5], [[70], -4.0]],))]),
        ({"top_k": 7}, [("TopKLogitsWarper", (7,))]),
        ({"top_p": 0.8}, [("TopPLogitsWarper", (0.8,))]),
        ({"min_p": 0.1}, [("MinPLogitsWarper", (0.1,))]),
        ({"min_new_tokens": 4, "stop_ids": (3, 4)}, [("MinNewTokensLengthLogitsProcessor", (3, 4, [3, 4], "cpu"))]),
        (
            {"repetition_penalty": 0.8, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
            [
                ("RepetitionPenaltyLogitsProcessor", (0.8,)),
                ("TemperatureLogitsWarper", (1.5,)),
                ("TopKLogitsWarper", (40,)),
                ("TopPLogitsWarper", (0.9,)),
                ("MinPLogitsWarper", (0.05,)),
            ],
        ),
    ],
    ids=str,
)
def test_what_is_drawn_from_equals_transformers(settings, names, seed):
    """The support, and the distribution within it by its log-probs, of a vocabulary of draws."""
    torch = pytest.importorskip("torch", reason="needs the oracle extra")
    processors = pytest.importorskip("transformers.generation.logits_process", reason="needs the oracle extra")
    prompt, drawn = [3, 9, 60], [4, 9, 9]
    logits = logits_of(seed, 1, scale=2.0)
    scores, ids = torch.tensor(logits), torch.tensor([[*prompt, *drawn]])
    for name, args in names:
        scores = getattr(processors, name)(*args)(ids, scores)
    wanted = torch.log_softmax(scores, -1).numpy()[0]
    config = sampling(**settings, top_logprobs=20)
    found = Slots([(config, prompt, drawn)]).draw(logits, record_support=True)
    support = np.unpackbits(found.support_RW[0].view(np.uint8), bitorder="little")[:V].astype(bool)
    np.testing.assert_array_equal(support, np.isfinite(wanted))
    assert found.logprob_R[0] == pytest.approx(wanted[found.token_R[0]], abs=1e-5)
    best = np.sort(wanted)[::-1][:20]
    kept = np.isfinite(best)
    np.testing.assert_allclose(found.top_logprobs_RK[0][kept], best[kept], atol=1e-5)
    np.testing.assert_allclose(wanted[found.top_ids_RK[0][kept]], best[kept], atol=1e-5)
