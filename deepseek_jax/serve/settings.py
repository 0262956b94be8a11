"""How a server behaves: who may ask, how much, how long."""

import re
from dataclasses import dataclass

from deepseek_jax.generation.sampling_config import SamplingConfig

_RATE = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour|day)")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a server behaves.

    Args:
        names: of the model; the first is what answers say.
        api_keys: one of them is asked for on everything but /health, /ready, /version and the page; none asks for
            nothing.
        rate_limit: of calls, for each key or, without keys, each address: such as "60/minute". None is no limit.
        max_waiting: completions that may wait for a slot.
        max_body: bytes of a request.
        max_depth: of its JSON.
        max_n: completions of a call.
        head_seconds: a request's line and headers must be there within.
        body_seconds: a body must be there within.
        call_seconds: an answer must be done within.
        write_seconds: a client must take what it is sent within.
        keep_alive_seconds: a stream says that it lives after so long without a token.
        grace_seconds: answers may take after a SIGTERM.
        temperature, top_p: where a request says nothing.
        allowed_hosts: names that a request's Host header may have; None is any.
    """

    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    rate_limit: str | None = "60/minute"
    max_waiting: int = 256
    max_body: int = 4 << 20
    max_depth: int = 32
    max_n: int = 16
    head_seconds: float = 30.0
    body_seconds: float = 30.0
    call_seconds: float = 3600.0
    write_seconds: float = 60.0
    keep_alive_seconds: float = 15.0
    grace_seconds: float = 30.0
    temperature: float = 0.6
    top_p: float = 0.95
    allowed_hosts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        SamplingConfig(max_new_tokens=1, temperature=self.temperature, top_p=self.top_p)
        if self.rate_limit is not None and not _RATE.fullmatch(self.rate_limit):
            raise ValueError(f'rate_limit: got {self.rate_limit!r}, wanted one such as "60/minute" or "1000/hour"')
        checks = {
            "names": (bool(self.names) and all(self.names), "at least one name"),
            "api_keys": (all(len(key) >= 8 for key in self.api_keys), "keys of at least 8 characters"),
            "max_waiting": (self.max_waiting >= 0, "0 or more"),
            "max_body": (self.max_body >= 1024, "at least 1024 bytes"),
            "max_depth": (1 <= self.max_depth <= 100, "1 to 100"),
            "max_n": (1 <= self.max_n <= 128, "1 to 128"),
        }
        for name in ("head_seconds", "body_seconds", "call_seconds", "write_seconds", "keep_alive_seconds"):
            checks[name] = getattr(self, name) > 0, "more than 0"
        checks["grace_seconds"] = self.grace_seconds >= 0, "0 or more"
        for name, (good, wanted) in checks.items():
            if not good:
                got = f"{len(self.api_keys)} keys" if name == "api_keys" else repr(getattr(self, name))
                raise ValueError(f"{name}: got {got}, wanted {wanted}")
