"""A small model behind the scheduler and behind HTTP."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.data.chat import CHAT_TEMPLATE
from openelm.data.tokenizer import Tokenizer
from openelm.infer.engine import Engine
from openelm.model.folder import save_model
from openelm.serve.server import bind, make_server, url
from openelm.serve.service import Service
from openelm.serve.settings import Settings
from openelm.serve.template import ChatTemplate
from small_models import make_varied

CONTEXT = 128


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory, tokenizer_file) -> Path:
    """A model folder with a chat template: three layers, no two alike, and a wider embedding than vocabulary."""
    model = make_varied(vocab_size=416, max_context_length=CONTEXT)
    tokenizer = Tokenizer.load(tokenizer_file)
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_model(model, folder, tokenizer=tokenizer, dtype=torch.float32)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def engine(served_folder) -> Engine:
    """It, on torch in fp32."""
    return Engine.load(served_folder, torch.float32, "cpu")


class Served:
    """A server on a loopback port, in a thread of this process."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._listening = bind("127.0.0.1", 0, keys=False)
        self._server = make_server(service)
        self.url = url(self._listening)
        self.address = self._listening.getsockname()[:2]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]})
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.005)

    def client(self, **options: Any) -> Any:
        """OpenAI's own client, which does not try again."""
        openai = pytest.importorskip("openai")
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def send_little(self) -> None:
        """Let the system keep little of what later clients do not read."""
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def idle(self, seconds: float = 10) -> bool:
        """Whether nothing runs any more, at the latest after some seconds."""
        scheduler, end_s = self.service.scheduler, time.monotonic() + seconds
        while time.monotonic() < end_s:
            if scheduler.running == scheduler.waiting == 0:
                return True
            time.sleep(0.005)
        return False

    def stop(self) -> None:
        """As after SIGTERM."""
        self._server.handle_exit(15, None)
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def serving(engine, served_folder) -> Iterator[Callable[..., Served]]:
    """``serving(decoder=..., guard=..., slots=..., ...)``: a new server; the rest are settings."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    started: list[Served] = []

    def start(decoder: Any = None, guard: Any = None, template: bool = True, **settings: Any) -> Served:
        chat = ChatTemplate.load(served_folder, engine.tokenizer) if template else None
        served = Engine(decoder, engine.tokenizer) if decoder else engine
        service = Service(served, Settings(**settings), name="tiny", template=chat, guard=guard)
        started.append(Served(service))
        return started[-1]

    yield start
    for served in started:
        served.stop()


@pytest.fixture(scope="session")
def served(serving) -> Served:
    """A server that tests share."""
    return serving()
