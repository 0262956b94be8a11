"""A request on its way through the engine, and the plan of one engine step, which names what runs for whom."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(kw_only=True, eq=False)
class Request:
    """One sequence: what was asked, and how far it is. The scheduler alone writes what stands below `prompt_length`.

    Args:
        id: the caller's; no two that live have the same.
        tokens: the prompt; tokens that were drawn are appended to this list.
        max_new_tokens: 0 computes the prompt and draws nothing.
        salt: requests of different salts share no blocks: of another adapter or tenant, or with another payload.
        reuse: take published blocks in place of computing the prompt; False where every token's logits are wanted.
        stepwise: the host has to see each token of it before the next one is drawn.
        payload: what a block of this request carries when it is published, by its index among the request's blocks.

        priority: its number in the order of arrival.
        computed: tokens in the cache for good, as far as plans have retired.
        dispatched: tokens of the prompt (and of an earlier life) in the cache once all dispatched plans have run.
        in_flight: tokens that dispatched plans draw at most.
        plans: dispatched plans that name the request.
        blocks: of its shard's pool; they stay held until `plans` is 0, for the device may still write to them.
        slot: of the device's state while it runs, else None.
        shard: where its blocks lie.
        decoding: its latest token is on the device, in its slot, so that a decode row can go on from it.
        keys: of the blocks of its tokens, under which they are published.
        awaits: shard and key of a block that another one is computing, which this one waits to hit.
        preemptions: how often it lost its blocks and was computed anew.
        stopped: ended by a stop of its own, not by its limit.
    """

    id: int
    tokens: list[int]
    max_new_tokens: int
    salt: str = ""
    reuse: bool = True
    stepwise: bool = False
    payload: Callable[[int], object] | None = None
    prompt_length: int = field(init=False)
    priority: int = field(default=-1, init=False)
    computed: int = field(default=0, init=False)
    dispatched: int = field(default=0, init=False)
    in_flight: int = field(default=0, init=False)
    plans: int = field(default=0, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    slot: int | None = field(default=None, init=False)
    shard: int = field(default=0, init=False)
    decoding: bool = field(default=False, init=False)
    keys: list[bytes] = field(default_factory=list, init=False, repr=False)
    awaits: tuple[int, bytes] | None = field(default=None, init=False)
    preemptions: int = field(default=0, init=False)
    cancelled: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def limit(self) -> int:
        """Tokens it has at most, prompt included."""
        return self.prompt_length + self.max_new_tokens

    @property
    def known(self) -> int:
        """Tokens it has at most once all dispatched plans have run."""
        return min(len(self.tokens) + self.in_flight, self.limit)


class Span(NamedTuple):
    """Known tokens from `start` on that `extend` computes of a request; after the last known one it draws the next."""

    request: Request
    start: int
    count: int
    last: bool


class Row(NamedTuple):
    """A request that the decode loop goes on with, and how many tokens that draws at most."""

    request: Request
    most: int


class Admitted(NamedTuple):
    """A request that got a slot in this plan, its table so far, and how many tokens were hits: those are computed."""

    request: Request
    slot: int
    shard: int
    blocks: tuple[int, ...]
    hits: int


class Grown(NamedTuple):
    """Blocks that a running request got in this plan, behind the `start` that its table has."""

    request: Request
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One engine step. What it says of slots and tables comes first, then `extend` and the decode loop in any order.

    Args:
        spans: what `extend` computes.
        rows: what the decode loop goes on with; none of them has a span.
        steps: of the decode loop at most. It runs at least one where any row lives.
        until: live rows at which the decode loop ends before that.
        admitted: requests that start, or start anew, in a slot.
        grown: running requests whose tables have become longer.
        preempted: requests that lost their slots, and start anew in a later plan.
    """

    spans: tuple[Span, ...] = ()
    rows: tuple[Row, ...] = ()
    steps: int = 0
    until: int = 0
    admitted: tuple[Admitted, ...] = ()
    grown: tuple[Grown, ...] = ()
    preempted: tuple[Request, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing to run: what is in flight has to retire first."""
        return not self.spans and not self.rows


class Drawn(NamedTuple):
    """What a plan drew for one request, in order, and whether that ended it."""

    tokens: Sequence[int]
    stopped: bool = False


class Progress(NamedTuple):
    """Tokens that a request gained when a plan retired; `request.finished` says whether that was all."""

    request: Request
    tokens: Sequence[int]
