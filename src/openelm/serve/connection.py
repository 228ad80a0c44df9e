"""One client's connection: how long it may take to send a request, and to read an answer."""

from __future__ import annotations

import asyncio
from typing import Any

from openelm.serve.errors import Refused, as_json
from openelm.serve.settings import Settings


def connection_class(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's protocol with our limits. What it reads slowly, or sends slowly, costs a client its connection."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        _reading: asyncio.TimerHandle | None = None  # while a request is arriving
        _writing: asyncio.TimerHandle | None = None  # while the client does not read what we send

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.connections:
                transport.write(_response(503, "there are too many connections: ask again in a moment"))
                transport.close()
            self._await_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self._await_request()
            else:
                self._requested()

        def connection_lost(self, exc: Exception | None) -> None:
            self._requested()
            self._written()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self._writing or self.loop.call_later(settings.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._written()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP; where the head is too long, that too."""
            status = 431 if len(self.conn.trailing_data[0]) > settings.head_bytes else 400
            self.transport.write(_response(status, "this is no request of HTTP/1.1, or its head is too long"))
            self.transport.close()

        def _await_request(self) -> None:
            # Not set anew by each byte: a whole request must have come by then.
            self._reading = self._reading or self.loop.call_later(settings.read_s, self.transport.abort)

        def _requested(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

        def _written(self) -> None:
            if self._writing is not None:
                self._writing.cancel()
                self._writing = None

    return Connection


def _response(status: int, message: str) -> bytes:
    """A whole response, for where there is no application to write one."""
    body = as_json(Refused(status, message).body)
    head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
