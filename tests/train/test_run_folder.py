"""A run folder belongs to one run at a time, and only the run that it was made by goes on in it."""

import errno
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import cli
from openelm.config import RunConfig, resolve
from openelm.data.tokenizer import Tokenizer, train_tokenizer
from openelm.errors import UserError
from openelm.train import run_folder
from openelm.train.checkpoint import sha256
from openelm.train.run_folder import check_start, locked


@pytest.fixture
def four_steps(recipe) -> dict[str, Any]:
    recipe["train"] |= {"steps": 4, "validate_every": 4, "sample_prompts": [], "average_last": 0}
    return recipe


@pytest.fixture
def finished(four_steps, write_recipe, tmp_path) -> tuple[list[str], Path]:
    """A run that has come to its end, and the command that goes on with it."""
    command = ["pretrain", write_recipe(four_steps), "--run", str(tmp_path / "run")]
    assert cli.run(command) == 0
    return [*command, "--resume"], tmp_path / "run"


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


def bits(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def wait_for(there, process) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)


# One run at a time


def test_a_second_process_is_refused_naming_the_first_which_goes_on_undisturbed(
    recipe, write_recipe, tmp_path, spawn, capsys
):
    recipe["train"] |= {"steps": 60, "checkpoint_every": 20, "average_last": 0}
    command, run = ["pretrain", write_recipe(recipe), "--run"], tmp_path / "run"
    first = spawn([*command, str(run)])
    wait_for(lambda: (run / "metrics.jsonl").is_file(), first)
    for more in ([], ["--resume"], ["--auto-resume"], ["--overwrite"]):
        assert cli.run([*command, str(run), *more]) == 2
        error = capsys.readouterr().err
        assert f"{run} is in use by process {first.pid} on {socket.gethostname()}" in error
        assert "choose another --run" in error
    assert first.is_alive(), "it ended before all were refused: give it more steps"
    first.join()
    assert first.exitcode == 0
    assert hidden(tmp_path) == []
    assert cli.run([*command, str(tmp_path / "alone")]) == 0
    assert bits(run) == bits(tmp_path / "alone")


def test_the_lock_of_a_killed_process_hinders_nobody(recipe, write_recipe, tmp_path, spawn):
    recipe["train"] |= {"steps": 2000, "checkpoint_every": 1}
    command, run = ["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")], tmp_path / "run"
    process = spawn(command)
    wait_for(lambda: list(run.glob("checkpoints/step_*")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / ".run.lock").is_file()
    with locked(run):
        assert f"process {os.getpid()} " in (tmp_path / ".run.lock").read_text()
    assert not (tmp_path / ".run.lock").exists()


@pytest.mark.parametrize("spelling", ["relative", "slash", "dots", "link", "link to its parent", "here"])
def test_another_spelling_of_the_folder_is_the_same_lock(
    four_steps, write_recipe, tmp_path, monkeypatch, capsys, spelling
):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "parent").symlink_to(tmp_path / "runs")
    monkeypatch.chdir(run if spelling == "here" else tmp_path)
    spelt = {
        "relative": "runs/a",
        "slash": f"{run}/",
        "dots": f"{tmp_path}/runs/../runs/./a",
        "link": f"{tmp_path}/link",
        "link to its parent": "parent/a",
        "here": ".",
    }[spelling]
    with locked(run):
        assert cli.run(["pretrain", write_recipe(four_steps), "--run", spelt]) == 2
    assert "is in use by process" in capsys.readouterr().err


def test_no_lock_is_left_however_a_run_ends(finished, capsys):
    command, run = finished
    assert hidden(run.parent) == []
    assert cli.run([*command, "train.lr=1"]) == 2  # refused
    assert hidden(run.parent) == []


def test_a_lock_that_its_holder_deletes_while_another_waits_for_it_is_taken_anew(tmp_path, monkeypatch):
    take, deleted = run_folder._take, []

    def late(handle: int) -> None:
        if not deleted:
            deleted.append((tmp_path / ".run.lock").unlink())
        take(handle)

    monkeypatch.setattr(run_folder, "_take", late)
    with locked(tmp_path / "run"), pytest.raises(UserError, match="in use by process"), locked(tmp_path / "run"):
        pass
    assert deleted == [None]
    assert hidden(tmp_path) == []


def test_a_file_system_without_locks_is_said_and_the_run_begins(
    four_steps, write_recipe, tmp_path, monkeypatch, capsys
):
    def missing(handle: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(run_folder, "_take", missing)
    assert cli.run(["pretrain", write_recipe(four_steps), "--run", str(tmp_path / "run")]) == 0
    assert f"{tmp_path} is on a file system without locks (Function not implemented)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_parent_that_takes_no_lock_is_named(four_steps, write_recipe, tmp_path, monkeypatch, capsys, number):
    opens = os.open

    def refuses(path, *arguments, **more):
        if str(path).endswith(".lock"):
            raise OSError(number, os.strerror(number), str(path))
        return opens(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuses)  # the tests may run as root, whom no permission stops
    assert cli.run(["pretrain", write_recipe(four_steps), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "run") in error and os.strerror(number) in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_the_right_to_write_is_named(four_steps, write_recipe, tmp_path, capsys):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o500)
    assert cli.run(["pretrain", write_recipe(four_steps), "--run", str(tmp_path / "closed" / "run")]) == 2
    assert "closed/run cannot be written (Permission denied)" in capsys.readouterr().err


# What was there before


def test_a_link_to_a_folder_elsewhere_stays_a_link(finished):
    command, run = finished
    expected = bits(run)
    link = run.parent / "link"
    link.symlink_to(run)
    command[command.index("--run") + 1] = str(link)
    for more in ("--resume", "--overwrite"):
        assert cli.run([*command[:-1], more]) == 0
        assert link.is_symlink() and not run.is_symlink()
        assert bits(run) == expected
        assert hidden(run.parent) == []


def test_auto_resume_begins_goes_on_and_does_not_overwrite(four_steps, write_recipe, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["pretrain", write_recipe(four_steps), "--run", str(run), "--auto-resume"]
    assert cli.run([*command, "--overwrite"]) == 2
    assert "--overwrite deletes it: give one of them" in capsys.readouterr().err
    assert cli.run(command) == 0
    expected, stamp = bits(run), (run / "environment.json").stat().st_mtime_ns
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    capsys.readouterr()
    assert cli.run(command) == 0
    assert "from step 2" in capsys.readouterr().err
    assert bits(run) == expected
    assert (run / "environment.json").stat().st_mtime_ns == stamp, "it was begun anew"


def test_auto_resume_finds_the_run_that_a_killed_overwriting_had_moved_away(finished):
    command, run = finished
    expected = bits(run)
    shutil.rmtree(run / "model")
    run.rename(run.parent / f".{run.name}.old")
    (run.parent / f".{run.name}.tmp-99999").mkdir()
    assert cli.run([*command[:-1], "--auto-resume"]) == 0
    assert bits(run) == expected
    assert hidden(run.parent) == []


def test_a_config_that_cannot_be_read_is_named_with_what_to_do(finished, capsys):
    command, run = finished
    for text in ("", "just words", "a: [", "\x00"):
        (run / "config.yaml").write_text(text)
        for more in ([], ["train.steps=4"]):
            assert cli.run([*command, *more]) == 2
            assert str(run) in (error := capsys.readouterr().err) and "config.yaml" in error


# What must be the same


def test_another_tokenizer_is_refused(finished, text_folder, tmp_path, capsys):
    command, run = finished
    before = bits(run)
    backwards = [file.read_text()[::-1] for file in sorted(text_folder.iterdir())]
    cases = ((400, "was trained with another tokenizer (SHA-256 "), (410, "vocab_size is 400 there and 410"))
    for pieces, words in cases:
        train_tokenizer(backwards, tmp_path / f"{pieces}.model", pieces, threads=1)
        shutil.rmtree(run / "tokenizer")
        (run / "tokenizer").mkdir()
        Tokenizer.load(tmp_path / f"{pieces}.model").save(run / "tokenizer")
        assert cli.run(command) == 2
        error = capsys.readouterr().err
        assert words in error and "step_00000004" in error
    assert bits(run) == before


def test_a_checkpoint_of_another_geometry_is_refused_with_the_field_named(finished, capsys):
    command, run = finished
    folder = run / "checkpoints" / "step_00000004"
    config = json.loads((folder / "config.json").read_text())
    config["rope_freq_constant"] = 20_000
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["config.json"] = sha256(folder / "config.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cli.run(command) == 2
    error = capsys.readouterr().err
    assert "step_00000004 is of another geometry: rope_freq_constant is 20000" in error and "10000" in error
    # And before any checkpoint is looked at, the recipe's own.
    assert cli.run([*command, "model.model_dim=48"]) == 2
    assert "model.model_dim was 32, is 48" in capsys.readouterr().err


def test_data_that_changed_are_refused_and_the_file_named(four_steps, write_recipe, text_folder, tmp_path, capsys):
    text = tmp_path / "text"
    shutil.copytree(text_folder, text)
    four_steps["data"]["sources"][0]["path"] = str(text)
    command = ["pretrain", write_recipe(four_steps), "--run", str(tmp_path / "run")]
    assert cli.run(command) == 0
    expected = bits(tmp_path / "run")
    file = text / "007.txt"
    content = file.read_bytes()
    changes = [
        (lambda: file.write_bytes(content + b"one more line\n"), f"{file} had {len(content):,} bytes"),
        (lambda: file.write_bytes(content[:-3] + b"x.\n"), f"{file} has the same size and another content"),
        (file.unlink, f"{file} is not there any more"),
    ]
    for change, words in changes:
        change()
        assert cli.run([*command, "--resume"]) == 2
        error = capsys.readouterr().err
        assert words in error and "a resumed run must read the data that it began with" in error
    file.write_bytes(content)  # at another time, and the same
    (text / "040.txt").write_bytes(content)
    assert cli.run([*command, "--resume"]) == 2
    assert f"{text / '040.txt'} was not there when the run began" in capsys.readouterr().err
    (text / "040.txt").unlink()
    assert cli.run([*command, "--resume"]) == 0
    assert bits(tmp_path / "run") == expected


# What may differ

FREE = {
    "train.log_every": 3,
    "train.keep_last": 7,
    "train.milestone_every": 3,
    "train.async_checkpoints": True,
    "train.timeout_s": 33.0,
    "data.workers": 1,
}
ROUNDING = {
    "train.micro_batch": 1,
    "train.sharding": "full",
    "train.activation_checkpointing": "selective",
    "train.compile": True,
}


def test_settings_that_change_no_more_than_the_rounding_may_differ_and_are_told(finished, four_steps):
    _, run = finished
    for key, value in {**FREE, **ROUNDING}.items():
        section, name = key.split(".")
        changed = yaml.safe_load(yaml.safe_dump(four_steps))
        changed[section][name] = value
        notes = check_start(run, resolve(RunConfig, changed, "test"), resume=True, overwrite=False)
        [told] = notes or [None]
        assert told is None if key in FREE else (f": {key} was " in told and told.endswith(f", is {value!r}"))


def test_a_run_goes_on_with_them_to_an_end_that_differs_in_rounding_only(finished, four_steps, capsys):
    command, run = finished
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    capsys.readouterr()
    changed = [f"{key}={value}" for key, value in {**FREE, **ROUNDING, "train.log_every": 1}.items()]
    changed.remove("train.compile=True")  # half a minute
    assert cli.run([*command, "--resume-step", "2", *changed]) == 0
    error = capsys.readouterr().err
    assert "with no effect beyond rounding: train.activation_checkpointing was 'none', is 'selective', " in error
    assert "train.async_checkpoints" not in error
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in after] == [e["step"] for e in before]
    for one, other in zip(before, after, strict=True):
        assert one["kind"] == other["kind"]
        if one["kind"] == "train":
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
