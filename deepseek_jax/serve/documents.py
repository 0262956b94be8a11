"""What the OpenAPI document says of answers."""

from typing import Any

from deepseek_jax.serve.schemas import ErrorBody

_MEANINGS = {
    400: "The request is wrong.",
    401: "The key is missing or wrong.",
    403: "The host is not this server's.",
    404: "There is no such model or route.",
    405: "The route has other methods.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "Too many requests.",
    500: "The completion failed.",
    503: "The server is starting, full, or ending.",
    504: "The answer took too long.",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _MEANINGS.items()
}


def replies(text: str) -> dict[int | str, dict[str, Any]]:
    """Of a route that answers with JSON or a stream of events."""
    kinds = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"description": text, "content": kinds}, **REFUSALS}
