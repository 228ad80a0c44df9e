"""A service behind a port: the socket, signals, and an end that leaves nobody in mid-sentence."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from openelm.errors import UserError
from openelm.serve.api import make_app
from openelm.serve.connection import connection_class
from openelm.serve.gate import Gate
from openelm.serve.service import Service

LAST_WORDS_S = 5  # for answers to be read, once nothing is computed any more


def bind(host: str, port: int, *, keys: bool) -> socket.socket:
    """A socket that listens. UserError for a port that is taken, and for an open address without an API key."""
    if not 0 <= port < 65536:
        raise UserError(f"--port {port} is none: give one from 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} is no address ({error}): try 127.0.0.1") from error
    if not keys and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(
            f"--host {host} can be reached from other machines, and there is no API key: set OPENELM_API_KEY or give "
            "--api-key-file, or take 127.0.0.1"
        )
    listening = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # where it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise UserError(
            f"port {port} of {host} cannot be had ({error.strerror}): take another, or --port 0 for any that is free"
        ) from error
    return listening


def url(listening: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(service: Service, *, access_log: bool = False) -> Any:
    """uvicorn's server for a service; ``run(sockets=[...])`` returns after SIGTERM or SIGINT, when all was said."""
    import uvicorn
    from starlette.middleware.cors import CORSMiddleware

    settings = service.settings
    gate = Gate(make_app(service), service)
    app: Any = gate
    if settings.cors:
        app = CORSMiddleware(
            gate,
            allow_origins=settings.cors,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type"),
        )
    config = uvicorn.Config(
        app,
        http=connection_class(settings),
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_level="info" if access_log else "warning",
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.head_bytes,
        timeout_keep_alive=settings.idle_s,
        timeout_graceful_shutdown=LAST_WORDS_S,
    )
    return _server_class()(config, service, lambda: gate.in_flight == 0)


def _server_class() -> Callable[..., Any]:
    import uvicorn

    class Server(uvicorn.Server):
        """Goes on after a signal until all is answered, or the time of grace is over; a second signal ends it."""

        def __init__(self, config: uvicorn.Config, service: Service, idle: Callable[[], bool]) -> None:
            super().__init__(config)
            self._service, self._idle = service, idle
            self._end_s = 0.0

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self._service.draining:
                self.should_exit = self.force_exit = True
            self._service.draining = True
            self._end_s = time.monotonic() + self._service.settings.grace_s

        async def on_tick(self, counter: int) -> bool:
            if self._service.draining and (self._idle() or time.monotonic() > self._end_s):
                # Who is still being answered is told that there is no more.
                await asyncio.to_thread(self._service.scheduler.close)
                self.should_exit = True
            return await super().on_tick(counter)

    return Server
