"""What may go wrong beside a request, or after it, and what is written down of it all the same."""

import dataclasses
import gc
import re
import threading
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.live import Live, NonFiniteLogitsError, StepFailedError
from deepseek_jax.generation.programs import Spans
from deepseek_jax.generation.requests import Request
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.thinking import NO_TAGS
from deepseek_jax.model import arranged
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.scoring import score
from deepseek_jax.ops import sampling as ops
from deepseek_jax.sharding import Layout, make_mesh
from deepseek_jax.text.stream import TextStream
from tests.generation.test_engine import KINDS, SMALL, Asked, alone, engine, model, same, some_requests, together
from tests.generation.test_generator import CONTEXT, V
from tests.text.small_tokenizers import BYTES, byte_level

pytestmark = pytest.mark.usefixtures("quick_compilation")

KIND = "mla-moe"
SCARCE = dict(admission="preempt", num_blocks=14)  # as in test_engine, whose programs serve here too
BOTH = Record(routes=True, support=True)


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids, skip_special=True):
        return "".join(chr(97 + of) for of in ids)


@cache
def passes():
    """The model, and its first module, over whole sequences: scores, and the module's logits."""
    graphdef, weights = model(KIND)

    def run(weights, tokens, mask):
        decoder = nnx.merge(graphdef, weights)
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        x = decoder(tokens, mask).x_BTD
        first, *_ = decoder.draft(x, targets, mask)
        return score(decoder, tokens, targets, mask), decoder.logits(first.x_BTD)

    return jax.jit(partial(run, weights))


def whole(sequences: list[list[int]]):
    tokens = np.zeros((len(sequences), CONTEXT), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, of in enumerate(sequences):
        tokens[row, : len(of)], mask[row, : len(of)] = of, True
    return jax.tree.map(np.asarray, passes()(tokens, mask))


@cache
def of_some():
    """Requests, and what each of them draws alone."""
    asked = some_requests(0, 24)
    return asked, alone(KIND, asked, num_blocks=SCARCE["num_blocks"])


def recorded_requests() -> list[Asked]:
    """Sampled, as a support is wanted; some end with a text in the middle of what the device draws at a time."""
    found = []
    for number, of in enumerate(some_requests(3, 24)):
        settings = dict(max_new_tokens=min(14, CONTEXT - len(of.prompt)), temperature=0.7, top_k=number % 7)
        settings |= ({}, dict(stop=("c", "d", "i")), dict(stop="e"), dict(repetition_penalty=1.3))[number % 4]
        found.append(Asked(of.prompt, SamplingConfig(**settings), seed=number))
    return found


def test_what_is_recorded_is_of_every_token_and_no_other():
    """Experts and supports through chunks, hits, drafts, preemption and stop texts; and how often drafts are right."""
    asked, given = recorded_requests(), dict(record=BOTH, tokenizer=Letters(), drafts="mtp", draft_tokens=1, **SCARCE)
    found, of = together(KIND, asked, 1, chunk=5, **given)
    assert sum(live.request.preemptions for live in found) > 0
    sequences = [live.request.tokens for live in found]
    scored, _ = whole([tokens[:-1] for tokens in sequences])
    for row, (live, one) in enumerate(zip(found, asked, strict=True)):
        fed, drawn = len(live.request.tokens) - 1, len(live.request.tokens) - len(one.prompt)
        routes = np.concatenate(live.routes)
        np.testing.assert_array_equal(np.sort(routes), np.sort(scored.experts_BTLA[row, :fed]))
        assert len(np.concatenate(live.support)) == len(live.logprobs) == drawn
    assert sum(live.request.stopped for live in found) > 5  # by a text: there are no stop ids


def test_drafts_are_right_as_often_as_the_module_is():
    """Drawn with the noise of what they guess, from entries that hits, chunks and wrong drafts leave good."""
    kinds = (dict(temperature=1.0), dict(temperature=0.5), dict(temperature=0.7))
    asked = [
        Asked(of.prompt, SamplingConfig(max_new_tokens=CONTEXT - len(of.prompt), **kinds[number % 3]), seed=number)
        for number, of in enumerate(some_requests(4, 24))
    ]
    of = engine(KIND, record=BOTH, chunk=5, drafts="mtp", draft_tokens=1, num_blocks=SCARCE["num_blocks"])
    for one in asked:
        of.add(one.prompt, one.sampling, seed=one.seed)
    found = {update.id: update.live for update in of.run() if update.finished}
    sequences = [found[number].request.tokens for number in range(len(asked))]
    drafts = whole(sequences)[1]
    every = np.zeros(2, int)
    for row, one in enumerate(asked):
        tokens, temperature = sequences[row], one.sampling.temperature
        at, accepted, steps = len(one.prompt), 0, 0
        while at < len(tokens) - 1:
            steps += 1
            guess = drafts[row, at - 1]
            if temperature:
                noise = ops.uniform_noise(jnp.uint32([one.seed]), jnp.int32([at + 1]))
                guess = int(ops.sample(jnp.asarray(guess[None] / temperature), noise)[0])
            else:
                guess = int(np.argmax(guess))
            right = guess == tokens[at + 1] and at + 2 < len(tokens)
            accepted += right
            at += 1 + right
        assert (found[row].accepted, found[row].offered) == (accepted, steps)
        every += accepted, steps
    assert (of.metrics.accepted, of.metrics.offered) == tuple(every) and every[0] > 20
    assert of.metrics.rows == every[1]


@pytest.mark.parametrize("where", ["admit", "extend", "decode_loop", "results"])
def test_a_step_that_fails_on_the_device_ends_its_requests_and_not_the_engine(where, monkeypatch):
    """Though it took the state with it, as a program may that was begun."""
    (asked, expected), of = of_some(), engine(KIND, **SCARCE)
    ids = [of.add(one.prompt, one.sampling, seed=one.seed) for one in asked[:8]]
    of.step()

    def fails(*given, **named):
        jax.tree.map(lambda a: a.delete(), of.runner.state)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    if where == "results":
        monkeypatch.setattr("deepseek_jax.generation.engine._fetched", fails)
    else:
        monkeypatch.setattr(of.runner.programs, where, fails)
    ended = {}
    while len(ended) < len(ids):
        ended |= {update.id: update.live for update in of.step() if update.finished}
    monkeypatch.undo()
    failed = [live for live in ended.values() if live.error is not None]
    assert failed and all(isinstance(live.error, StepFailedError) for live in failed)
    assert str(failed[0].error).startswith("a step of the engine failed on the device: RESOURCE_EXHAUSTED: Out of mem")
    assert not of.has_work and of.step() == []
    ours = {of.add(one.prompt, one.sampling, seed=one.seed): number for number, one in enumerate(asked)}
    found = {update.id: update.live for update in of.run() if update.finished}
    same([found[id] for id in ours], expected, asked)


def test_an_engine_that_cannot_begin_anew_says_that_it_is_closed(monkeypatch):
    of = engine(KIND, **SCARCE)
    of.add([1, 2, 3], SamplingConfig(max_new_tokens=4), seed=0)

    def fails(*given, **named):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(of.runner.programs, "extend", fails)
    monkeypatch.setattr(of.runner.programs, "first_state", fails)
    [update] = list(of.run())
    assert isinstance(update.live.error, StepFailedError)
    with pytest.raises(StepFailedError, match="RESOURCE_EXHAUSTED"):
        of.add([1, 2, 3], SamplingConfig(max_new_tokens=4), seed=0)


def test_a_stop_text_that_is_complete_only_at_the_end_is_one():
    """Its last character is what a byte is that never became one."""
    stream = TextStream(byte_level(), stop=("a\ufffd",))
    request = Request(id=0, tokens=[1], max_new_tokens=3)
    live = Live(request=request, sampling=SamplingConfig(max_new_tokens=3), seed=0, opened=False, stream=stream)
    live.text += stream.feed([BYTES[ord("b")], BYTES[ord("a")], BYTES["ä".encode()[0]]])
    assert not live.stopped and not request.stopped
    assert live.new_text(finished=True) == "b" and live.stopped


def test_log_probs_of_a_prompt_are_there_once():
    """Whatever is computed anew."""
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0, prompt_logprobs=True)
    asked = [of._replace(sampling=sampling) for of in some_requests(5, 12)]
    found, _ = together(KIND, asked, 3, chunk=5, **SCARCE)
    assert sum(live.request.preemptions for live in found) > 0
    scored, _ = whole([live.request.tokens for live in found])
    for row, (live, one) in enumerate(zip(found, asked, strict=True)):
        wanted = scored.logprobs_BT[row, : len(one.prompt) - 1]
        np.testing.assert_allclose(live.prompt_logprobs, wanted, rtol=0, atol=1e-5)


def test_logits_that_are_no_numbers_end_their_own_request_alone():
    """One token's embedding is damaged: neighbours draw what they draw, and the engine goes on."""
    pairs = [(one, drawn) for one, drawn in zip(*of_some(), strict=True) if 7 not in [*one.prompt, *drawn[0]]]
    asked, expected = map(list, zip(*pairs, strict=True))
    of = engine(KIND, **SCARCE)
    damaged = jax.tree.map(lambda a: a, of.weights)
    damaged["embed"] = damaged["embed"].replace(damaged["embed"][...].at[7].set(jnp.nan))
    of.load(damaged)
    ours, found, failed = {}, {}, []
    for number, each in enumerate(asked):
        of.add([7, 3, number + 1], SamplingConfig(max_new_tokens=9), seed=number)
        ours[of.add(each.prompt, each.sampling, seed=each.seed)] = number
    for update in of.run():
        if update.finished and update.id in ours:
            found[ours[update.id]] = update.live
        elif update.finished:
            failed.append(update.live.error)
    same([found[number] for number in range(len(asked))], expected, asked)
    assert len(asked) == len(failed) > 8 and all(isinstance(error, NonFiniteLogitsError) for error in failed)
    assert of.scheduler.cache.pools[0].used == 0


@pytest.mark.parametrize("tokens", [[1.0, 2], [1, 2.5], [V], [-1], [True, "a"], [None], []])
def test_a_prompt_of_other_things_than_tokens_is_refused_and_leaves_nothing(tokens):
    of = engine(KIND, **SCARCE)
    with pytest.raises(ValueError, match="^(prompt|request 0): got "):
        of.add(tokens, SamplingConfig(max_new_tokens=2), seed=0)
    assert not of.has_work and of.step() == []


def test_a_record_of_experts_that_a_model_has_not_is_refused():
    with pytest.raises(ValueError, match="^record: got routes for a model without experts"):
        engine("gqa", record=Record(routes=True))


def test_requests_come_and_go_from_other_threads():
    (asked, expected), of, ours, found = of_some(), engine(KIND, **SCARCE), {}, {}

    def client(number: int):
        for at in range(number, len(asked), 4):
            other = of.add([number + 1] * 9, SamplingConfig(max_new_tokens=20), seed=1)
            ours[of.add(asked[at].prompt, asked[at].sampling, seed=asked[at].seed)] = at
            of.cancel(other)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while of.has_work or any(thread.is_alive() for thread in threads):
        for update in of.step():
            if update.finished:
                found[update.id] = update.live
    same([found[id] for id in sorted(ours, key=ours.get)], expected, asked)


@pytest.mark.parametrize("verb", ["schedule", "retire"])
def test_nobody_reaches_into_what_a_step_reads(verb, monkeypatch):
    of = engine(KIND, overlap=False, **SCARCE)
    first = of.add([1, 2, 3], SamplingConfig(max_new_tokens=4), seed=0)
    others = threading.Thread(target=of.cancel, args=(first,))
    inside = getattr(of.scheduler, verb)

    def slow(*given):
        others.start()
        others.join(0.05)
        assert others.is_alive()
        monkeypatch.undo()
        return inside(*given)

    monkeypatch.setattr(of.scheduler, verb, slow)
    of.step()
    others.join()
    assert [update for update in of.run() if update.id == first] == [] and not of.has_work


def test_a_dropped_engine_leaves_no_memory_behind():
    """Nor do requests of one that goes on, though blocks carry what was recorded of them."""
    gc.collect()
    gc.disable()
    try:
        before = sum(a.nbytes for a in jax.live_arrays())
        of = engine(KIND, record=BOTH, drafts="mtp", draft_tokens=1, **SCARCE)
        of.add([1, 2, 3, 4, 5, 6], SamplingConfig(max_new_tokens=9), seed=0)
        list(of.run())
        del of
        assert sum(a.nbytes for a in jax.live_arrays()) == before
    finally:
        gc.enable()


def test_a_step_is_in_flight_while_the_next_one_is_planned():
    """Overlap is never silently off; without it none is."""
    for overlap in (True, False):
        of, flights = engine(KIND, overlap=overlap, **SCARCE), []
        of.add([1, 2, 3], SamplingConfig(max_new_tokens=12), seed=0)
        while of.has_work:
            of.step()
            flights.append(len(of._flights))
        assert max(flights) == overlap and flights[-1] == 0


@pytest.mark.parametrize("bound", [False, True])
def test_after_a_warm_up_nothing_is_compiled(bound):
    """Whatever is asked for, and whatever comes of it; of weights bound to their device, as loaded ones are, too."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **of: compiled.append(event))
    graphdef, weights = model(KIND)
    weights = jax.device_put(weights, jax.devices()[0]) if bound else weights
    settings = EngineConfig(**SMALL | SCARCE | dict(decode_steps=2, max_num_seqs=2))
    of = Engine(KINDS[KIND], graphdef, weights, settings, tokenizer=Letters())
    steps = list(of.warm_up())
    assert steps == [(done + 1, len(steps)) for done in range(len(steps))]
    assert bound or any("backend_compile" in event for event in compiled)
    compiled.clear()
    before = of.runner.compiled
    changes = ({}, dict(prompt_logprobs=True), dict(top_logprobs=3, stop="c"), dict(logit_bias={3: 5.0}, top_p=0.5))
    for number, one in enumerate(some_requests(6, 12)):
        of.add(one.prompt, dataclasses.replace(one.sampling, **changes[number % 4]), seed=number)
    list(of.run())
    of.load(of.weights)
    of.add([1, 2], SamplingConfig(max_new_tokens=3), seed=0)
    assert list(of.run()) and of.runner.compiled == before
    assert not [event for event in compiled if "backend_compile" in event]


def test_three_hundred_at_once_get_four_slots_in_turn():
    of, sampling = engine(KIND, **SCARCE), SamplingConfig(max_new_tokens=3, temperature=0.0)
    for number in range(300):
        of.add([1 + number % (V - 1), 5], sampling, seed=number)
    found = {update.id: update.live.request.tokens for update in of.run() if update.finished}
    assert len(found) == 300 and all(found[number] == found[number % (V - 1)] for number in range(300))


def test_new_weights_draw_as_if_there_had_been_no_others():
    """Though blocks of the same prompts are there, and requests run on."""
    (asked, expected), of = of_some(), engine(KIND, **SCARCE)
    of.load(jax.tree.map(lambda a: -a, of.weights))
    for one in asked[:8]:
        of.add(one.prompt, one.sampling, seed=one.seed)
    for _ in range(3):
        of.step()
    of.load(model(KIND)[1])
    ours = {of.add(one.prompt, one.sampling, seed=one.seed): number for number, one in enumerate(asked)}
    found = {update.id: update.live for update in of.run() if update.finished}
    same([found[id] for id in ours], expected, asked)


@pytest.mark.parametrize("kind, stacked", [("mla-moe", False), ("v3.2", True), ("gqa", True)])
def test_no_program_copies_a_pool(kind, stacked):
    """A program gives its state back in the memory that it was given, and writes there in place, loops and all."""
    config, P = KINDS[kind], 997  # a number of blocks that no other size is
    graphdef, weights = abstract_weights(config, layout=Layout(scan_layers=stacked))
    programs = Engine(config, graphdef, weights, EngineConfig(**SMALL)).runner.programs
    state, tags = programs.abstract_state(P, 4), NO_TAGS
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    spans = Spans(ints(4), ints(4, 16), ints(4), ints(4), ints(4))
    for lowered in (
        programs.extend.lower(weights, state, spans, tags, jax.ShapeDtypeStruct((), bool)),
        programs.decode_loop.lower(weights, state, ints(4), ints(), ints(), tags),
    ):
        text = lowered.compile().as_text()
        pools = len(re.findall(rf"= f32\[(?:\d+,)?{P},\S+ parameter\(\d+\)", text[text.index("\nENTRY") :]))
        aliased = re.search(r"input_output_alias=\{(.*?) \}, entry", text).group(1)
        assert pools == len(jax.tree.leaves(state.cache))
        assert aliased.count("-alias)") == len(jax.tree.leaves(state))
        assert not re.findall(rf".*\b{P},\S+ copy(?:-start)?\(.*", text)


def held(of: Engine) -> set[type]:
    """Kinds of arranged matrices that programs are given."""
    is_kind = lambda leaf: isinstance(leaf, arranged.Transposed | arranged.Joined)
    return {type(leaf) for leaf in jax.tree.leaves(of._arranged, is_leaf=is_kind) if is_kind(leaf)}


ARRANGED = {arranged.Transposed, arranged.Joined}


@pytest.mark.parametrize("kind", [pytest.param("mla-moe", marks=pytest.mark.slow), "gqa"])
def test_arranged_weights_draw_the_same_tokens(kind, monkeypatch):
    """What a large model's are on a CPU, joined too; also for one place, and on a mesh of one device."""
    asked = some_requests(2, 8)
    wanted = alone(kind, asked)
    monkeypatch.setattr(arranged, "_WORTH", 0)
    found, several = together(kind, asked, seed=1)
    same(found, wanted, asked)
    several.load(model(kind)[1])
    assert held(several) == held(engine(kind, max_num_seqs=1, batch_sizes=(1,))) == ARRANGED

    layout = Layout(mesh=make_mesh(jax.devices()[:1]), workload="serve")
    graphdef, like = abstract_weights(KINDS[kind], layout=layout)
    placed = jax.tree.map(lambda value, to: jax.device_put(value, to.sharding), model(kind)[1], like)
    one = Engine(KINDS[kind], graphdef, placed, EngineConfig(**SMALL))
    ids = [one.add(of.prompt, of.sampling, seed=of.seed) for of in asked]
    ended = {update.id: update.live for update in one.run() if update.finished}
    same([ended[id] for id in ids], wanted, asked)
    assert held(one) == ARRANGED


def test_weights_of_an_engine_are_as_they_were_given(monkeypatch):
    """However its programs hold them: to be scored with, written, or packed and loaded."""
    monkeypatch.setattr(arranged, "_WORTH", 0)
    of, given = engine("gqa"), model("gqa")[1]
    assert of.weights is given and held(of) == ARRANGED
    of.load(of.weights, quantization="int8")
    assert not held(of)
    of.load(given)
    assert of.weights is given and held(of) == ARRANGED
