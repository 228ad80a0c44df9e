"""The page at `/` in a headless Chromium: against a server that says what it is told to, and against the real one."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import openelm.serve
from openelm.data.chat import encode_chat
from openelm.infer.engine import Engine
from openelm.infer.slots import Decoder

FOLDER = Path(openelm.serve.__file__).parent / "page"
KINDS = {".svg": "image/svg+xml", ".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SCRIPT = "<script>document.title = 'broken in'</script><b>bold</b>"


class Server(ThreadingHTTPServer):
    """Serves the page, and answers with ``pieces``: one every ``pause_s``, the last again and again if ``endless``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.chat, self.key = True, ""
        self.pieces, self.pause_s, self.endless = ["Hello", " there", "."], 0.0, False
        self.refusals: list[tuple[int, dict[str, Any]]] = []  # for the next requests
        self.breaks_off = False
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.cancelled = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/") or "index.html"
        if name == "v1/models":
            if self._is_known():
                self._json(200, {"data": [{"id": "runs/little", "object": "model", "chat": self.server.chat}]})
        elif (file := FOLDER / name).is_file():
            self.send_response(200)
            self.send_header("Content-Type", f"{KINDS[file.suffix]}; charset=utf-8")
            self.send_header("Content-Security-Policy", "default-src 'self'")
            self.end_headers()
            self.wfile.write(file.read_bytes())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if not self._is_known():
            return
        server.asked.append((self.path, body))
        if server.refusals:
            self._json(*server.refusals.pop(0))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(self.path == "/v1/chat/completions")
        except (ConnectionError, TimeoutError):
            server.cancelled.set()

    def _stream(self, chat: bool) -> None:
        pieces, server = list(self.server.pieces), self.server
        if chat:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        while pieces:
            piece = pieces.pop(0)
            self._event({"choices": [{"index": 0, **({"delta": {"content": piece}} if chat else {"text": piece})}]})
            if server.endless and not pieces:
                pieces.append(piece)
            time.sleep(server.pause_s)
        if server.breaks_off:
            return
        self._event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(server.pieces)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _is_known(self) -> bool:
        if not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self._json(401, {"error": {"message": "a key is needed", "type": "authentication_error", "code": "no_key"}})
        return False

    def _json(self, status: int, data: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium, as Debian's package `chromium` has it")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """``visit(url)``: the page at an address, once it knows its model; nothing may be wrong with it in the end.

    ``refused``: that the console tells of requests which the server refused.
    """
    opened: list[tuple[Any, list[str], bool]] = []

    def open_page(url: str, *, refused: bool = False, **options: Any) -> Any:
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(10_000)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        opened.append((page, said, refused))
        return page

    yield open_page
    for page, said, refused in opened:
        page.context.close()
        assert [text for text in said if not (refused and text.startswith("Failed to load resource"))] == []


def say(page: Any, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def done(page: Any) -> None:
    """Wait until nothing is written."""
    page.locator("body:not(.busy)").wait_for()


def words_of(page: Any) -> list[str]:
    """Who said what, in order."""
    return [
        f"{who}: {what}"
        for who, what in page.evaluate(
            "[...document.querySelectorAll('article')].map(a => [a.className, a.querySelector('.words').textContent])"
        )
    ]


def test_what_is_typed_is_answered_and_still_there_after_a_reload(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.locator("h1", has_text="little").wait_for()
    page.locator("#text").press_sequentially("Hi")
    page.locator("#text").press("Shift+Enter")
    page.locator("#text").press_sequentially("you")
    page.locator("#text").press("Enter")
    done(page)
    server.pieces = [SCRIPT, " &amp;", "\n  two"]
    say(page, "<i>Why?</i>")
    done(page)
    talk = ["user: Hi\nyou", "model: Hello there.", "user: <i>Why?</i>", f"model: {SCRIPT} &amp;\n  two"]
    assert words_of(page) == talk and page.locator("main i, main b, main script").count() == 0
    page.reload()
    page.locator("h1", has_text="little").wait_for()
    assert words_of(page) == talk and page.title() == "little · OpenELM"
    assert page.locator("#figures").inner_text().startswith("3 tokens")
    (path, body), (_, second) = server.asked
    assert path == "/v1/chat/completions" and "seed" not in body
    assert body == {
        "model": "runs/little",
        "messages": [{"role": "user", "content": "Hi\nyou"}],
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 512,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant", "user"]
    page.get_by_role("button", name="New").click()
    page.reload()
    assert words_of(page) == []


def test_a_stop_keeps_what_is_there_and_frees_the_server(server: Server, visit: Callable[..., Any]) -> None:
    server.endless, server.pause_s = True, 0.005
    page = visit(server.url)
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
        server.cancelled.clear()
        say(page, "Go on")
        page.locator("article:last-child", has_text="there..").wait_for()
        stop()
        done(page)
        assert server.cancelled.wait(5)
        assert page.locator("#figures").inner_text().endswith(" · stopped")
    assert [words.partition(".")[0] for words in words_of(page)] == ["user: Go on", "model: Hello there"] * 2


def test_a_reload_in_the_middle_keeps_the_half_answer(server: Server, visit: Callable[..., Any]) -> None:
    server.endless, server.pause_s = True, 0.005
    page = visit(server.url)
    say(page, "Go on")
    page.locator("article:last-child", has_text="there..").wait_for()
    page.reload()
    assert words_of(page)[0] == "user: Go on" and words_of(page)[1].startswith("model: Hello there..")
    assert server.cancelled.wait(5)


def test_a_reload_before_the_first_word_gives_the_question_back(server: Server, visit: Callable[..., Any]) -> None:
    server.pieces, server.endless, server.pause_s = [""], True, 0.005
    page = visit(server.url)
    say(page, "Go on")
    page.locator("article").nth(1).wait_for()
    page.reload()
    assert words_of(page) == [] and page.locator("#text").input_value() == "Go on"


def test_what_goes_wrong_is_said_and_the_question_is_not_lost(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server.url, refused=True)
    server.refusals = [(429, {"error": {"message": "The queue is full.", "code": "queue_full"}}), (500, {})]
    for words in ("The queue is full.", "The server answered with 500."):
        say(page, "More")
        page.get_by_role("alert").filter(has_text=words).wait_for()
        assert words_of(page) == [] and page.locator("#text").input_value() == "More"
    server.pieces = []
    server.breaks_off = True
    say(page, "More")
    page.get_by_role("alert").filter(has_text="closed the connection").wait_for()
    server.pieces, server.breaks_off = ["Yes."], False
    page.get_by_role("button", name="Send").click()
    done(page)
    assert words_of(page) == ["user: More", "model: Yes."] and not page.get_by_role("alert").is_visible()
    server.shutdown()
    server.server_close()
    say(page, "And now?")
    page.get_by_role("alert").filter(has_text="cannot be reached").wait_for()
    assert page.locator("#text").input_value() == "And now?"


def test_another_answer_takes_the_place_of_the_last_unless_it_fails(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server.url, refused=True)
    say(page, "Hi")
    done(page)
    server.pieces = ["Good day."]
    page.get_by_role("button", name="Again").click()
    done(page)
    assert words_of(page) == ["user: Hi", "model: Good day."]
    server.refusals = [(503, {"error": {"message": "The server is ending."}})]
    page.get_by_role("button", name="Again").click()
    page.get_by_role("alert").filter(has_text="ending").wait_for()
    assert words_of(page) == ["user: Hi", "model: Good day."]
    assert [len(body["messages"]) for _, body in server.asked] == [1, 1, 1]


def test_settings_are_sent_and_kept_and_wrong_ones_are_not(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.get_by_role("button", name="Settings").click()
    for label, value in (("Temperature", "0"), ("Top-p", "0.5"), ("Tokens at most", "7"), ("Seed", "3")):
        page.get_by_label(label).fill(value)
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Top-p").fill("7")
    page.reload()
    say(page, "Hi")
    done(page)
    [(_, body)] = server.asked
    sent = {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")}
    assert sent == {"temperature": 0, "top_p": 0.5, "max_tokens": 7, "seed": 3}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the defaults").click()
    page.get_by_role("button", name="Settings").click()
    say(page, "Hi")
    done(page)
    assert server.asked[1][1]["temperature"] == 0.7 and "seed" not in server.asked[1][1]


def test_a_base_model_goes_on_with_a_text(server: Server, visit: Callable[..., Any]) -> None:
    server.chat, server.pieces = False, [" upon", " a time"]
    page = visit(server.url, refused=True)
    text = page.get_by_label("Text", exact=True)
    text.fill("Once")
    text.press("Enter")
    text.press("Control+Enter")
    done(page)
    assert text.input_value() == "Once\n upon a time"
    server.pieces = ["more"]
    page.get_by_role("button", name="Again").click()
    done(page)
    assert text.input_value() == "Once\nmore"
    server.refusals = [(503, {"error": {"message": "The server is ending."}})]
    page.get_by_role("button", name="Again").click()
    page.get_by_role("alert").filter(has_text="ending").wait_for()
    assert text.input_value() == "Once\nmore"
    page.reload()
    page.locator("body.text").wait_for()
    assert text.input_value() == "Once\nmore"
    assert [(path, body["prompt"]) for path, body in server.asked] == [("/v1/completions", "Once\n")] * 3
    assert not page.get_by_text("Say something").is_visible() and page.get_by_text("base model").is_visible()


def test_a_key_is_asked_for_until_it_is_right(server: Server, visit: Callable[..., Any]) -> None:
    server.key = "sesame"
    page = visit(server.url, refused=True)
    for key, words in (("wrong", "asks for a key"), ("sesame", "does not accept this key")):
        page.get_by_role("dialog").filter(has_text=words).wait_for()
        page.get_by_role("textbox", name="API key").fill(key)
        page.keyboard.press("Enter")
    say(page, "Hi")
    done(page)
    page.reload()
    page.locator("h1", has_text="little").wait_for()
    assert words_of(page) == ["user: Hi", "model: Hello there."] and not page.get_by_role("dialog").is_visible()


def test_of_a_conversation_that_is_too_long_the_older_half_is_left_out(
    server: Server, visit: Callable[..., Any]
) -> None:
    page = visit(server.url, refused=True)
    for number in range(3):
        say(page, f"Question {number}")
        done(page)
    server.refusals = [(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})]
    say(page, "Question 3")
    done(page)
    asked = [[turn["content"] for turn in body["messages"]][0::2] for _, body in server.asked[3:]]
    assert asked == [[f"Question {n}" for n in range(4)], ["Question 2", "Question 3"]]
    assert page.locator(".forgotten").count() == 4 and len(words_of(page)) == 8
    server.refusals = [(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})] * 9
    say(page, "Question 4")
    page.get_by_role("alert").filter(has_text="too long").wait_for()


def test_a_phone_needs_no_sideways_scrolling(server: Server, visit: Callable[..., Any]) -> None:
    server.pieces = ["w" * 300, "\n" + " x" * 200]
    for chat in (True, False):
        server.chat = chat
        page = visit(server.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
        page.get_by_role("button", name="Settings").click()
        page.locator("#text").fill("y" * 100)
        page.locator("#send").click()
        done(page)
        width = "document.documentElement.scrollWidth"
        assert page.evaluate(width) == 360 and page.evaluate("document.getElementById('log').scrollWidth") <= 360
        sizes = page.evaluate("[...document.querySelectorAll('button')].map(b => b.getBoundingClientRect().height)")
        assert min(size for size in sizes if size) >= 32


def test_the_keyboard_alone_reaches_everything_and_shows_where_it_is(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    say(page, "Hi")
    done(page)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    reached = []
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate(outline) != "none", reached
    wanted = "system temperature top_p max_tokens seed defaults log Copy again text"
    assert reached == wanted.split()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "set" and not page.locator("#settings").is_visible()


def test_a_screen_reader_hears_an_answer_once_and_finds_names(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.evaluate(
        "window.heard = []; new MutationObserver(() => heard.push(document.getElementById('spoken').textContent))"
        ".observe(document.getElementById('spoken'), {childList: true})"
    )
    server.pieces = [f"{number} " for number in range(30)]
    say(page, "Count")
    done(page)
    assert page.evaluate("heard") == ["The model is writing.", "".join(server.pieces)]
    assert page.locator("main[aria-live], main [aria-live], [role=log]").count() == 0
    tree = page.locator("body").aria_snapshot()
    for part in (
        'main "Conversation"',
        "banner",
        "contentinfo",
        'textbox "Message"',
        'heading "You"',
        'heading "Model"',
    ):
        assert part in tree, tree


# The real server


class Reciter:
    """In the place of a model: it says ``ids`` from the beginning behind every prompt, one each ``pause_s``."""

    def __init__(self, decoder: Decoder) -> None:
        self.config, self.device, self.description = decoder.config, decoder.device, "a reciter"
        self.ids: list[int] = []
        self.pause_s = 0.0

    def slots(self, count: int, capacity: int) -> "RecitingSlots":
        return RecitingSlots(self, count, capacity)


class RecitingSlots:
    def __init__(self, reciter: Reciter, count: int, capacity: int) -> None:
        self.capacity = capacity
        self._reciter, self._lengths, self._said = reciter, [0] * count, [0] * count

    def length(self, slot: int) -> int:
        return self._lengths[slot]

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        for slot, prompt in zip(slots, prompts, strict=True):
            self._lengths[slot] += len(prompt)
            self._said[slot] = 0
        return self._next(slots)

    def decode(self, slots: Sequence[int], tokens_B: Tensor) -> Tensor:
        for slot in slots:
            self._lengths[slot] += 1
            self._said[slot] += 1
        time.sleep(self._reciter.pause_s)
        return self._next(slots)

    def verify(self, slot: int, ids: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def truncate(self, slot: int, length: int) -> None:
        self._lengths[slot] = length

    def copy(self, source: int, target: int) -> None:
        self._lengths[target] = self._lengths[source]

    def _next(self, slots: Sequence[int]) -> Tensor:
        ids = self._reciter.ids
        logits_BV = torch.full((len(slots), self._reciter.config.vocab_size), -1e4)
        for row, slot in enumerate(slots):
            logits_BV[row, ids[self._said[slot] % len(ids)]] = 0
        return logits_BV


def test_the_real_server_streams_stops_and_lets_no_script_in(
    engine: Engine, serving: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    reciter = Reciter(engine.decoder)
    served = serving(decoder=reciter)
    encode = engine.tokenizer.encode
    reciter.ids = [*encode("\n" + SCRIPT)[len(encode("\n")) :], engine.tokenizer.eos_id]  # as it stands behind a prompt
    page = visit(served.url)
    page.locator("h1", has_text="tiny").wait_for()
    say(page, "Hi")
    done(page)
    assert words_of(page) == ["user: Hi", f"model: {SCRIPT}"] and page.title() == "tiny · OpenELM"
    assert page.locator("#figures").inner_text().startswith(f"{len(reciter.ids)} tokens")
    page.get_by_role("button", name="New").click()
    reciter.ids, reciter.pause_s = encode("after "), 0.05
    say(page, "Go on")
    page.locator("article:last-child", has_text="after after").wait_for()
    page.keyboard.press("Escape")
    done(page)
    assert served.idle(2)
    [question, answer] = words_of(page)
    assert question == "user: Go on" and 2 <= answer.count("after") < 30
    page.reload()
    page.locator("h1", has_text="tiny").wait_for()
    assert words_of(page) == [question, answer]


def test_the_real_servers_answers_are_the_engines(served: Any, engine: Engine, visit: Callable[..., Any]) -> None:
    page = visit(served.url, refused=True)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens at most").fill("12")
    say(page, "Where is the </s> river?")
    done(page)
    turns = [{"role": "user", "content": "Where is the </s> river?"}]
    [expected] = engine.generate([encode_chat(engine.tokenizer, turns, add_generation_prompt=True)[0]], 12)
    assert words_of(page)[1] == f"model: {expected.text}"
    assert page.locator("#figures").inner_text().endswith(" · cut off at 12")
    long = [f"{number} {'under the mountain ' * 6}" for number in range(4)]
    for text in long:
        say(page, text)
        done(page)
    assert len(words_of(page)) == 10 and page.locator(".forgotten").count() >= 2
    say(page, "under the mountain " * 90)
    page.get_by_role("alert").filter(has_text="128").wait_for()


def test_the_real_server_asks_for_its_key_and_tells_a_base_model(
    engine: Engine, serving: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    page = visit(serving(template=False, keys=("sesame",)).url, refused=True)
    page.get_by_role("textbox", name="API key").fill("sesame")
    page.keyboard.press("Enter")
    page.locator("body.text").wait_for()
    text = page.get_by_label("Text", exact=True)
    text.fill("After the night ")
    text.press("Control+Enter")
    done(page)
    assert text.input_value().startswith("After the night ") and len(text.input_value()) > 20
