"""What a server may be asked to do, in one place: every limit has its name here, and its reason."""

from __future__ import annotations

from dataclasses import dataclass, fields

from openelm.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Sizes in bytes, tokens or numbers, times in seconds. UserError for one that is not above 0."""

    slots: int = 8  # texts that advance together
    context: int | None = None  # tokens that each has room for; None: the model's context
    prefill_tokens: int | None = None  # of prompts between two tokens of the texts that run; None: scheduler.py's
    queue: int = 256  # texts that wait for a slot; one client may have half of them

    body_bytes: int = 2 << 20
    head_bytes: int = 32 << 10
    connections: int = 512
    texts: int = 128  # prompts times n, of one request
    stops: int = 32  # OpenAI allows 4, lm-evaluation-harness sends more
    stop_characters: int = 256

    read_s: float = 30.0  # for a whole request to arrive
    write_s: float = 30.0  # for a client that reads nothing, or next to nothing
    idle_s: int = 15  # between two requests of one connection
    request_s: float = 600.0  # for an answer, waiting included
    grace_s: float = 30.0  # for running answers, once the server was asked to stop

    cors: tuple[str, ...] = ()  # origins whose pages may ask
    keys: tuple[str, ...] = ()  # of which one must be given; none: everyone may ask

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value > 0:
                raise UserError(f"{field.name}={value} of the server must be above 0")
        if self.queue < 2:
            raise UserError(f"queue={self.queue} of the server must be at least 2: one client may have half of it")
