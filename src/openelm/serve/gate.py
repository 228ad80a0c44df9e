"""What stands before the routes: who may ask, how much, and that nothing is left running when a request has ended."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from openelm.serve.errors import Refused, as_json
from openelm.serve.jobs import Job
from openelm.serve.service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/", "/page.css", "/page.js", "/icon.svg", "/health")  # without a key: they tell and compute nothing
KNOWN = (*OPEN, "/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/openapi.json")


class Gate:
    """An ASGI application around another. ``in_flight`` requests are being answered."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.keys]
        self.in_flight = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # as long as nothing was sent
        jobs: list[Job] = []
        state = scope.setdefault("state", {})
        state["keep"] = jobs.append

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        self.in_flight += 1
        try:
            state["client"] = self._admitted(scope)
            receive = await self._with_body(scope, receive)
            await self._app(scope, receive, watched)
        except Refused as refused:
            await _refuse(refused, watched)
        finally:
            self.in_flight -= 1
            _cancel(jobs)
            path = scope["path"] if scope["path"] in KNOWN else "other"
            self._service.metrics.requests.labels(path, status).inc()

    def _admitted(self, scope: Message) -> str:
        """Whose request it is. Refused for one that must not be answered."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        address = str((scope.get("client") or ["unknown"])[0])
        path: str = scope["path"]
        if path in OPEN:
            return address
        client = self._client(headers.get("authorization", "")) if self._keys else address
        if not self._keys and _host(headers.get("host", "")) not in LOCAL_NAMES:
            # A page from elsewhere whose name was made to mean this machine: browsers take it for the same origin.
            raise Refused(403, "this server is asked by the names of this machine only: set an API key for others")
        if self._service.draining:
            closing = {"Retry-After": "5", "Connection": "close"}
            raise Refused(503, "the server is ending: ask another", code="shutting_down", headers=closing)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and path.startswith("/v1/") and kind != "application/json":
            raise Refused(415, f"the body is {kind or 'of no type'}: send Content-Type: application/json")
        return client

    def _client(self, authorization: str) -> str:
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # All are compared, each in constant time.
        found = [number for number, known in enumerate(self._keys) if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not found:
            words = "is not one of this server's" if authorization else "is missing"
            message = f"the API key {words}: send Authorization: Bearer KEY"
            raise Refused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {found[0]}"

    async def _with_body(self, scope: Message, receive: Receive) -> Receive:
        """``receive`` with the whole body in one message. Refused for a body that is too long."""
        most = self._service.settings.body_bytes
        too_long = Refused(413, f"the body has more than {most} bytes: send less", headers={"Connection": "close"})
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise too_long
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(499, "the client has left")
            body += message.get("body", b"")
            if len(body) > most:
                raise too_long
            more = message.get("more_body", False)
        given = False

        async def receive_whole() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return receive_whole


def _host(header: str) -> str:
    """A Host header without its port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()


def _cancel(jobs: list[Job]) -> None:
    for job in jobs:
        job.cancel()


async def _refuse(refused: Refused, send: Send) -> None:
    body = as_json(refused.body)
    own = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in own.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
