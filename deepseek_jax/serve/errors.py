"""What a client is told of a mistake, in OpenAI's form."""

from typing import Any

from deepseek_jax.distributed import printable

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_LONGEST = 400


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: a sentence: what, got, wanted, what to do.
        param: the field that is wrong.
        code: OpenAI's word for it.
        retry_after: seconds after which another try may help.
        allow: methods that there are instead.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        allow: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.allow = retry_after, allow

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        found |= {} if self.allow is None else {"Allow": self.allow}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = printable(" ".join(self.message.split()))[:_LONGEST]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def of_field(problem: ValueError, names: dict[str, str]) -> ApiError:
    """The library's refusal, which begins with a field's name, with the API's names for its fields."""
    text = " ".join(str(problem).split())
    first, colon, rest = text.partition(":")
    param = names.get(first, first) if colon and first.isidentifier() else None
    message = f"{param}:{rest}" if param else text
    for name, named in names.items():
        message = message.replace(name, named)
    return ApiError(400, message, param=param)
