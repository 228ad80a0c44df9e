"""Who may ask, how much and how slowly; and that whoever leaves, leaves nothing behind."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from openelm.errors import UserError
from openelm.serve.server import bind

openai = pytest.importorskip("openai")

PROMPT = {"model": "tiny", "prompt": "After the night ", "temperature": 0}


def error(found: httpx.Response) -> tuple[int, str]:
    return found.status_code, found.json()["error"]["message"]


class Slow:
    """The engine's decoder, with a pause before each step."""

    def __init__(self, engine: Any, pause_s: float = 0.02) -> None:
        self.config, self.device, self.description = engine.decoder.config, engine.decoder.device, "slow"
        self.pause_s, self.fails = pause_s, False
        self._decoder = engine.decoder

    def slots(self, count: int, capacity: int) -> Any:
        slots, outer = self._decoder.slots(count, capacity), self

        class Paused:
            def __getattr__(self, name: str) -> Any:
                return getattr(slots, name)

            def decode(self, *arguments: Any) -> Any:
                time.sleep(outer.pause_s)
                return slots.decode(*arguments)

            def prefill(self, *arguments: Any) -> Any:
                if outer.fails:
                    raise MemoryError("CUDA out of memory")
                return slots.prefill(*arguments)

        return Paused()


@pytest.fixture(scope="module")
def slow(serving, engine) -> Any:
    """A server of one slot that takes 20 ms a token, and cuts clients after half a second."""
    decoder = Slow(engine)
    served = serving(decoder, slots=1, queue=4, read_s=0.5, write_s=0.5, idle_s=2, head_bytes=4096, body_bytes=10_000)
    served.decoder = decoder
    return served


def test_a_key_is_asked_for_and_compared_whole(serving):
    served = serving(keys=("secret one", "second"))
    for authorization in (None, "Bearer", "Bearer secret", "Bearer secret onee", "Basic second", "Bearer sécond"):
        headers = {} if authorization is None else {"Authorization": authorization.encode()}
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            found = httpx.get(served.url + path, headers=headers)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    for key in ("secret one", "second"):
        assert served.client(api_key=key).models.list().data[0].id == "tiny"
    with pytest.raises(openai.AuthenticationError, match="the API key is not one of this server's"):
        served.client(api_key="third").models.list()
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert httpx.get(f"{served.url}/health", headers={"Host": "elsewhere.example"}).status_code == 200
    named = {"Host": "elsewhere.example", "Authorization": "Bearer second"}
    assert httpx.get(f"{served.url}/v1/models", headers=named).status_code == 200


def test_without_a_key_only_names_of_this_machine_are_answered(served):
    for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("elsewhere.example", 403)):
        assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_open_address_needs_a_key(host):
    with pytest.raises(UserError, match="no API key: set OPENELM_API_KEY or give --api-key-file"):
        bind(host, 0, keys=False)


def test_a_port_that_is_taken_is_said(served):
    port = served.address[1]
    with pytest.raises(UserError, match=rf"port {port} of 127.0.0.1 cannot be had \(Address already in use\)"):
        bind("127.0.0.1", port, keys=False)
    with pytest.raises(UserError, match="--port 70000 is none: give one from 1 to 65535"):
        bind("127.0.0.1", 70000, keys=False)
    with pytest.raises(UserError, match="--host no host is no address"):
        bind("no host", 0, keys=False)


def test_pages_from_elsewhere_may_ask_only_where_that_is_allowed(serving, served):
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    path = "/v1/chat/completions"
    found = httpx.options(served.url + path, headers=preflight)
    assert found.status_code == 405 and "access-control-allow-origin" not in found.headers
    opened = serving(cors=("https://a.example",))
    found = httpx.options(opened.url + path, headers={**preflight, "Access-Control-Request-Headers": "authorization"})
    assert found.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.get(f"{opened.url}/health", headers={"Origin": "https://b.example"})
    assert other.status_code == 200 and "access-control-allow-origin" not in other.headers


def test_a_body_that_is_too_long_is_not_read(slow):
    long = json.dumps({**PROMPT, "prompt": "a" * 20_000}).encode()
    headers = {"Content-Type": "application/json"}
    expected = (413, "the body has more than 10000 bytes: send less")
    assert error(httpx.post(f"{slow.url}/v1/completions", content=long, headers=headers)) == expected
    pieces = (long[start : start + 1000] for start in range(0, len(long), 1000))
    assert error(httpx.post(f"{slow.url}/v1/completions", content=pieces, headers=headers)) == expected


def request_head(length: int) -> bytes:
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def spoken(served: Any, data: bytes, *, wait_s: float = 5) -> bytes:
    """What comes back for some bytes until the server closes the connection."""
    with socket.create_connection(served.address, timeout=wait_s) as connection:
        connection.sendall(data)
        got = b""
        while piece := connection.recv(65536):
            got += piece
        return got


@pytest.mark.parametrize(
    "data",
    [b"nonsense\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10_000],
    ids=["no http", "no host", "long head"],
)
def test_what_is_no_http_gets_an_error_object(slow, data):
    head, _, body = spoken(slow, data).partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [False, True], ids=["head", "body"])
def test_a_client_that_sends_a_byte_now_and_then_is_cut(slow, body):
    head = request_head(99)
    data = head + b" " * 99 if body else head
    start_s = time.monotonic()
    with socket.create_connection(slow.address, timeout=5) as connection:
        connection.sendall(data[:150] if body else data[:10])
        rest = iter(data[150:] if body else data[10:])
        with pytest.raises(ConnectionError):
            while time.monotonic() - start_s < 5:
                connection.sendall(bytes([next(rest)]))
                time.sleep(0.1)
    assert 0.4 < time.monotonic() - start_s < 2


def test_a_client_that_sends_nothing_is_cut(slow):
    start_s = time.monotonic()
    with socket.create_connection(slow.address, timeout=5) as connection, pytest.raises(ConnectionError):
        assert connection.recv(1) == b""
        raise ConnectionError
    assert 0.4 < time.monotonic() - start_s < 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(slow, stream):
    body = json.dumps({**PROMPT, "max_tokens": 100, "stream": stream}).encode()
    cancelled = slow.service.scheduler.totals.cancelled
    with socket.create_connection(slow.address, timeout=5) as connection:
        connection.sendall(request_head(len(body)) + body)
        while not slow.service.scheduler.running:
            time.sleep(0.01)
        if stream:
            connection.recv(100)
    start_s = time.monotonic()
    assert slow.idle(1)
    assert time.monotonic() - start_s < 0.5  # all of it would take two seconds
    assert slow.service.scheduler.totals.cancelled == cancelled + 1


def test_who_leaves_the_queue_is_not_computed(slow):
    client = slow.client()
    stream = client.completions.create(**PROMPT, max_tokens=100, stream=True)
    tokens = slow.service.scheduler.totals.completion_tokens
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(**PROMPT, max_tokens=100)
    stream.close()
    assert slow.idle(2)
    assert slow.service.scheduler.totals.completion_tokens < tokens + 60


def test_a_full_queue_asks_to_come_again(slow):
    streams = [slow.client().completions.create(**PROMPT, max_tokens=100, stream=True)]
    found: list[tuple[int, str, str | None]] = []

    def ask() -> None:
        answer = httpx.post(f"{slow.url}/v1/completions", json={**PROMPT, "max_tokens": 100}, timeout=0.5)
        found.append((*error(answer), answer.headers.get("retry-after")))

    threads = [threading.Thread(target=lambda: _quietly(ask)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = (429, "the queue has no room for 1 more texts: ask again in a moment", "1")
    assert len(found) >= 4 and set(found) == {expected}  # two of four may be one client's
    streams[0].close()
    assert slow.idle(2)


def _quietly(ask: Callable[[], None]) -> None:
    with suppress(httpx.TimeoutException):
        ask()


def test_without_memory_a_request_fails_alone(slow):
    client = slow.client()
    slow.decoder.fails = True
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="not enough memory for this request") as found:
            client.completions.create(**PROMPT, max_tokens=5, stream=stream)
        assert found.value.code == "memory"
    slow.decoder.fails = False
    assert client.completions.create(**PROMPT, max_tokens=5).usage.completion_tokens == 5


def test_an_answer_that_takes_too_long_is_ended(serving, engine):
    served = serving(Slow(engine, 0.05), request_s=0.5)
    with pytest.raises(openai.APIStatusError, match=r"not finished in 0.5 s") as found:
        served.client().completions.create(**PROMPT, max_tokens=100)
    assert found.value.status_code == 408
    with pytest.raises(openai.APIError, match=r"not finished in 0.5 s"):
        list(served.client().completions.create(**PROMPT, max_tokens=100, stream=True))
    assert served.idle(1)


def test_a_client_that_does_not_read_is_cut_and_holds_no_slot(serving):
    served = serving(write_s=0.5)
    served.send_little()
    # Log-probabilities make the answer long enough to fill all buffers on the way.
    body = json.dumps({**PROMPT, "prompt": [[5, 6]] * 8, "max_tokens": 120, "logprobs": 5, "stream": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(5)
        connection.connect(served.address)
        connection.sendall(request_head(len(body)) + body)
        assert served.client().completions.create(**PROMPT, max_tokens=5).usage.completion_tokens == 5
        assert served.idle(10)
        time.sleep(1)  # twice what a client is waited for
        got = b""
        with suppress(ConnectionError):
            while piece := connection.recv(65536):
                got += piece
        assert got.startswith(b"HTTP/1.1 200") and b"[DONE]" not in got


def test_a_mistake_of_ours_is_an_error_object_and_the_server_lives(served, monkeypatch):
    async def broken(*_: Any) -> None:
        raise RuntimeError("with the prompt in it")

    monkeypatch.setattr(served.service, "complete", broken)
    found = httpx.post(f"{served.url}/v1/completions", json=PROMPT)
    assert error(found) == (500, "the server made a mistake: see its own output")
    monkeypatch.undo()
    assert httpx.post(f"{served.url}/v1/completions", json=PROMPT).status_code == 200


def test_an_engine_that_has_stopped_is_said_by_health_and_to_all_who_wait(serving, monkeypatch):
    served = serving()
    stream = served.client().completions.create(**PROMPT, max_tokens=120, stream=True, logit_bias={"2": -100})
    next(stream)
    monkeypatch.setattr(served.service.scheduler, "_advance", lambda: 1 / 0)
    with pytest.raises(openai.APIError):
        list(stream)
    assert error(httpx.get(f"{served.url}/health")) == (503, "the engine has stopped")
    assert httpx.post(f"{served.url}/v1/completions", json=PROMPT).status_code == 503


def test_figures_are_there_and_hold_nothing_of_what_was_said(serving):
    served = serving()
    served.client().completions.create(model="tiny", prompt="unmistakable", max_tokens=7, stop=["zzzz"])
    httpx.get(f"{served.url}/secret/path")
    found = httpx.get(f"{served.url}/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    lines = found.text.splitlines()
    assert "openelm_completion_tokens_total 7.0" in lines
    assert 'openelm_requests_total{path="/v1/completions",status="200"} 1.0' in lines
    assert 'openelm_requests_total{path="other",status="404"} 1.0' in lines
    assert "openelm_running 0.0" in lines and "openelm_first_token_seconds_count 1.0" in lines
    assert "unmistakable" not in found.text and "secret" not in found.text


def test_the_page_may_load_nothing_from_elsewhere(served):
    found = httpx.get(served.url)
    assert found.status_code == 200
    assert found.headers["content-security-policy"].startswith("default-src 'self'")
    assert found.headers["x-content-type-options"] == "nosniff"


@pytest.fixture
def ending(serving, engine) -> Iterator[Any]:
    yield serving(Slow(engine), grace_s=10)


def test_an_ending_server_finishes_its_streams_and_takes_no_more(ending):
    client = ending.client()
    stream = client.completions.create(**PROMPT, max_tokens=60, stream=True, logit_bias={"2": -100})
    pieces = [next(stream)]
    stopping = threading.Thread(target=ending.stop)
    stopping.start()
    while httpx.get(f"{ending.url}/health").status_code == 200:
        time.sleep(0.01)
    assert error(httpx.get(f"{ending.url}/health")) == (503, "the server is ending")
    with pytest.raises(openai.InternalServerError, match="the server is ending: ask another"):
        client.completions.create(**PROMPT)
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"
    stopping.join(10)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{ending.url}/health")


def test_after_the_time_of_grace_streams_are_told_that_there_is_no_more(serving, engine):
    served = serving(Slow(engine, 0.1), grace_s=0.3)
    stream = served.client().completions.create(**PROMPT, max_tokens=100, stream=True)
    next(stream)
    stopping = threading.Thread(target=served.stop)
    stopping.start()
    with pytest.raises(openai.APIError):
        list(stream)
    stopping.join(10)
