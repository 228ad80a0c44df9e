"""Checkpoints: whole or not there, and whatever happens to their bytes is noticed and named."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from openelm import cli
from openelm.config import RunConfig, resolve
from openelm.errors import UserError
from openelm.model.folder import load_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights
from openelm.train import form as form_module
from openelm.train.checkpoint import Checkpoint, Checkpoints, sha256, verify
from openelm.train.form import Form
from openelm.train.pretrain import pretrain

CONFIG = ModelConfig(model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, vocab_size=20)
FILES = ["config.json", "generation_config.json", "manifest.json", "model.safetensors", "optimizer.safetensors"]
FILES += ["state.json"]


def make(step: int) -> Checkpoint:
    model = OpenELM(CONFIG)
    init_weights(model, step)
    moments = {f"{name}.exp_avg": torch.rand_like(p) for name, p in model.state_dict().items()}
    return Checkpoint(step, model.state_dict(), moments, {"tokens": 100 * step, "stream": {"position": step}})


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    found = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    for step in (5, 10):
        found.save(Form(CONFIG), make(step))
    return found


def drafts(folder: Path) -> list[Path]:
    return [*folder.rglob(".*.tmp-*"), *folder.rglob(".*.old")]


def test_what_is_saved_comes_back(checkpoints):
    torch.manual_seed(3)
    saved = make(15)
    checkpoints.save(Form(CONFIG), saved)
    following = torch.rand(4)
    torch.manual_seed(4)
    found = checkpoints.load()
    assert torch.equal(torch.rand(4), following), "random numbers go on where they were"
    assert (found.step, found.state["tokens"], found.state["stream"]) == (15, 1500, {"position": 15})
    for ours, theirs in ((found.weights, saved.weights), (found.optimizer, saved.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_manifest_lists_every_file_with_its_checksum(checkpoints):
    folder = checkpoints.path(10)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert manifest == {"step": 10, "sha256": {n: sha256(folder / n) for n in FILES if n != "manifest.json"}}


def test_nothing_in_a_checkpoint_is_a_pickle(checkpoints):
    assert {Path(name).suffix for name in FILES} == {".json", ".safetensors"}
    for file in checkpoints.path(10).iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))


def test_a_checkpoint_is_a_model_folder(checkpoints):
    model = load_model(checkpoints.path(10))
    assert all(torch.equal(t, make(10).weights[name]) for name, t in model.state_dict().items())


def test_the_last_and_the_milestones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, milestone_every=20)
    left = []
    for step in range(5, 50, 5):
        checkpoints.save(Form(CONFIG), make(step))
        left.append(checkpoints.steps())
    assert left[0] == [5]
    assert left[2] == [10, 15]
    assert left[5] == [20, 25, 30]
    assert left[-1] == [20, 40, 45]
    assert drafts(tmp_path) == []


def test_going_on_from_an_older_one_deletes_the_newer(checkpoints):
    checkpoints.drop_after(5)
    assert checkpoints.steps() == [5]
    assert drafts(checkpoints.folder) == []


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "removed":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(content[:-1])
    elif how == "emptied":
        file.write_bytes(b"")
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["one bit", "cut short", "emptied", "removed"])
def test_damage_is_named_and_an_older_one_taken_only_when_asked_for(checkpoints, name, how):
    damage(checkpoints.path(10) / name, how)
    for step in (None, 10):
        with pytest.raises(UserError) as caught:
            checkpoints.load(step)
        assert "damaged checkpoint" in str(caught.value)
        assert "step_00000010/" in str(caught.value)
        assert "--resume-step 5" in str(caught.value)
        if how != "one bit" or name != "manifest.json":  # a bit of the manifest may be one of any file's checksum
            assert f"step_00000010/{name}" in str(caught.value)
    assert checkpoints.load(5).step == 5


def test_no_bit_of_the_manifest_can_turn_unnoticed(checkpoints):
    file = checkpoints.path(10) / "manifest.json"
    content = file.read_bytes()
    for position in range(len(content)):
        for bit in range(position % 3, 8, 3):  # a third of them, all in turn
            file.write_bytes(content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :])
            with pytest.raises(UserError, match="damaged checkpoint"):
                verify(checkpoints.path(10))
    file.write_bytes(content)
    verify(checkpoints.path(10))


def test_where_there_is_no_older_one_that_is_said(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    with pytest.raises(UserError, match=r"no complete checkpoint.*--overwrite"):
        checkpoints.load()
    checkpoints.save(Form(CONFIG), make(5))
    with pytest.raises(UserError, match=r"no checkpoint of step 4.*\[5\]"):
        checkpoints.load(4)
    damage(checkpoints.path(5) / "state.json", "removed")
    with pytest.raises(UserError, match=r"state\.json is missing; there is no older one"):
        checkpoints.load()


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes_away(checkpoints):
    shutil.copytree(checkpoints.path(10), checkpoints.folder / ".step_00000015.tmp-123")
    (checkpoints.folder / "step_notes").mkdir()
    assert checkpoints.steps() == [5, 10]
    assert checkpoints.load().step == 10
    assert drafts(checkpoints.folder) == []


def test_a_killed_deletion_leaves_no_half_checkpoint(checkpoints, monkeypatch):
    # The folder leaves its name before its files go.
    def killed(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.drop_after(5)
    monkeypatch.undo()
    assert checkpoints.steps() == [5]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors"])
def test_a_file_that_does_not_fit_leaves_the_checkpoints_as_they_were(checkpoints, name, largest_file):
    # Python writes the first, Rust the second; the third fails when the others are written already.
    sizes = {file.name: file.stat().st_size for file in checkpoints.path(10).iterdir()}
    assert sizes["config.json"] < sizes["model.safetensors"] < sizes["optimizer.safetensors"]
    with largest_file(sizes[name] - 1), pytest.raises(UserError, match=r"no space left for .*step_00000015"):
        checkpoints.save(Form(CONFIG), make(15))
    assert checkpoints.steps() == [5, 10]
    assert drafts(checkpoints.folder) == []
    assert checkpoints.load().step == 10


def test_a_disk_that_is_full_only_when_synced_is_noticed(checkpoints, monkeypatch):
    # Network and thin-provisioned disks accept the bytes first.
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        checkpoints.save(Form(CONFIG), make(15))
    monkeypatch.undo()
    assert checkpoints.steps() == [5, 10]
    assert drafts(checkpoints.folder) == []


def run_to_the_end(recipe, folder: Path) -> bytes:
    pretrain(resolve(RunConfig, recipe, "test"), folder, resume=False, resume_step=None, overwrite=False)
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_on_a_full_disk_stops_with_the_last_checkpoint_whole(
    recipe, write_recipe, tmp_path, monkeypatch, capsys, largest_file
):
    run = tmp_path / "run"
    command = ["pretrain", write_recipe(recipe), "--run", str(run)]
    save = form_module.write_model

    def fills_up(folder, *arguments):
        if "step_00000006" in folder.name:
            with largest_file(20_000):
                save(folder, *arguments)
        save(folder, *arguments)

    monkeypatch.setattr(form_module, "write_model", fills_up)
    assert cli.run(command) == 2
    error = capsys.readouterr().err
    assert "error: no space left for" in error
    assert "step_00000006" in error
    monkeypatch.undo()
    checkpoints = Checkpoints(run / "checkpoints", keep_last=3)
    assert checkpoints.steps() == [2, 4]
    verify(checkpoints.path(4))
    assert drafts(run) == []
    # With room again, the run ends as if nothing had been.
    assert cli.run([*command, "--resume"]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == run_to_the_end(recipe, tmp_path / "alone")


def test_metrics_that_do_not_fit_stop_the_run_in_words(recipe, write_recipe, tmp_path, capsys, largest_file):
    recipe["train"] |= {"checkpoint_every": 100, "average_last": 0}
    run = tmp_path / "run"
    run_to_the_end(recipe, run)
    shutil.rmtree(run / "checkpoints")  # as if stopped before the first one
    (run / "checkpoints").mkdir()
    with largest_file(1000):
        assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run), "--resume"]) == 2
    assert f"no space left for {run / 'metrics.jsonl'}" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(recipe, write_recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    command = ["pretrain", write_recipe(recipe), "--run"]
    assert cli.run([*command, str(tmp_path / "file" / "run")]) == 2
    assert "file/run cannot be written (Not a directory)" in capsys.readouterr().err

    def read_only(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)  # the tests may run as root, whom no permission stops
    assert cli.run([*command, str(tmp_path / "run")]) == 2
    assert "run cannot be written (Read-only file system)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_stops_a_resume_until_an_older_one_is_asked_for(recipe, write_recipe, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["pretrain", write_recipe(recipe), "--run", str(run)]
    bits = run_to_the_end(recipe, run)
    damaged = run / "checkpoints" / "step_00000008" / "optimizer.safetensors"
    damage(damaged, "one bit")
    assert cli.run([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert str(damaged) in error
    assert "--resume-step 6" in error
    assert cli.run([*command, "--resume-step", "6"]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == bits
    verify(run / "checkpoints" / "step_00000008")
