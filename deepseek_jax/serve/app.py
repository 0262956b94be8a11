"""The application: routes behind their guard, errors in OpenAI's form."""

from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from deepseek_jax import __version__
from deepseek_jax.serve import chat, chat_page, completions, reasoning
from deepseek_jax.serve.calls import Served
from deepseek_jax.serve.documents import REFUSALS
from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.guard import Guard
from deepseek_jax.serve.metrics import CONTENT_TYPE
from deepseek_jax.serve.replies import JsonReply, refused

router = APIRouter()


def application(served: Served) -> ASGIApp:
    """The routes over a model that is served; its engine's thread starts and ends with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        served.prompts.warm_up()
        served.engine.start()
        yield
        served.engine.close()
        served.prompts.close()

    # no pages of documentation: they would fetch scripts from elsewhere
    given = {"docs_url": None, "redoc_url": None, "redirect_slashes": False, "lifespan": lifespan}
    app = FastAPI(title="deepseek_jax", version=__version__, **given)
    app.state.served = served
    for part in (router, chat.router, completions.router, reasoning.router, chat_page.router):
        app.include_router(part)
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_to)
    described = app.openapi()["paths"]
    known, posted = {"/", "/openapi.json", *described}, {path for path, of in described.items() if "post" in of}

    def answered(about: Mapping[str, Any]) -> None:
        route = about["path"] if about["path"] in known else "other"
        served.metrics.answered(route, about["status"] or 0)
        served.log.note(about)

    return Guard(app, served.settings, posted, answered, served.log.failure)


@router.get("/health", responses={200: {"description": "The process lives."}})
async def health() -> Response:
    """Whether the process lives."""
    return JsonReply({"status": "ok"})


@router.get("/ready", responses={200: {"description": "Calls are taken."}, 503: REFUSALS[503]})
async def ready(request: Request) -> Response:
    """Whether calls are taken: everything is compiled, and the server is not ending."""
    served: Served = request.app.state.served
    if served.drains or not served.engine.ready:
        done, count = served.engine.warmed
        state = "ending" if served.drains else f"compiling, {done} of {count} programs are done"
        raise ApiError(503, f"the server is {state}", retry_after=5)
    return JsonReply({"status": "ready"})


@router.get("/version", responses={200: {"description": "Of the server."}})
async def version() -> Response:
    """The server's version."""
    return JsonReply({"version": __version__})


@router.get("/metrics", responses={200: {"description": "In Prometheus' format.", "content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Counts and times, under vLLM's names."""
    return Response(request.app.state.served.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/v1/models", responses=REFUSALS)
async def models(request: Request) -> Response:
    """The model, under each of its names."""
    served: Served = request.app.state.served
    return JsonReply({"object": "list", "data": [_model(served, name) for name in served.settings.names]})


@router.get("/v1/models/{name:path}", responses=REFUSALS)
async def model(name: str, request: Request) -> Response:
    """The model of a name."""
    served: Served = request.app.state.served
    return JsonReply(_model(served, served.name(name)))


def _model(served: Served, name: str) -> dict[str, Any]:
    about = {"id": name, "object": "model", "created": served.created, "owned_by": "deepseek_jax"}
    return about | {"root": served.settings.names[0], "max_model_len": served.context}


async def _answer_to(request: Request, error: Exception) -> Response:
    """What a client is told of an exception."""
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    elif isinstance(error, HTTPException):
        error = _of_http(request, error)
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server made a mistake; its log says which")
    return refused(error)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body; what it holds is not repeated."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    param = ".".join(map(str, place)) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "body: got no JSON, wanted an object")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: got a field that is not known here; leave it out", param=param)
    return ApiError(400, f"{param or 'body'}: {first['msg'][:200]}", param=param)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, f"path: got {request.url.path!r:.80}, wanted a route of /openapi.json")
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow")
        return ApiError(405, f"method: got {request.method!r:.20}, wanted {allow}", allow=allow)
    return ApiError(error.status_code, str(error.detail)[:200])
