"""The scheduler against a device that keeps token ids: whatever comes, every read finds its own tokens."""

import random
import time
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.generation.requests import Request
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
            tokens[chance.randrange(length)] = 999
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


@settings(max_examples=150)
@given(config=configs(), seed=st.integers(0, 2**32), lag=st.integers(0, 1), halves=st.booleans())
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
    began = time.monotonic()
    load.run(burst=16)
    print(time.monotonic() - began, load.subject.plans, load.subject.device.steps)
    load.check()
