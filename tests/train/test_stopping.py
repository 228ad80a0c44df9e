"""A run that is asked to stop leaves with a checkpoint of its last step, soon, and goes on to the same bits."""

import json
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from openelm import cli
from openelm.train.checkpoint import Checkpoints, sha256, verify
from openelm.train.optim import Optimizer
from openelm.train.stopping import NAMES, Stopping

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of a POSIX system")
SIGNALS = [getattr(signal, name, 0) for name in NAMES]
STOPPED = 75


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A shell starts what it puts in the background with SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All metrics but the times, and the checksum of every model that the run wrote."""
    entries = [{key: value for key, value in entry.items() if key != "timing"} for entry in lines(run)]
    return entries, {name: sha256(run / name / "model.safetensors") for name in ("model", "model-last")}


def last_step(run: Path) -> int:
    return max(entry["step"] for entry in lines(run))


def recorded(run: Path) -> int:
    """The last step that a running process has recorded; 0 before the first."""
    file = run / "metrics.jsonl"
    whole = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return max((json.loads(line)["step"] for line in whole), default=0)


def newest(run: Path) -> int:
    """The step of the newest checkpoint, which is whole."""
    checkpoints = Checkpoints(run / "checkpoints", keep_last=1)
    step = checkpoints.steps()[-1]
    verify(checkpoints.path(step))
    return step


def wait_for(there, process) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.005)


# At any moment


@pytest.fixture
def longer_steps(recipe) -> dict[str, Any]:
    """Steps that take as long as a save."""
    recipe["train"] |= {"steps": 16, "global_batch": 32, "checkpoint_every": 3, "validate_every": 8, "keep_last": 4}
    return recipe


def costs(run: Path) -> tuple[float, float]:
    """Seconds of the longest step and of the longest save (with validation), of a run that waits for its saves."""
    found = [entry["timing"] for entry in lines(run) if entry["kind"] == "train"]
    between = [b["elapsed_s"] - a["elapsed_s"] - b["step_s"] for a, b in pairwise(found)]
    return max(entry["step_s"] for entry in found), max(between)


@pytest.mark.parametrize(
    "moments",
    [3, pytest.param(50, marks=pytest.mark.slow(reason="a hundred starts of a run, four minutes"))],
)
def test_a_signal_at_any_moment_is_soon_followed_by_a_checkpoint_and_the_end_is_the_same(
    longer_steps, write_recipe, tmp_path, quick, moments
):
    """From the start of the process to its end; each signal; saves beside the training or not; rows by processes too.

    Durable: when the folder of the checkpoint got its name, by the file system's clock. Compared with the longest step
    and the longest save of the run left alone.
    """
    path, alone = write_recipe(longer_steps), tmp_path / "alone"
    start_s = time.perf_counter()
    process = quick(["pretrain", path, "--run", str(alone)])
    process.join()
    assert process.exitcode == 0
    step_s, save_s = costs(alone)
    before_s = (time.perf_counter() - start_s) / 3  # as long as it takes to begin, about
    draw = random.Random(moments)
    durable: list[float] = []
    ended: list[float] = []
    codes: list[int] = []
    for moment in range(moments):
        run, sent = tmp_path / f"run{moment}", SIGNALS[moment % 3]
        command = ["pretrain", path, "--run", str(run), "--auto-resume", f"data.workers={2 * (moment // 2 % 2)}"]
        command.append(f"train.async_checkpoints={moment % 2 == 0}")
        process = quick(command)
        if moment % 5 == 0:  # before the first step, often
            process.join(draw.uniform(0, before_s))
        else:  # in a step or what follows it; the last one is followed by averaging and writing
            step = 16 if moment % 5 == 4 else draw.randint(1, 15)
            while process.is_alive() and recorded(run) < step:
                time.sleep(0.002)
            process.join(draw.uniform(0, before_s if step == 16 else step_s))
        began = (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0
        sent_s = time.time()
        if process.is_alive():
            os.kill(process.pid, sent)
        process.join(60)
        codes.append(process.exitcode)
        # Before the training and behind it, a signal does what it does to any program.
        assert process.exitcode in (0, STOPPED, 130 if sent == signal.SIGINT else -sent), (tmp_path / "log").read_text()
        if process.exitcode == STOPPED:
            ended.append(time.time() - sent_s)
            assert newest(run) == last_step(run)
            folder = run / "checkpoints" / f"step_{newest(run):08}"
            if began:
                durable.append(folder.stat().st_ctime - sent_s)
        again = quick(command)
        again.join()
        assert again.exitcode == 0, (tmp_path / "log").read_text()
        assert outcome(run) == outcome(alone), (moment, codes[-1])
        assert list(tmp_path.rglob(".*")) == [], "no draft is left behind"
    print(f"\nstep {step_s:.3f} s, save {save_s:.3f} s; exit codes {sorted((c, codes.count(c)) for c in set(codes))}")
    for name, found in (("checkpoint", durable), ("exit", ended)):
        if found:
            print(f"signal to {name}: median {statistics.median(found):.3f}, longest {max(found):.3f} s ({len(found)})")
    # A save may be under way already; and the machine may be busier than it was.
    assert max(durable, default=0) < 2 * (step_s + 2 * save_s) + 1.0


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("at", [4, 8])
def test_a_signal_in_the_middle_of_a_save_is_followed_by_another_one_step_later(
    recipe, write_recipe, tmp_path, monkeypatch, beside, at
):
    """At the last step there is none to come: the run ends as if nothing had been."""
    recipe["train"]["async_checkpoints"] = beside
    command = ["pretrain", write_recipe(recipe), "--run"]
    assert cli.run([*command, str(tmp_path / "alone")]) == 0
    run, write, sent = tmp_path / "run", Checkpoints.write_part, threading.Event()

    def interrupted(self: Checkpoints, config: Any, part: Any, *more: Any) -> None:
        if part.step == at and not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        write(self, config, part, *more)

    monkeypatch.setattr(Checkpoints, "write_part", interrupted)
    handlers = [signal.signal(number, lambda *_: None) for number in SIGNALS]  # if it comes behind the training
    try:
        code = cli.run([*command, str(run)])
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    if at == 8:
        assert code == 0
    else:
        assert code == STOPPED
        assert at < newest(run) == last_step(run) <= (8 if beside else at + 1)
        assert cli.run([*command, str(run), "--resume"]) == 0
    assert outcome(run) == outcome(tmp_path / "alone")
    assert list(tmp_path.rglob(".*")) == []


def at_step(monkeypatch, number: int, act: Callable[[], None]) -> None:
    """Do something in the middle of the ``number``-th step."""
    update, count = Optimizer.update, 0

    def acting(self: Optimizer, *arguments: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        update(self, *arguments, **more)
        if count == number:
            act()

    monkeypatch.setattr(Optimizer, "update", acting)


def test_a_stop_between_two_checkpoints_changes_nothing_in_the_average(recipe, write_recipe, tmp_path, monkeypatch):
    recipe["train"] |= {"checkpoint_every": 3, "average_last": 3}
    command = ["pretrain", write_recipe(recipe), "--run"]
    assert cli.run([*command, str(tmp_path / "alone")]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        assert cli.run([*command, str(tmp_path / "run")]) == STOPPED
    assert newest(tmp_path / "run") == 5
    assert cli.run([*command, str(tmp_path / "run"), "--resume"]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


@pytest.mark.parametrize("number", SIGNALS[::2])
def test_asked_once_more_while_the_last_checkpoint_is_written_it_is_written_all_the_same(
    recipe, write_recipe, tmp_path, quick, number
):
    """Schedulers repeat themselves. 40 MB of model, so that the writing beside the training takes its time."""
    recipe["train"] |= {"steps": 1000, "checkpoint_every": 1000, "validate_every": 1000, "async_checkpoints": True}
    recipe["model"]["vocab_size"] = 100_000
    run = tmp_path / "run"
    process = quick(["pretrain", write_recipe(recipe), "--run", str(run), "train.sample_prompts=[]"])
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(lines(run)) > 1, process)
    os.kill(process.pid, number)
    wait_for(lambda: list(run.glob("checkpoints/.*")), process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == STOPPED
    assert newest(run) == last_step(run)


@pytest.mark.parametrize("name", NAMES)
def test_each_signal_stops_behind_its_step_with_the_documented_code(
    recipe, write_recipe, tmp_path, monkeypatch, capfd, name
):
    command = ["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(getattr(signal, name)))
        assert cli.run(command) == STOPPED
    error = capfd.readouterr().err
    assert f"{name}: stopping behind this step, with a checkpoint" in error
    assert f"{name}: stopped after step 3 of 8; the checkpoint is written: go on with the same command" in error
    assert newest(tmp_path / "run") == last_step(tmp_path / "run") == 3
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("beside", [True, False])
def test_a_second_interrupt_leaves_at_once_and_the_run_goes_on_from_the_checkpoint_before(
    recipe, write_recipe, tmp_path, monkeypatch, capsys, beside
):
    recipe["train"]["async_checkpoints"] = beside
    command = ["pretrain", write_recipe(recipe), "--run"]
    assert cli.run([*command, str(tmp_path / "alone")]) == 0

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it has not left")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, twice)
        assert cli.run([*command, str(run)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert last_step(run) == 4 and newest(run) <= 4
    assert cli.run([*command, str(run), "--resume"]) == 0
    assert outcome(run) == outcome(tmp_path / "alone")
    assert list(tmp_path.rglob(".*")) == []


def test_an_interrupt_while_the_models_are_written_is_harmless(recipe, write_recipe, tmp_path, monkeypatch):
    command = ["pretrain", write_recipe(recipe), "--run"]
    assert cli.run([*command, str(tmp_path / "alone")]) == 0
    replace, names = os.rename, []

    def interrupted(source: Any, target: Any, **more: Any) -> None:
        names.append(Path(target).name)
        if names.count("model-last") == 1 and names[-1] == "model-last":
            signal.raise_signal(signal.SIGINT)
        replace(source, target, **more)

    monkeypatch.setattr(os, "rename", interrupted)
    assert cli.run([*command, str(tmp_path / "run")]) == 130
    assert "model-last" in names and not (tmp_path / "run" / "model").exists()
    assert cli.run([*command, str(tmp_path / "run"), "--resume"]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")
    assert list(tmp_path.rglob(".*")) == []


def test_an_interrupt_before_the_training_leaves_nothing(recipe, write_recipe, tmp_path, monkeypatch):
    for where in ("openelm.train.run_folder.environment", "openelm.train.parts.held_out"):
        with monkeypatch.context() as patch:
            patch.setattr(where, lambda *_: signal.raise_signal(signal.SIGINT))
            command = ["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run"), "--auto-resume"]
            assert cli.run(command) == 130
        assert list(tmp_path.rglob(".*")) == []
    assert cli.run(command) == 0


def test_whoever_reads_what_is_said_may_be_gone(recipe, write_recipe, tmp_path, quick):
    """`openelm pretrain … 2>&1 | tee log`: Ctrl-C ends tee at once, and what is then said goes nowhere."""
    recipe["train"] |= {"steps": 20_000, "checkpoint_every": 20_000, "validate_every": 20_000, "sample_every": 20_000}
    run, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    process = quick(["pretrain", write_recipe(recipe), "--run", str(run)], log=pipe)
    with pipe.open("rb", buffering=0) as reader:
        assert reader.read(1)
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(lines(run)) > 3, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert newest(run) == last_step(run)


# What listens


def test_handlers_come_back_as_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stopping() as stopping:
        assert not stopping()
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_handler_that_python_did_not_set_is_no_obstacle(monkeypatch):
    """A library in C may have set it: Python then knows of none."""
    before, install = signal.getsignal(signal.SIGUSR1), signal.signal
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", lambda n, h: (install(n, h), None)[1] if n == signal.SIGUSR1 else install(n, h))
        with Stopping():
            pass
    assert install(signal.SIGUSR1, before) == signal.SIG_DFL


def test_the_first_signal_is_named_and_others_than_a_second_interrupt_change_nothing(capfd):
    with Stopping() as stopping:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert stopping() and stopping.name == "SIGUSR1"
        assert capfd.readouterr().err.count("stopping behind this step") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_nothing_is_listened_to_and_nothing_breaks():
    found: list[Any] = []

    def work() -> None:
        with Stopping() as stopping:
            found.append((stopping(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]
