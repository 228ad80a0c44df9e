"""Checkpoints of runs that are killed, that find no room, that write beside training: whole, and the same bits."""

import json
import os
import random
import shutil
import signal
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openelm import cli
from openelm.data.loader import Step
from openelm.data.stream_state import Snapshot
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, initial_weights
from openelm.train import checkpoint
from openelm.train.checkpoint import Checkpoints, sha256, verify
from openelm.train.form import Form
from openelm.train.guard import Guard
from openelm.train.keeper import Keeper
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, build

PROC = Path("/proc")
CONFIG = ModelConfig(
    model_dim=32, num_transformer_layers=1, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=8
)
needs_proc = pytest.mark.skipif(not PROC.is_dir(), reason="looks for processes in /proc")


def entries(run: Path) -> list[dict[str, Any]]:
    """All metrics but the times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in found]


def contents(run: Path) -> dict[str, str]:
    """Every file of models and checkpoints, with the checksum of its bytes."""
    files = (file for name in ("model", "model-last", "model-ema", "checkpoints") for file in (run / name).rglob("*"))
    return {str(file.relative_to(run)): sha256(file) for file in files if file.is_file()}


def assert_same(run: Path, expected: tuple[list[dict[str, Any]], dict[str, str]]) -> None:
    """Metrics and files are those of another run."""
    assert entries(run) == expected[0]
    found = contents(run)
    assert {name for name in found.keys() | expected[1].keys() if found.get(name) != expected[1].get(name)} == set()


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
        with suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
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
    """Saves after each step, beside the training or not, rows by threads and by processes: one run after another."""
    recipe["train"] |= {"steps": 12 if kills < 10 else 120, "validate_every": 5, "ema_decay": 0.9, "keep_last": 3}
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
            longest_s * (0.8 if kills < 10 else 0.5),
            draw,
        )
        assert_same(run, expected)
        assert hidden(tmp_path) == [], "no draft is left behind"
        runs += 1
    record_property("kills", killed)
    print(f"{killed} kills in {runs} runs, {time.perf_counter() - start_s:.0f} s")


@pytest.mark.parametrize(
    "kills",
    [1, pytest.param(20, marks=pytest.mark.slow(reason="twenty starts of two processes, two minutes"))],
)
def test_two_ranks_killed_at_random_instants_end_with_the_bits_of_two_left_alone(
    recipe, write_recipe, tmp_path, quick, kills
):
    """Sums of two numbers are the same in either order: the same number of ranks gives the same bits."""
    recipe["train"] |= {"steps": 12 if kills < 10 else 40, "validate_every": 5, "ema_decay": 0.9, "keep_last": 3}
    recipe["train"] |= {"checkpoint_every": 1, "sharding": "full", "sample_prompts": [], "timeout_s": 60}

    def start(command: list[str]) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [quick(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]

    start_s = time.perf_counter()
    alone = start(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "alone")])
    for process in alone:
        process.join()
    longest_s = time.perf_counter() - start_s
    assert [process.exitcode for process in alone] == [0, 0], (tmp_path / "log").read_text()
    expected = entries(tmp_path / "alone"), contents(tmp_path / "alone")
    draw, killed, runs = random.Random(kills), 0, 0
    while killed < kills:
        run = tmp_path / f"run{runs}"
        command = ["pretrain", write_recipe(recipe), "--run", str(run), f"train.async_checkpoints={runs % 2 == 0}"]
        killed += kill_until_done(
            lambda resume, command=command: start([*command, "--resume"] if resume else command),
            run,
            longest_s,
            draw,
        )
        assert_same(run, expected)
        assert hidden(tmp_path) == [], "no draft is left behind"
        runs += 1
    print(f"{killed} kills in {runs} runs, {time.perf_counter() - start_s:.0f} s")


def test_saving_beside_the_training_writes_the_same_files_with_the_same_bits(recipe, write_recipe, tmp_path):
    recipe["train"] |= {"steps": 7, "checkpoint_every": 2, "ema_decay": 0.9, "keep_last": 5}
    for beside in (True, False):
        command = ["pretrain", write_recipe(recipe), "--run", str(tmp_path / str(beside))]
        assert cli.run([*command, f"train.async_checkpoints={beside}"]) == 0
    beside, waited = tmp_path / "True", tmp_path / "False"
    assert sorted(p.relative_to(beside) for p in beside.rglob("*")) == sorted(
        p.relative_to(waited) for p in waited.rglob("*")
    )
    assert contents(beside) == contents(waited)
    assert len(contents(beside)) > 4 * 6
    assert entries(beside) == entries(waited)


def test_an_average_kept_during_training_goes_on_where_it_was(recipe, write_recipe, tmp_path):
    """Worked out here from the weights behind every step, and the same whether the run went on from a checkpoint."""
    recipe["train"] |= {"steps": 6, "checkpoint_every": 1, "ema_decay": 0.5, "keep_last": 6, "average_last": 0}
    run = tmp_path / "run"
    command = ["pretrain", write_recipe(recipe), "--run", str(run)]
    assert cli.run(command) == 0
    expected = contents(run)

    def tensors(step: int, stem: str) -> dict[str, Any]:
        return load_file(run / "checkpoints" / f"step_{step:08}" / f"{stem}.safetensors")

    name = "layers.1.ffn.proj_2.weight"
    average = tensors(1, "optimizer")[f"ema.{name}"]
    for step in range(2, 7):
        average = average + 0.5 * (tensors(step, "model")[f"transformer.{name}"] - average)
        assert average.allclose(tensors(step, "optimizer")[f"ema.{name}"], rtol=1e-6, atol=1e-8)
    assert cli.run([*command, "--resume-step", "3"]) == 0
    assert contents(run) == expected


@pytest.mark.parametrize("stops", [[14], [13, 14], [4, 7, 14], [16, 17], [8], [19]])
def test_what_is_kept_does_not_tell_how_often_the_run_was_stopped(tmp_path, stops):
    """A checkpoint every third step, one at the last, and one where the run was stopped."""

    def kept(folder: Path, steps: set[int]) -> list[int]:
        checkpoints = checkpoint.Checkpoints(folder, keep_last=3, milestone_every=9, every=3)
        for step in sorted(steps):
            checkpoints.save(Form(CONFIG), checkpoint.Checkpoint(step, weights, {}, {}))
            assert checkpoints.steps()[-1] == step, "the newest stays until the next one is there"
        return checkpoints.steps()

    weights = OpenELM(CONFIG).state_dict()
    due = {*range(3, 20, 3), 20}
    assert kept(tmp_path / "stopped", due | set(stops)) == kept(tmp_path / "alone", due) == [9, 15, 18, 20]


def test_a_run_killed_before_it_deleted_the_oldest_checkpoint_deletes_it_when_it_goes_on(
    recipe, write_recipe, tmp_path
):
    run = tmp_path / "run"
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run)]) == 0
    expected = entries(run), contents(run)
    shutil.copytree(run / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000002")
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run), "--resume"]) == 0
    assert_same(run, expected)


@pytest.mark.parametrize(
    "beside",
    [True, False],
)
def test_an_error_does_not_cost_the_checkpoint_that_is_being_written(
    recipe, write_recipe, tmp_path, monkeypatch, capsys, beside
):
    recipe["train"] |= {"checkpoint_every": 4, "async_checkpoints": beside}
    write, squares, steps = checkpoint.Checkpoints.write_part, Optimizer.squares, []

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    def infinite_at_5(self: Optimizer) -> Any:
        steps.append(len(steps) + 1)
        return squares(self) * (float("inf") if steps[-1] == 5 else 1)

    monkeypatch.setattr(checkpoint.Checkpoints, "write_part", slowly)
    monkeypatch.setattr(Optimizer, "squares", infinite_at_5)
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 2
    assert "step 5: loss" in capsys.readouterr().err
    assert newest(tmp_path / "run") == 4
    assert hidden(tmp_path) == []


# A disk that fills up


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors", "config.json"])
def test_no_room_for_a_checkpoint_ends_the_run_by_name_and_it_goes_on_when_there_is(
    recipe, write_recipe, tmp_path, capsys, monkeypatch, beside, name, largest_file
):
    """Whichever file is the first that finds no room; the older checkpoints stay whole."""
    recipe["train"] |= {"checkpoint_every": 2, "average_last": 0, "validate_every": 100, "sample_prompts": []}
    recipe["train"] |= {"async_checkpoints": beside, "log_every": 8}
    run = tmp_path / "run"
    command = ["pretrain", write_recipe(recipe), "--run", str(run)]
    assert cli.run(command) == 0
    expected = entries(run), contents(run)
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08}")
    shutil.rmtree(run / "model")
    room = (run / "checkpoints" / "step_00000004" / name).stat().st_size - 1
    write = checkpoint.Checkpoints.write_part

    def fills_up(*arguments: Any) -> None:  # only then: metrics.jsonl may be longer than the smallest file
        with largest_file(room):
            write(*arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "write_part", fills_up)
        assert cli.run([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"error: no space left for {run / 'checkpoints' / 'step_00000006'}" in error
    assert newest(run) == 4
    assert hidden(tmp_path) == []
    assert cli.run([*command, "--resume"]) == 0
    assert_same(run, expected)


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("beside", [True, False])
def test_no_room_on_one_rank_ends_all_with_its_words_and_nothing_is_left(
    recipe, write_recipe, start_ranks, tmp_path, rank, beside
):
    """One rank's disk is full: the others, who are still writing there, must not end with words of their own."""
    resource = pytest.importorskip("resource", reason="needs the limits of a POSIX system")
    recipe["train"] |= {"steps": 5000, "checkpoint_every": 2, "average_last": 0, "validate_every": 10_000}
    recipe["train"] |= {"sample_prompts": [], "async_checkpoints": beside, "sharding": "full", "timeout_s": 30}
    run = tmp_path / "run"
    command = ["pretrain", write_recipe(recipe), "--run", str(run), "train.log_every=5000"]
    processes = start_ranks(2, command)
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/step_*")):
        assert time.monotonic() < deadline and all(p.is_alive() for p in processes)
        time.sleep(0.02)
    resource.prlimit(processes[rank].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    for process in processes:
        process.join(60)
    said = [(tmp_path / f"rank_{number}.log").read_text() for number in range(2)]
    assert [process.exitcode for process in processes] == [2, 2], said
    assert f"error: no space left for {run / 'checkpoints'}/step_" in said[rank]
    assert "error:" not in said[1 - rank] and "Traceback" not in "".join(said)
    assert newest(run) > 0
    assert hidden(tmp_path) == []


@pytest.mark.slow(reason="ten checkpoints of 1.2 GB; its figure is good on a quiet machine only")
def test_a_save_beside_the_training_stalls_it_for_less_than_a_tenth_of_one_that_is_waited_for(tmp_path):
    world, geometry = World(), ModelConfig.from_name("100M")
    model = build(geometry, world, lambda model: initial_weights(model, 0), dtype=torch.float32)
    optimizer = Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.update(1e-3)
    guard = Guard(world.device, stop=True, skip_spikes=False, deviations=6.0)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    keepers = [
        Keeper(
            checkpoints, world, Form(geometry), optimizer, guard, tokenizer="", attempt=str(beside), asynchronous=beside
        )
        for beside in (False, True)
    ]
    stalls: list[list[float]] = [[], []]
    data = Step([], snapshot=lambda: Snapshot(0, 0, ()))
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        for turn in range(5):
            for beside, keeper in enumerate(keepers):
                start_s = time.perf_counter()
                keeper.save(2 * turn + beside + 1, 0, data)
                stalls[beside].append(time.perf_counter() - start_s)
                keeper.finish()
    finally:
        torch.set_num_threads(1)
    # The first save of each gets its memory.
    waited_s, beside_s = (statistics.median(found[1:]) for found in stalls)
    print(f"waited for {waited_s:.2f} s, beside {beside_s:.3f} s: {beside_s / waited_s:.1%}")
    assert beside_s < 0.1 * waited_s
