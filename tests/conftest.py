"""What several tests share: golden figures, a small text with its tokenizer, and recipes that train in a second."""

import json
import multiprocessing
import os
import random
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from loopback_hub import hub  # noqa: F401 (a fixture)

pytest.register_assert_rewrite("promises")
# One thread, here and in the processes that tests start: the same bits and steady times on any machine.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
WORDS = """
    after all another before begin between chapter children close country cross earth enough every father follow
    garden group head house idea important island kind large later learn letter light little long mountain mother
    never night north often open other paper people place plant point question quick quiet really right river
    school second sentence seven short small something song spell still story summer table their thing think
    three through tree under until very voice walk watch water white winter without word world write young
"""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden figures and data beside the checkout; tests that need it skip where it is not."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder `shared` beside the checkout is not there")
    return folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """``golden("tiny")``: figures made once with CoreNet in fp32 on a CPU."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_tiny() -> dict[str, torch.Tensor]:
    """Tokens, targets and CoreNet's logits of the tiny model."""
    with np.load(GOLDEN / "tiny.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="session")
def golden_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """Weights that only a tensor's name, shape and a seed decide, as those behind the golden figures.

    PCG64 seeded by (CRC-32 of the name, seed) draws normal fp32 numbers: a matrix is them over the root of its
    columns, a gain one and a tenth of them.
    """

    def one(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        draw = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
        normal = draw.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            return torch.from_numpy(normal / np.float32(shape[-1] ** 0.5))
        return torch.from_numpy(np.float32(0.1) * normal + np.float32(1))

    def weights(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
        return {name: one(name, tuple(tensor.shape), seed) for name, tensor in model.state_dict().items()}

    return weights


def write_text(folder: Path, documents: int, seed: int) -> Path:
    """Text files of 300 to 2,400 characters of English-looking words, always the same for the same seed."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(documents):
        words = draw.choices(WORDS.split(), k=draw.randint(60, 400))
        lines = [" ".join(words[i : i + 11]).capitalize() + "." for i in range(0, len(words), 11)]
        (folder / f"{number:03}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Forty small documents."""
    return write_text(tmp_path_factory.mktemp("text") / "text", documents=40, seed=1)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, text_folder) -> Path:
    """A SentencePiece model with 400 pieces, of that text."""
    from openelm.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([file.read_text() for file in sorted(text_folder.iterdir())], path, 400, threads=1)
    return path


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory) -> Path:
    """A newcomer's folder after `make demo` (newcomer.py). Tests share it: work in a copy."""
    from newcomer import make

    return make(tmp_path_factory.mktemp("newcomer"))


@pytest.fixture
def recipe(text_folder, tokenizer_file, monkeypatch) -> dict[str, Any]:
    """A run of eight steps, under a second: two layers, four shards, rows of 32 that cut documents anywhere.

    The roof for MFU is not measured and the report not drawn: both take longer than such a run, and have tests.
    """
    monkeypatch.setattr("openelm.train.run.gemm_flops_per_s", lambda *_, **__: 1e12)
    monkeypatch.setattr("openelm.report.page.write_report", lambda run, *_: run / "report" / "index.html")
    return {
        "name": "tiny",
        "seed": 1,
        "model": {
            "model_dim": 32,
            "num_transformer_layers": 2,
            "head_dim": 16,
            "num_gqa_groups": 1,
            "ffn_dim_divisor": 16,
            "max_context_length": 64,
        },
        "tokenizer": {"path": str(tokenizer_file)},
        "data": {
            "sources": [{"name": "words", "path": str(text_folder)}],
            "row_length": 32,
            "min_tokens": 16,
            "shards": 4,
            "held_out": 0.1,
            "validation_tokens": 300,
        },
        "train": {
            "steps": 8,
            "global_batch": 4,
            "micro_batch": 2,
            "lr": 1e-2,
            "min_lr": 1e-3,
            "warmup_steps": 2,
            "dtype": "float32",
            "checkpoint_every": 2,
            "keep_last": 3,
            "average_last": 2,
            "validate_every": 3,
            "sample_every": 4,
            "sample_prompts": ["After "],
            "sample_tokens": 4,
        },
    }


@pytest.fixture
def write_recipe(tmp_path) -> Callable[[dict[str, Any]], str]:
    """Write a recipe under tmp_path; gives its path."""

    def write(data: dict[str, Any]) -> str:
        path = tmp_path / f"{data['name']}.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return str(path)

    return write


def _command(arguments: list[str], env: dict[str, str], log: str | None) -> None:
    """``openelm ARGUMENTS``, with neither the roof measured nor the report drawn: more of the time is training."""
    import openelm.report.page as page
    import openelm.train.run as training
    from openelm.cli import main

    os.environ.update(env)
    if log:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    training.gemm_flops_per_s = lambda *_, **__: 1e12
    page.write_report = lambda run, *_: run / "report" / "index.html"
    main(arguments)


@pytest.fixture
def spawn() -> Iterator[Callable[..., Any]]:
    """Start ``openelm ARGUMENTS`` in a process of its own, which can be killed and writes its words to ``log``."""
    # A server that has torch imported forks each process in milliseconds, and has no thread that a fork could break.
    context = multiprocessing.get_context("forkserver")
    parts = ["openelm.train.pretrain", "openelm.commands.pretrain", "openelm.report.page"]
    context.set_forkserver_preload([*parts, "openelm.tune.tuning", "openelm.commands.finetune", "peft"])
    started: list[Any] = []

    def start(arguments: list[str], env: dict[str, str] | None = None, log: Path | None = None) -> Any:
        process = context.Process(target=_command, args=(arguments, env or {}, str(log) if log else None))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def quick(spawn, tmp_path) -> Callable[..., Any]:
    """``spawn`` with ``tmp_path/log`` for a log."""

    def start(arguments: list[str], env: dict[str, str] | None = None, log: Path | None = None) -> Any:
        return spawn(arguments, env, log or tmp_path / "log")

    return start


@pytest.fixture
def start_ranks(spawn, tmp_path) -> Callable[..., list[Any]]:
    """Start ``openelm ARGUMENTS`` on some ranks, as torchrun would; each writes to ``tmp_path/rank_N.log``.

    ``node`` ranks count as one node.
    """

    def start(ranks: int, arguments: list[str], node: int | None = None) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"LOCAL_WORLD_SIZE": str(node or ranks), "OMP_NUM_THREADS": "1"}
        return [
            spawn(arguments, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % (node or ranks))}, log)
            for rank in range(ranks)
            for log in [tmp_path / f"rank_{rank}.log"]
        ]

    return start


@pytest.fixture
def run_ranks(start_ranks) -> Callable[..., list[int]]:
    """Start ranks and wait for them; their exit codes."""

    def run(ranks: int, arguments: list[str], node: int | None = None) -> list[int]:
        processes = start_ranks(ranks, arguments, node)
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]

    return run


@pytest.fixture
def largest_file() -> Callable[[int], Any]:
    """``with largest_file(1000)``: the system refuses longer files, the same path through the code as a full disk."""
    resource = pytest.importorskip("resource", reason="needs the limits of a POSIX system")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
