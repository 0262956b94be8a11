"""One server over several processes: each has the engine, and takes the steps that the main one takes.

An engine plans by what it was asked alone, without clock or chance, so that engines which are asked alike at the same
steps run the same programs. The main process tells the others what it was asked before each step.
"""

import dataclasses
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from deepseek_jax.generation.engine import Engine, Update
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.structured import Grammar, Grammars


class LeadingEngine(Engine):
    """The main process's.

    Args:
        give: called before each step with what was asked since the last one.
        given, named: as of `Engine`.
    """

    def __init__(self, *given: Any, give: Callable[[list], None], **named: Any):
        super().__init__(*given, **named)
        self._give, self._orders = give, []

    def add(
        self,
        tokens: Sequence[int],
        sampling: SamplingConfig,
        *,
        seed: int,
        salt: str = "",
        constraint: Grammar | None = None,
    ) -> int:
        """As an engine's. What is refused is told nobody: it changes nothing."""
        id = super().add(tokens, sampling, seed=seed, salt=salt, constraint=constraint)
        asked = {"tokens": list(map(int, tokens)), "sampling": _plain(sampling), "seed": seed, "salt": salt}
        self._orders.append({"id": id, "schema": constraint and constraint.schema, **asked})
        return id

    def cancel(self, id: int) -> bool:
        """As an engine's."""
        self._orders.append({"cancel": id})
        return super().cancel(id)

    def step(self) -> list[Update]:
        """As an engine's, with the others."""
        orders, self._orders = self._orders, []
        self._give(orders)
        return super().step()


def follow(engine: Engine, orders: Iterable[Sequence[Mapping[str, Any]]], ask_to_end: Callable[[], None]) -> None:
    """Take the main process's steps, to its end.

    A SIGTERM is passed on to it, so that answers are finished first.

    Args:
        engine: made as the main process's.
        orders: of each step.
        ask_to_end: tells the main process of a SIGTERM.
    """
    grammars = Grammars(engine.tokenizer, engine.config.vocab_size)
    signal.signal(signal.SIGTERM, lambda *of: ask_to_end())
    for _ in engine.warm_up():
        pass
    for step in orders:
        for order in step:
            if "cancel" in order:
                engine.cancel(order["cancel"])
            else:
                _add(engine, grammars, order)
        engine.step()


def _add(engine: Engine, grammars: Grammars, order: Mapping[str, Any]) -> None:
    sampling = order["sampling"]
    bias = {token: value for token, value in sampling["logit_bias"]}
    constraint = None if order["schema"] is None else grammars.of_schema(order["schema"])
    id = engine.add(
        order["tokens"],
        SamplingConfig(**{**sampling, "logit_bias": bias}),
        seed=order["seed"],
        salt=order["salt"],
        constraint=constraint,
    )
    if id != order["id"]:
        raise RuntimeError(f"request {order['id']} of process 0 is {id} here: the engines were not asked alike")


def _plain(sampling: SamplingConfig) -> dict[str, Any]:
    """As JSON holds it, whose keys are texts."""
    found = {of.name: getattr(sampling, of.name) for of in dataclasses.fields(sampling)}
    return {**found, "logit_bias": list(sampling.logit_bias.items())}
