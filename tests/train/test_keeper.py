"""Checkpoints of runs that are killed, that find no room, that write beside training: whole, and the same bits."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openelm import cli
from openelm.train.checkpoint import Checkpoints, verify

PROC = Path("/proc")
needs_proc = pytest.mark.skipif(not PROC.is_dir(), reason="looks for processes in /proc")


def _quick(arguments: list[str], env: dict[str, str], log: str) -> None:
    """``openelm ARGUMENTS``, with neither the roof measured nor the report drawn: more of the time is training."""
    import openelm.report.page as page
    import openelm.train.pretrain as pretrain
    from openelm.cli import main

    os.environ.update(env)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    pretrain.gemm_flops_per_s = lambda *_, **__: 1e12
    page.write_report = lambda run: run / "report" / "index.html"
    main(arguments)


@pytest.fixture
def quick(tmp_path) -> Iterator[Callable[..., Any]]:
    """Start ``openelm ARGUMENTS`` in a process of its own, which says what it says in ``tmp_path/log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openelm.train.pretrain", "openelm.commands.pretrain", "openelm.report.page"])
    started: list[Any] = []

    def start(arguments: list[str], env: dict[str, str] | None = None) -> Any:
        process = context.Process(target=_quick, args=(arguments, env or {}, str(tmp_path / "log")))
        process.start()
        started.append(process)
        return process

    start(["--version"]).join()  # the server of processes has its imports behind it
    yield start
    for process in started:
        process.kill()
        process.join()


def entries(run: Path) -> list[dict[str, Any]]:
    """All metrics but the times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in found]


def contents(run: Path) -> dict[str, bytes]:
    """Every file of models and checkpoints, but what says of which settings it came."""
    files = (file for name in ("model", "model-last", "checkpoints") for file in (run / name).rglob("*"))
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


def newest(run: Path) -> int:
    """The step of the newest checkpoint, which is whole; 0 where there is none yet."""
    checkpoints = Checkpoints(run / "checkpoints", keep_last=1)
    steps = checkpoints.steps()
    if steps:
        verify(checkpoints.path(steps[-1]))
    return steps[-1] if steps else 0


def children(pid: int) -> list[int]:
    found = []
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            pass  # it has ended meanwhile
    return found


def alive(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_until_done(start: Callable[[bool], list[Any]], run: Path, longest_s: float, draw: random.Random) -> int:
    """Start and kill at random instants until a start comes to its end; how many were killed.

    After each kill the newest checkpoint must be whole, and none may have been lost; no process may be left.
    """
    killed = reached = 0
    while True:
        processes = start((run / "config.yaml").is_file())
        deadline = time.monotonic() + draw.uniform(0.0, longest_s)
        while time.monotonic() < deadline and any(p.is_alive() for p in processes):
            time.sleep(0.002)
        left = [child for process in processes for child in children(process.pid)] if PROC.is_dir() else []
        if deadline > time.monotonic() and all(process.exitcode == 0 for process in processes):
            return killed
        for process in draw.sample(processes, len(processes)):
            process.kill()
        for process in processes:
            process.join()
        if all(process.exitcode == 0 for process in processes):
            return killed
        assert all(process.exitcode in (0, -signal.SIGKILL) for process in processes), "it ended by itself"
        killed += 1
        found = newest(run)
        assert found >= reached, "a checkpoint was lost"
        reached = found
        gone_s = time.monotonic() + 3
        while any(map(alive, left)):
            assert time.monotonic() < gone_s, "a worker outlived its run"
            time.sleep(0.02)
        longest_s *= 1.01  # a run that needs longer than most starts live ends all the same


FORMS = [{"async_checkpoints": True, "workers": 0}, {"async_checkpoints": False, "workers": 0}]
FORMS += [{"async_checkpoints": asynchronous, "workers": 2} for asynchronous in (True, False)]


@pytest.mark.parametrize(
    "kills",
    [
        2,
        pytest.param(300, marks=pytest.mark.slow(reason="three hundred starts of a run, ten minutes")),
    ],
)
def test_whenever_a_run_is_killed_its_newest_checkpoint_is_whole_and_the_end_is_the_same(
    recipe, write_recipe, tmp_path, quick, kills, record_property
):
    """Saves after each step, beside the training or not, data made in a thread or in processes: one run after another."""
    recipe["train"] |= {"steps": 12 if kills < 10 else 60, "validate_every": 5, "ema_decay": 0.9, "keep_last": 3}
    recipe["train"] |= {"sample_every": 20, "checkpoint_every": 1}
    start_s = time.perf_counter()
    alone = quick(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "alone")])
    alone.join()
    longest_s = time.perf_counter() - start_s
    assert alone.exitcode == 0
    expected = entries(tmp_path / "alone"), contents(tmp_path / "alone")
    draw, killed, runs = random.Random(kills), 0, 0
    while killed < kills or runs < 2:
        form = FORMS[runs % len(FORMS)]
        run = tmp_path / f"run{runs}"
        command = ["pretrain", write_recipe(recipe), "--run", str(run), f"data.workers={form['workers']}"]
        command.append(f"train.async_checkpoints={form['async_checkpoints']}")
        killed += kill_until_done(
            lambda resume, command=command: [quick([*command, "--resume"] if resume else command)],
            run,
            longest_s * (1.0 if runs % 2 else 0.7),
            draw,
        )
        assert (entries(run), contents(run)) == expected, form
        assert hidden(tmp_path) == [], "no draft is left behind"
        runs += 1
    record_property("kills", killed)
    print(f"{killed} kills in {runs} runs, {time.perf_counter() - start_s:.0f} s")
