"""The routes: OpenAI's, health, figures, and the page.

Annotations are looked at when a route is made, and fastapi is imported in the function: so they are no strings here.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openelm import __version__
from openelm.errors import UserError
from openelm.serve.errors import Refused, as_json, invalid
from openelm.serve.jobs import Answer
from openelm.serve.requests import ChatRequest, CompletionRequest
from openelm.serve.schemas import ANSWERS
from openelm.serve.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

T = TypeVar("T")

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second tells nginx to hold nothing back
PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'"}


def make_app(service: Service) -> "FastAPI":
    """The application, without what gate.py puts before it."""
    from fastapi import FastAPI, Request, Response

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.scheduler.close()

    # No /docs: these pages load their scripts from elsewhere.
    app = FastAPI(title="OpenELM", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _answer_errors(app)

    @app.post("/v1/completions", responses=ANSWERS["completions"])
    async def completions(ask: CompletionRequest, request: Request) -> Response:
        state = request.state
        return await _answered(request, ask, service.complete(ask, state.client, state.keep))

    @app.post("/v1/chat/completions", responses=ANSWERS["chat"])
    async def chat_completions(ask: ChatRequest, request: Request) -> Response:
        state = request.state
        return await _answered(request, ask, service.chat(ask, state.client, state.keep))

    @app.get("/v1/models", responses=ANSWERS["models"])
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", responses=ANSWERS["model"])
    async def model(name: str) -> Response:
        if name != service.name:
            raise Refused(404, f"there is no model {name}: {service.name} is served", code="model_not_found")
        return _json(_model(service))

    @app.get("/health", responses=ANSWERS["health"])
    async def health() -> Response:
        if service.healthy:
            return _json({"status": "ok"})
        raise Refused(503, "the server is ending" if service.draining else "the engine has stopped", code="unhealthy")

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        page, media_type = service.metrics.page()
        return Response(page, headers={"Content-Type": media_type})

    for path in ("/", "/page.css", "/page.js", "/icon.svg"):
        app.add_route(path, _file(PAGE / (path[1:] or "index.html")), include_in_schema=False)
    return app


def _file(path: Path) -> Callable[[Any], Coroutine[Any, Any, Any]]:
    from starlette.responses import FileResponse

    async def serve(request: Any) -> Any:
        return FileResponse(path, headers=PAGE_HEADERS)

    return serve


def _model(service: Service) -> dict[str, Any]:
    """A model as OpenAI lists it; the last two are ours, for the page."""
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "openelm",
        "context_length": service.limit,
        "chat": service.template is not None,
    }


def _answer_errors(app: "FastAPI") -> None:
    """Every error is OpenAI's object."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def refused(request: Any, error: Exception) -> Any:
        assert isinstance(error, Refused)
        return _json(error.body, error.status, error.headers)

    async def user_error(request: Any, error: Exception) -> Any:
        return await refused(request, Refused(400, str(error)))

    async def invalid_body(request: Any, error: Exception) -> Any:
        assert isinstance(error, RequestValidationError)
        return await refused(request, invalid(error.errors()))

    async def http(request: Any, error: Exception) -> Any:
        assert isinstance(error, HTTPException)
        words = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for this address"}
        message = words.get(error.status_code, error.detail)
        return await refused(request, Refused(error.status_code, message, headers=error.headers))

    async def ours(request: Any, error: Exception) -> Any:
        return await refused(request, Refused(500, "the server made a mistake: see its own output", code="internal"))

    for kind, handler in (
        (Refused, refused),
        (UserError, user_error),
        (RequestValidationError, invalid_body),
        (HTTPException, http),
        (Exception, ours),
    ):
        app.add_exception_handler(kind, handler)


async def _answered(request: Any, ask: CompletionRequest | ChatRequest, begin: Coroutine[Any, Any, Answer]) -> Any:
    """The answer to a request whose client is still there: whole, or as a stream."""
    from starlette.responses import StreamingResponse

    answer = await _while_there(request, begin)
    if not ask.stream:
        return _json(await _while_there(request, answer.whole()))
    usage = bool(ask.stream_options and ask.stream_options.include_usage)
    events = answer.events(include_usage=usage)
    first = await _while_there(request, anext(events))  # what fails before it is an error of HTTP, not of the stream

    async def all_events() -> AsyncIterator[bytes]:
        yield first
        async for event in events:
            yield event

    return StreamingResponse(all_events(), media_type="text/event-stream", headers=STREAM_HEADERS)


async def _while_there(request: Any, work: Awaitable[T]) -> T:
    """What ``work`` gives; it is cancelled, and Refused raised, when the client is gone."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Refused(499, "the client has left")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200, headers: Any = None) -> Any:
    from starlette.responses import Response

    return Response(as_json(value), status, headers=headers, media_type="application/json")
