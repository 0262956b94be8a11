"""The scheduler against a device that keeps token ids: whatever comes, every read finds its own tokens."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.generation.requests import Drawn, Request
from deepseek_jax.generation.scheduler import Scheduler, SchedulerConfig
from tests.generation.simulated_device import Driver, true_token

SMALL = SchedulerConfig(
    max_num_seqs=4, max_num_batched_tokens=32, chunk=8, num_blocks=41, block_size=4, max_model_len=64
)


def driver(config: SchedulerConfig = SMALL, lag: int = 0, lengths: dict[int, int] | None = None, **kwargs) -> Driver:
    return Driver(Scheduler(config, **kwargs), lengths or {}, lag)


def prompt(length: int, first: int = 1000) -> list[int]:
    return list(range(first, first + length))


def run(subject: Driver, *requests: Request) -> None:
    for request in requests:
        subject.scheduler.add(request)
    subject.drain()


def check_complete(request: Request, stops_after: int | None = None) -> None:
    """A request has its own tokens, as many as it was to have."""
    stopped = stops_after is not None and stops_after <= request.max_new_tokens
    new = stops_after if stopped else request.max_new_tokens
    assert request.finished and request.stopped == (stopped and new > 0)
    expected = [true_token(request, request.prompt_length + index) for index in range(new)]
    assert request.tokens[request.prompt_length :] == expected


def check_empty(scheduler: Scheduler) -> None:
    """No block and no slot is left behind."""
    assert not scheduler.has_work and not scheduler.waiting and not scheduler.running
    for pool in scheduler.cache.pools:
        assert pool.used == 0 and pool.free + pool.cached == pool.num_blocks - 1
        assert not any(pool.references(block) for block in range(pool.num_blocks))
    assert sum(map(len, scheduler.cache._slots)) == scheduler.config.max_num_seqs
    assert not any(scheduler.cache._computing) and not scheduler.cache._promised and not scheduler.cache._leaving


@st.composite
def configs(draw) -> SchedulerConfig:
    shards, drafts = draw(st.integers(1, 3)), draw(st.sampled_from((0, 0, 1, 3)))
    seqs = shards * draw(st.integers(1, 4))
    return SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs * (1 + drafts) + draw(st.integers(0, 40)),
        chunk=draw(st.integers(1, 20)),
        num_blocks=draw(st.integers(16, 40)),
        block_size=draw(st.sampled_from((1, 3, 4, 8))),
        max_model_len=48,
        num_shards=shards,
        prefix_caching=draw(st.booleans()),
        admission=draw(st.sampled_from(("reserve", "preempt"))),
        decode_steps=draw(st.sampled_from((1, 2, 7))),
        draft_tokens=drafts,
        mtp=draw(st.booleans()),
    )


class Load:
    """Random requests that share beginnings, stop early and are cancelled."""

    def __init__(self, subject: Driver, seed: int, count: int) -> None:
        self.subject, self.random, self.left = subject, random.Random(seed), count
        self.requests: list[Request] = []
        self.bases = [[self.random.randrange(200) for _ in range(40)] for _ in range(3)]

    def new(self) -> Request:
        chance, config, id = self.random, self.subject.scheduler.config, len(self.requests)
        most = min(config.max_model_len, (config.num_blocks - 1) * config.block_size - config.draft_tokens)
        length = chance.randint(1, min(40, most))
        tokens = chance.choice(self.bases)[:length]
        if chance.random() < 0.5:
            tokens[chance.randrange(length // 2, length)] = 999
        new = chance.randint(0, min(12, most - length))
        if chance.random() < 0.3:
            self.subject.device.lengths[id] = chance.randint(1, 10)
        salt, reuse = chance.choice(("", "", "", "tenant")), chance.random() < 0.9
        return Request(id=id, tokens=tokens, max_new_tokens=new, salt=salt, reuse=reuse)

    def run(self, burst: int = 4, cancels: float = 0.05, resets: float = 0.01) -> None:
        subject = self.subject
        while self.left or subject.scheduler.has_work:
            for _ in range(min(self.left, self.random.randint(0, burst))):
                request = self.new()
                self.requests.append(request)
                subject.scheduler.add(request)
                self.left -= 1
            if self.requests and self.random.random() < cancels:
                victim = self.random.choice(self.requests[-20:])
                was_cancelled = victim.cancelled
                assert subject.scheduler.cancel(victim.id) == (not (victim.finished or was_cancelled))
            if self.random.random() < resets:
                subject.scheduler.reset_prefix_cache()
                subject.device.version += 1
            subject.step()

    def check(self) -> None:
        device, lengths = self.subject.device, self.subject.device.lengths
        for request in self.requests:
            assert request.cancelled != request.finished
            if request.finished:
                check_complete(request, lengths.get(request.id))
                new = request.tokens[request.prompt_length :]
                assert self.subject.gained.get(request.id, []) == new
                assert device.drawn[request.id] == len(new), "a token was drawn twice"
                if not request.preemptions:
                    computed = device.hits[request.id] + device.computed[request.id]
                    assert computed == request.prompt_length + max(0, len(new) - 1)
        check_empty(self.subject.scheduler)


@settings(max_examples=100)
@given(config=configs(), seed=st.integers(0, 2**32), lag=st.integers(0, 2), halves=st.booleans())
def test_whatever_comes_every_request_ends_with_its_own_tokens(config, seed, lag, halves):
    smaller = (lambda rows: rows // 2) if halves else (lambda rows: 0)
    load = Load(driver(config, lag, smaller_bucket=smaller), seed, 30)
    load.run()
    load.check()


def test_ten_thousand_requests_leave_no_block_behind():
    config = replace(
        SMALL, max_num_seqs=32, max_num_batched_tokens=256, chunk=32, num_blocks=200, num_shards=2, decode_steps=4
    )
    load = Load(driver(config, 1), 7, 10_000)
    load.run(burst=16)
    load.check()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("length", [1, 8, 9])
def test_a_prompt_that_is_wholly_cached_still_computes_its_last_tokens(lag: int, mtp: bool, length: int):
    subject = driver(replace(SMALL, mtp=mtp), lag)
    first, second = (Request(id=id, tokens=prompt(length), max_new_tokens=3) for id in range(2))
    run(subject, first)
    run(subject, second)
    assert subject.device.hits == {0: 0, 1: (length - 1) // 4 * 4}
    check_complete(second)


def test_a_request_that_wants_all_logits_takes_no_hit_but_gives_some():
    subject = driver()
    for id, reuse in enumerate((False, False, True)):
        run(subject, Request(id=id, tokens=prompt(9), max_new_tokens=0, reuse=reuse))
    assert subject.device.hits == {0: 0, 1: 0, 2: 8} and not subject.gained[1]
    for id in range(3, 5):
        subject.scheduler.add(Request(id=id, tokens=prompt(20, 50), max_new_tokens=0, reuse=False))
    assert len(subject.step().admitted) == 2, "nor does it wait for others to compute what it could hit"


def test_a_prompt_of_one_token_is_a_span_and_draws_at_its_end():
    scheduler = Scheduler(SMALL)
    request = Request(id=0, tokens=[5], max_new_tokens=2)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert plan.spans == ((request, 0, 1, True),) and not plan.rows and plan.steps == 0
    assert scheduler.retire(plan, {0: Drawn((6,))}) == [(request, (6,))]
    assert scheduler.schedule().rows == ((request, 1),)


def test_running_requests_come_first_then_waiting_ones_in_order_within_the_budget():
    """Two decode rows take 2 of 10 tokens, the third prompt its chunk of the rest, the fourth what is left."""
    scheduler = Scheduler(replace(SMALL, max_num_batched_tokens=10, chunk=5, decode_steps=8))
    requests = [
        Request(id=id, tokens=prompt(length, 100 * id), max_new_tokens=4) for id, length in enumerate((2, 2, 9, 9))
    ]
    for request in requests[:3]:
        scheduler.add(request)
    plan = scheduler.schedule()
    assert [span[1:] for span in plan.spans] == [(0, 2, True), (0, 2, True), (0, 5, False)]
    scheduler.retire(plan, {0: Drawn((7,)), 1: Drawn((7,))})
    scheduler.add(requests[3])
    plan = scheduler.schedule()
    assert [row.request.id for row in plan.rows] == [0, 1]
    assert [(span.request.id, *span[1:]) for span in plan.spans] == [(2, 5, 4, True), (3, 0, 4, False)]
    assert plan.steps == 1, "nobody decodes on while a prefill is waiting for the loop to end"


def test_a_decode_loop_is_bounded_by_need_and_ends_early_for_those_that_wait():
    scheduler = Scheduler(replace(SMALL, max_num_seqs=3, decode_steps=8), smaller_bucket=lambda rows: rows - 3)
    for id, new in enumerate((4, 30, 30, 3)):
        scheduler.add(Request(id=id, tokens=prompt(2, 100 * id), max_new_tokens=new))
    scheduler.retire(scheduler.schedule(), {id: Drawn((7,)) for id in range(3)})
    plan = scheduler.schedule()
    assert (plan.steps, plan.until) == (8, 2) and [row.most for row in plan.rows] == [8, 8, 8]
    scheduler.cancel(3)
    scheduler.retire(plan, {id: Drawn((7,)) for id in range(3)})
    plan = scheduler.schedule()
    assert (plan.steps, plan.until) == (8, 0)
    scheduler.cancel(1)
    scheduler.cancel(2)
    scheduler.retire(plan, {0: Drawn(())})
    assert scheduler.schedule().steps == 2


def test_a_decode_loop_is_short_while_a_prefill_in_flight_holds_others_up():
    scheduler = Scheduler(replace(SMALL, decode_steps=8, chunk=32))
    scheduler.add(Request(id=0, tokens=[1, 2], max_new_tokens=30))
    scheduler.retire(scheduler.schedule(), {0: Drawn((7,))})
    for id in (1, 2):
        scheduler.add(Request(id=id, tokens=prompt(9), max_new_tokens=30))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert len(first.spans) == first.steps == 1
    assert not second.spans and second.steps == 1, "the third request can start once the first plan has retired"
    scheduler.retire(first, {id: Drawn((7,)) for id in (0, 1)})
    assert [one.request.id for one in scheduler.schedule().admitted] == [2]


def test_a_row_in_flight_is_counted_at_its_most_and_steps_back_to_the_truth():
    """Two drafts, four steps: at most 12 of 14 tokens are on their way, then the results say 5."""
    scheduler = Scheduler(replace(SMALL, draft_tokens=2, decode_steps=4))
    request = Request(id=0, tokens=prompt(6), max_new_tokens=20)
    scheduler.add(request)
    scheduler.retire(scheduler.schedule(), {0: Drawn((7,))})
    first = scheduler.schedule()
    assert first.steps == 4 and request.known == 7 + 12
    second = scheduler.schedule()
    assert second.steps == 4 and request.known == request.limit, "never beyond its limit"
    assert scheduler.schedule().empty, "all it could still need is in flight"
    scheduler.retire(first, {0: Drawn((7,) * 5)})
    assert len(request.tokens) == 12 and request.computed == 11 and request.known == 24
    scheduler.retire(second, {0: Drawn((7,) * 9)})
    assert request.known == len(request.tokens) == 21


@pytest.mark.parametrize("ends", ["stop", "cancel"])
def test_blocks_stay_until_the_last_plan_that_names_them_has_retired(ends: str):
    scheduler = Scheduler(replace(SMALL, prefix_caching=False))
    request = Request(id=0, tokens=prompt(6), max_new_tokens=20)
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    pool = scheduler.cache.pools[0]
    assert pool.used == 7
    if ends == "cancel":
        assert scheduler.cancel(0) and not scheduler.cancel(0)
        assert scheduler.retire(first, {0: Drawn((7,))}) == []
    else:
        assert scheduler.retire(first, {0: Drawn((7,), stopped=True)}) == [(request, (7,))]
        assert request.finished and request.stopped
    assert pool.used == 7 and scheduler.has_work
    assert scheduler.schedule().empty
    assert scheduler.retire(second, {0: Drawn(())}) == []
    check_empty(scheduler)


def test_a_slot_is_free_at_once_for_the_next_plan():
    """The device runs plans in order: what an old request's last plan does to its slot comes before the new one."""
    scheduler = Scheduler(replace(SMALL, max_num_seqs=1))
    for id in range(2):
        scheduler.add(Request(id=id, tokens=prompt(6, 100 * id), max_new_tokens=3))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert second.rows[0].request.id == 0
    scheduler.retire(first, {0: Drawn((7,), stopped=True)})
    assert [one.request.id for one in scheduler.schedule().admitted] == [1]


TIGHT = replace(SMALL, num_blocks=11, admission="preempt", prefix_caching=False, decode_steps=2)


@pytest.mark.parametrize("lag", [0, 1])
def test_reservation_never_preempts_and_preemption_keeps_every_token(lag: int):
    preempted, plans = {}, {}
    for admission in ("reserve", "preempt"):
        subject = driver(replace(TIGHT, admission=admission), lag)
        requests = [Request(id=id, tokens=prompt(5, 100 * id), max_new_tokens=20) for id in range(6)]
        run(subject, *requests)
        for request in requests:
            check_complete(request)
            assert subject.device.drawn[request.id] == 20, "nothing is drawn twice"
        preempted[admission] = sum(request.preemptions for request in requests)
        plans[admission] = subject.plans
        assert requests[0].preemptions == 0, "the oldest is never preempted"
        check_empty(subject.scheduler)
    assert preempted["reserve"] == 0 and preempted["preempt"] > 0
    assert plans["preempt"] < plans["reserve"]


def test_what_is_in_flight_for_a_preempted_request_is_kept():
    """Two requests of 4 blocks each in a pool of 6: as the older one grows, the younger is preempted in mid-flight."""
    scheduler = Scheduler(replace(TIGHT, num_blocks=7, decode_steps=1))
    old, young = (Request(id=id, tokens=prompt(8, 100 * id), max_new_tokens=8) for id in range(2))
    scheduler.add(old)
    scheduler.add(young)
    flying = [scheduler.schedule(), scheduler.schedule()]  # both prompts, then a first token of both
    assert [row.request.id for row in flying[1].rows] == [0, 1]
    tokens = list(young.tokens)
    while not young.preemptions:
        plan = flying.pop(0)
        drawn = {of.request.id: Drawn((7,)) for of in (*plan.spans, *plan.rows)}
        was_flying = young.in_flight
        scheduler.retire(plan, drawn)
        tokens += [7] * (young.in_flight < was_flying)
        flying.append(scheduler.schedule())
    assert young in scheduler.waiting and young.computed == 0
    assert young.tokens == tokens and len(tokens) > 8


def test_a_preempted_request_does_not_start_anew_before_its_latest_token_is_known():
    """The older one wants 6 blocks for its first loop where 5 are left, then is cancelled: there is room at once."""
    scheduler = Scheduler(replace(TIGHT, num_blocks=13, decode_steps=24))
    old = Request(id=0, tokens=prompt(16), max_new_tokens=25)
    young = Request(id=1, tokens=prompt(8, 500), max_new_tokens=4)
    scheduler.add(old)
    scheduler.add(young)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.retire(first, {1: Drawn((7,))})
    assert [row.request.id for row in second.rows] == [1]
    assert scheduler.schedule().preempted == (young,)
    scheduler.cancel(0)
    assert scheduler.cache.pools[0].available == 5 and young.plans == 1
    assert scheduler.schedule().empty
    scheduler.retire(second, {1: Drawn((8,))})
    (admitted,) = scheduler.schedule().admitted
    assert admitted.request is young and young.tokens[8:] == [7, 8] and young.dispatched == 8
    scheduler.cancel(1)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("chunk", [3, 8, 32])
def test_a_group_of_samples_of_one_prompt_computes_it_once(lag: int, chunk: int):
    subject = driver(replace(SMALL, chunk=chunk), lag)
    group = [Request(id=id, tokens=prompt(18), max_new_tokens=4) for id in range(4)]
    other = Request(id=9, tokens=prompt(18, 500), max_new_tokens=4)
    run(subject, *group, other)
    computed = [subject.device.computed[request.id] - 3 for request in group]
    assert computed == [18, 2, 2, 2] and subject.device.hits[9] == 0
    for request in (*group, other):
        check_complete(request)


def test_others_are_not_held_up_by_those_that_await_a_block():
    scheduler = Scheduler(replace(SMALL, chunk=4))
    for id, first in enumerate((0, 0, 0, 500)):
        scheduler.add(Request(id=id, tokens=prompt(10, first), max_new_tokens=4))
    assert [one.request.id for one in scheduler.schedule().admitted] == [0, 3]
    assert [request.id for request in scheduler.waiting] == [1, 2]


@pytest.mark.parametrize("lag", [0, 1])
def test_one_that_computes_for_others_and_is_cancelled_releases_them(lag: int):
    subject = driver(replace(SMALL, chunk=4), lag)
    group = [Request(id=id, tokens=prompt(18), max_new_tokens=4) for id in range(3)]
    for request in group:
        subject.scheduler.add(request)
    subject.step()
    subject.step()
    assert subject.scheduler.running == group[:1]
    assert subject.scheduler.cancel(0)
    subject.step()
    assert subject.scheduler.running == group[1:2], "the next one computes what is left"
    subject.drain()
    for request in group[1:]:
        check_complete(request)
    check_empty(subject.scheduler)


def test_drafts_are_never_published():
    """All but the accepted tokens of a row's blocks are marked on the device: a hit on one of them would be seen."""
    config = replace(SMALL, draft_tokens=3, decode_steps=3, block_size=2, num_blocks=80)
    subject = driver(config, 1)
    for id in range(8):
        run(subject, Request(id=id, tokens=prompt(3), max_new_tokens=20))
        longer = Request(id=100 + id, tokens=prompt(3) + subject.gained[id] + [5], max_new_tokens=2)
        run(subject, longer)
        assert subject.device.hits[longer.id] == 22


def test_new_weights_let_nothing_old_be_hit():
    subject = driver()
    run(subject, Request(id=0, tokens=prompt(9), max_new_tokens=2))
    subject.scheduler.add(Request(id=1, tokens=prompt(9), max_new_tokens=9))
    subject.step()
    subject.scheduler.reset_prefix_cache()
    subject.device.version += 1
    subject.drain()
    run(subject, Request(id=2, tokens=prompt(9), max_new_tokens=2), Request(id=3, tokens=prompt(9), max_new_tokens=2))
    assert subject.device.hits == {0: 0, 1: 8, 2: 0, 3: 8}


def test_nobody_awaits_a_block_of_old_weights():
    scheduler = Scheduler(replace(SMALL, chunk=4))
    for id in range(3):
        scheduler.add(Request(id=id, tokens=prompt(18), max_new_tokens=4))
    assert len(scheduler.schedule().admitted) == 1
    scheduler.reset_prefix_cache()
    assert [one.request.id for one in scheduler.schedule().admitted] == [1], "which computes it anew, for the third one"


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_are_loaded_evenly(shards: int):
    """Like requests: as many each. Unlike ones: no two shards differ by more than the largest request."""
    config = replace(SMALL, max_num_seqs=16, num_shards=shards, num_blocks=81, max_num_batched_tokens=400, chunk=40)
    scheduler, chance = Scheduler(config), random.Random(0)
    for id in range(8):
        scheduler.add(Request(id=id, tokens=prompt(5, 100 * id), max_new_tokens=5))
    plan = scheduler.schedule()
    assert [sum(one.shard == shard for one in plan.admitted) for shard in range(shards)] == [8 // shards] * shards
    scheduler, sizes = Scheduler(config), [chance.randint(4, 40) for _ in range(12)]
    for id, size in enumerate(sizes):
        scheduler.add(Request(id=id, tokens=prompt(size // 2, 100 * id), max_new_tokens=size - size // 2))
    assert len(scheduler.schedule().admitted) == 12
    used = [pool.used for pool in scheduler.cache.pools]
    assert max(used) - min(used) <= -(-max(sizes) // 4)


def test_a_request_that_fits_no_shard_holds_back_those_behind_it():
    scheduler = Scheduler(replace(SMALL, num_blocks=11))
    for id, new in enumerate((20, 20, 1)):
        scheduler.add(Request(id=id, tokens=prompt(5, 100 * id), max_new_tokens=new))
    assert [one.request.id for one in scheduler.schedule().admitted] == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "request 1: got no token"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ({"max_new_tokens": 62}, r"request 1: got 3 \+ 62 new tokens, wanted at most 64 \(max_model_len\)"),
        ({"max_new_tokens": 38}, "request 1: got 41 tokens, 11 blocks, wanted at most 10 blocks; raise num_blocks"),
        ({"id": 0}, "request 0: got an id that another request has"),
    ],
)
def test_what_can_never_run_is_refused_in_one_line_and_disturbs_nobody(changes, message):
    subject = driver(replace(SMALL, num_blocks=11))
    other = Request(id=0, tokens=[1, 2, 3], max_new_tokens=2)
    subject.scheduler.add(other)
    with pytest.raises(ValueError, match=message) as refusal:
        subject.scheduler.add(Request(**{"id": 1, "tokens": [1, 2, 3], "max_new_tokens": 2} | changes))
    assert "\n" not in str(refusal.value)
    subject.drain()
    check_complete(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 3, "num_shards": 2}, "max_num_seqs: got 3, wanted a multiple of num_shards, 2"),
        ({"max_num_seqs": 0}, "max_num_seqs: got 0"),
        ({"num_shards": 0}, "num_shards: got 0, wanted at least 1"),
        (
            {"draft_tokens": 8},
            "max_num_batched_tokens: got 32, wanted at least 36, 9 for each of 4 decode rows",
        ),
        ({"chunk": 0}, "chunk: got 0"),
        ({"num_blocks": 1}, "num_blocks: got 1"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"max_model_len": 0}, "max_model_len: got 0"),
        ({"decode_steps": 0}, "decode_steps: got 0"),
        ({"draft_tokens": -1}, "draft_tokens: got -1"),
        ({"admission": "hope"}, 'admission: got \'hope\', wanted "reserve" or "preempt"'),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


ALIKE = """
import hashlib, sys
from tests.generation.test_scheduler import *
config = replace(SMALL, num_shards=2, admission="preempt", num_blocks=17, decode_steps=3, draft_tokens=1)
load = Load(driver(config, 1), 3, 60)
said, step = hashlib.sha256(), load.subject.step
def noted():
    plan = step()
    run = [(of.request.id, *of[1:]) for of in (*plan.spans, *plan.rows, *plan.admitted, *plan.grown)]
    said.update(repr((run, plan.steps, plan.until)).encode())
    return plan
load.subject.step = noted
load.run()
print(said.hexdigest(), "jax" in sys.modules)
"""


def test_processes_that_call_alike_schedule_alike():
    """Whatever their hash seeds; and none of it loads jax."""
    said = set()
    for seed in "01":
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        said.add(
            subprocess.run([sys.executable, "-c", ALIKE], env=env, capture_output=True, text=True, check=True).stdout
        )
    assert len(said) == 1 and said.pop().split()[1] == "False"
