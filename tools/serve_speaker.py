"""A server over an engine that only says given texts: what the server itself takes can be seen by it."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

from deepseek_jax.cli import run
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.generation.engine import Metrics, Update
from deepseek_jax.generation.live import Live
from deepseek_jax.generation.requests import Request
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.server import Process, listen
from deepseek_jax.serve.settings import ServeConfig
from deepseek_jax.text.tokenizer import Tokenizer

CONTEXT = 1 << 16
CHUNK_TOKENS = 4


class Speaker:
    """Says the same few words of every request a step, as an engine does whose steps take so long.

    Args:
        tokenizer: of prompts.
        slots: requests that run at a time.
        seconds: of a step.
    """

    def __init__(self, tokenizer: Tokenizer, *, slots: int, seconds: float):
        self.tokenizer, self._seconds = tokenizer, seconds
        self.config = SimpleNamespace(vocab_size=tokenizer.vocab_size)
        cache = SimpleNamespace(pools=[SimpleNamespace(used=0, num_blocks=2)])
        of_host = SimpleNamespace(max_num_seqs=slots, max_model_len=CONTEXT)
        self.scheduler = SimpleNamespace(config=of_host, running=[], cache=cache)
        self.runner, self.metrics = SimpleNamespace(compiled=0), Metrics()
        self._lives: dict[int, Live] = {}
        self._next = 0

    @property
    def has_work(self) -> bool:
        return bool(self._lives)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        yield 1, 1

    def add(self, tokens: list[int], sampling: SamplingConfig, *, seed: int, salt: str, constraint: object) -> int:
        limit = sampling.limit(len(tokens), CONTEXT)
        request = Request(id=self._next, tokens=list(tokens), max_new_tokens=limit)
        self._lives[request.id] = Live(request=request, sampling=sampling, seed=seed, opened=False, stream=None)
        self._next += 1
        return request.id

    def cancel(self, id: int) -> bool:
        return self._lives.pop(id, None) is not None

    def step(self) -> list[Update]:
        time.sleep(self._seconds)
        found = []
        for id, live in list(self._lives.items())[: self.scheduler.config.max_num_seqs]:
            request = live.request
            tokens = [4] * min(CHUNK_TOKENS, request.limit - len(request.tokens))
            request.tokens += tokens
            request.finished = len(request.tokens) == request.limit
            if request.finished:
                del self._lives[id]
            found.append(Update(id, tokens, " some of a text", request.finished, live))
        return found


def main(*, slots: int = 64, seconds: float = 0.02) -> None:
    """Serve until SIGTERM.

    Args:
        slots: requests that run at a time.
        seconds: of a step, of four tokens of each of them.
    """
    engine = Speaker(Tokenizer.characters(ALPHABET, chat_template=TEMPLATE), slots=slots, seconds=seconds)
    with listen("127.0.0.1", 0) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        Process(engine, ServeConfig(names=("speaker",), rate_limit=None, max_waiting=1 << 16)).run(listener)


if __name__ == "__main__":
    run(main)
