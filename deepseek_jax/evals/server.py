"""Samples from a server that speaks OpenAI's /v1/chat/completions."""

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from deepseek_jax.evals.drawing import Drawn, Wanted
from deepseek_jax.text.think import CLOSE, OPEN

_ATTEMPTS = 4
_WORTH_ANOTHER = {408, 409, 425, 429, 500, 502, 503, 504}
_MOST_BYTES = 1 << 28


class ServerDrawer:
    """Draws from a server.

    Args:
        url: of the server, with or without /v1.
        model: its name there; None takes the first that the server names.
        settings: of every request: temperature, top_p, max_tokens.
        batch: requests at a time.
        system: text that conversations begin with.
        key_variable: the environment variable that holds the server's key, if it wants one.
        seconds: to wait for an answer.

    Raises:
        ValueError: an address that is none, no such variable, or a server that does not answer.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        settings: dict[str, Any],
        *,
        batch: int,
        system: str | None = None,
        key_variable: str | None = None,
        seconds: float = 3600.0,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"server: got {url!r}, wanted an address such as http://localhost:8000")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._seconds, self._batch, self._system = seconds, batch, system
        self._headers = {"Content-Type": "application/json"}
        if key_variable is not None:
            if not os.environ.get(key_variable):
                raise ValueError(f"server_key: got {key_variable!r}, wanted the name of a variable that holds the key")
            self._headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
        self._settings = settings | {"model": model or self._first_model()}

    @property
    def model(self) -> str:
        """The model's name on the server."""
        return self._settings["model"]

    def check(self, wanted: Sequence[Wanted]) -> None:
        if any(each.budget is not None for each in wanted):
            raise ValueError(
                "thinking_budgets: got some with --server, wanted a MODEL here: a server closes no thought"
            )

    def __call__(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, Drawn]]:
        pool = ThreadPoolExecutor(self._batch)
        try:
            numbers = {pool.submit(self._draw, each): number for number, each in enumerate(wanted)}
            for done in as_completed(numbers):
                yield numbers[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _draw(self, wanted: Wanted) -> Drawn:
        messages = [{"role": "system", "content": self._system}] if self._system is not None else []
        asked = [{"role": "user", "content": wanted.text}] if isinstance(wanted.text, str) else wanted.text
        body = self._settings | {"messages": [*messages, *asked], "seed": wanted.seed}
        if wanted.stop:
            body["stop"] = list(wanted.stop)
        answer = self._asked("/chat/completions", body)
        try:
            (choice,) = answer["choices"]
            message, usage = choice["message"], answer.get("usage") or {}
            text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
            if not isinstance(text, str) or not isinstance(thought, str | None):
                raise TypeError(f"a content that is no text: {message!r:.80}")
            finish = choice.get("finish_reason")
            tokens = int(usage.get("completion_tokens") or 0)
            told = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
            asked = usage.get("prompt_tokens")
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise ValueError(
                f"{self._base}: got an answer that is none ({type(problem).__name__}: {problem})"
            ) from None
        if thought:
            # a thought whose answer never came is not closed
            text = f"{OPEN}{thought}{CLOSE if text or finish == 'stop' else ''}{text}"
        thinking = told if told is not None or OPEN in text else 0
        return Drawn("", text, tokens, thinking, finish == "stop", asked if type(asked) is int else None)

    def _first_model(self) -> str:
        answer = self._asked("/models", None)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"{self._base}/models: names no model; name it as MODEL") from None

    def _asked(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The server's answer; a server that is busy or away is asked again."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, headers=self._headers)
        for attempt in range(_ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=self._seconds) as answer:
                    return json.loads(answer.read(_MOST_BYTES))
            except urllib.error.HTTPError as problem:
                said = " ".join(problem.read(500).decode(errors="replace").split())
                trouble, again = f"status {problem.code}: {said:.200}", problem.code in _WORTH_ANOTHER
            except (OSError, http.client.HTTPException) as problem:
                trouble, again = f"{type(problem).__name__}: {problem}", True
            except ValueError as problem:
                trouble, again = f"no JSON: {problem}", False
            if not again:
                break
            if attempt + 1 < _ATTEMPTS:
                time.sleep(0.5 * 4**attempt)
        raise ValueError(f"{self._base}{path}: {trouble}; the same command goes on from the samples that are there")
