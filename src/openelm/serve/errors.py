"""What a client is told when something is not done: OpenAI's error object, with HTTP's status."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {401: "authentication_error", 403: "permission_error", 408: "timeout", 429: "rate_limit_error"}


class Refused(Exception):  # noqa: N818 (often the client's own wish)
    """A request that is not answered; the message gives the value, the rule and the remedy, as a UserError's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_json(value: Any) -> bytes:
    """JSON in ASCII: half a surrogate pair, which a client may send and get back in a message, has no UTF-8."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def invalid(problems: Sequence[Mapping[str, Any]]) -> Refused:
    """pydantic's account of a body that does not fit: the first problem, and how many more there are."""
    first = problems[0]
    param = _param(first["loc"][1:])
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON ({first.get('ctx', {}).get('error', 'it cannot be read')})")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"{param} is not known here: leave it out", param=param)
    message = f"{param or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    others = len({_param(problem["loc"][1:]) for problem in problems} - {param})
    return Refused(400, message + (f"; and {others} more" if others else ""), param=param or None)


def _param(place: Sequence[Any]) -> str:
    """("messages", 0, "content", "str") -> messages[0].content: the kinds that a union tries are no places."""
    words = ""
    for part in place:
        if isinstance(part, int):
            words += f"[{part}]"
        elif part in ("str", "int", "float", "bool") or "[" in part or (words and part[:1].isupper()):
            break
        else:
            words += f".{part}" if words else part
    return words
