"""A run that is killed at any instant and resumed ends with the bits of the run left alone."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from openelm import cli
from openelm.config import RunConfig, resolve
from openelm.train.checkpoint import Checkpoints
from openelm.train.keeper import Keeper
from openelm.train.metrics import cut_back
from openelm.train.pretrain import pretrain


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """All metrics but the times, and the bytes of every model that the run wrote."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    models = {name: (run / name / "model.safetensors").read_bytes() for name in ("model", "model-last")}
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in entries], models


def train(recipe: dict[str, Any], run: Path, *, resume: bool = False, resume_step: int | None = None) -> None:
    pretrain(resolve(RunConfig, recipe, "test"), run, resume=resume, resume_step=resume_step, overwrite=False)


class Stopped(BaseException):
    """What nothing in the package catches."""


def stop_at(monkeypatch, recipe, run: Path, step: int, **resume: Any) -> None:
    """Train until the moment before the checkpoint of `step` is written."""
    save = Keeper.save

    def stopping(self, at, tokens, data):
        if at == step:
            raise Stopped
        return save(self, at, tokens, data)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "save", stopping)
        with pytest.raises(Stopped):
            train(recipe, run, **resume)


@pytest.fixture
def alone(recipe, tmp_path):
    train(recipe, tmp_path / "alone")
    return outcome(tmp_path / "alone")


def test_resuming_twice_in_a_row_in_mid_document_gives_the_same_bits(recipe, tmp_path, monkeypatch, alone):
    run = tmp_path / "run"
    stop_at(monkeypatch, recipe, run, 4)
    for step in (2, 4):
        # The states to go on from are the awkward ones: inside a document, with ids left over for the next row.
        state = json.loads((run / "checkpoints" / f"step_{step:08}" / "state.json").read_text())
        shards = state["stream"]["states"].values()
        assert any(shard["remainder"] for shard in shards)
        stop_at(monkeypatch, recipe, run, step + 4 if step == 4 else 6, resume=True)
    train(recipe, run, resume=True)
    assert outcome(run) == alone


def test_a_document_of_many_pieces_is_gone_on_with_where_it_was_left(recipe, tmp_path, monkeypatch):
    recipe["data"] |= {"split_words": 40, "shards": 2}
    train(recipe, tmp_path / "alone")
    run = tmp_path / "run"
    stop_at(monkeypatch, recipe, run, 6)
    state = json.loads((run / "checkpoints" / "step_00000004" / "state.json").read_text())
    opened = [entry for shard in state["stream"]["states"].values() for entry in shard["opened"] if entry]
    assert any(entry["piece"] > 0 for entry in opened)
    train(recipe, run, resume=True)
    assert outcome(run) == outcome(tmp_path / "alone")


def test_bf16_goes_on_from_the_fp32_masters(recipe, tmp_path, monkeypatch):
    recipe["train"]["dtype"] = "bfloat16"
    train(recipe, tmp_path / "alone")
    stop_at(monkeypatch, recipe, tmp_path / "run", 6)
    train(recipe, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


def test_a_run_stopped_before_its_first_checkpoint_begins_again(recipe, tmp_path, monkeypatch, alone):
    run = tmp_path / "run"
    stop_at(monkeypatch, recipe, run, 2)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    train(recipe, run, resume=True)
    assert outcome(run) == alone


def test_resuming_a_finished_run_changes_nothing(recipe, tmp_path, alone):
    train(recipe, tmp_path / "alone", resume=True)
    assert outcome(tmp_path / "alone") == alone


def test_an_older_checkpoint_leads_to_the_same_end(recipe, tmp_path, alone):
    run = tmp_path / "alone"
    train(recipe, run, resume_step=4, resume=True)
    assert outcome(run) == alone
    assert Checkpoints(run / "checkpoints", keep_last=3).steps() == [4, 6, 8]


def test_one_checkpoint_too_many_is_not_averaged(recipe, tmp_path):
    # Killed after the last save and before the oldest was deleted.
    recipe["train"] |= {"average_last": 5}
    run = tmp_path / "run"
    train(recipe, run)
    expected = outcome(run)
    shutil.copytree(run / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000002")
    train(recipe, run, resume=True)
    assert outcome(run) == expected


def test_drafts_of_a_killed_process_are_cleared_away(recipe, tmp_path, monkeypatch, alone):
    run = tmp_path / "run"
    stop_at(monkeypatch, recipe, run, 6)
    (run / ".model.tmp-99999").mkdir()
    (run / ".metrics.jsonl.tmp-99999").write_text("half")
    (run / "checkpoints" / ".step_00000006.tmp-99999").mkdir()
    (run / "report").mkdir()
    (run / "report" / ".index.html.tmp-99999").write_text("half")
    train(recipe, run, resume=True)
    assert list(tmp_path.rglob(".*")) == []
    assert outcome(run) == alone


def test_a_start_that_was_killed_is_started_again(recipe, tmp_path, alone):
    # The run folder appears whole: before that there is only a draft.
    draft = tmp_path / ".run.tmp-99999"
    (draft / "tokenizer").mkdir(parents=True)
    train(recipe, tmp_path / "run")
    assert outcome(tmp_path / "run") == alone
    assert not draft.exists()


def test_an_overwriting_that_was_killed_gives_the_old_run_back(recipe, tmp_path, alone):
    (tmp_path / "alone").rename(tmp_path / ".alone.old")
    train(recipe, tmp_path / "alone", resume=True)
    assert outcome(tmp_path / "alone") == alone


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', '{"kind": "sample", "step": 3, "text": "é'.encode()[:-1]])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": s, "timing": {"elapsed_s": 1.5 * s}}).encode() for s in (1, 2, 3)]
    path.write_bytes(b"\n".join([*lines, torn]))
    assert cut_back(path, 2) == 3.0
    assert path.read_bytes() == b"\n".join(lines[:2]) + b"\n"


def test_a_sample_with_odd_line_ends_survives_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entry = {"kind": "sample", "step": 1, "text": "one\u2028two\x85three\x0cfour\n"}
    path.write_bytes(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    before = path.read_bytes()
    cut_back(path, 1)
    assert path.read_bytes() == before


def test_another_recipe_is_refused_with_every_key_named(recipe, write_recipe, tmp_path, capsys, alone):
    run = tmp_path / "alone"
    command = ["pretrain", write_recipe(recipe), "--run", str(run), "--resume"]
    assert cli.run([*command, "train.lr=0.02", "data.sources.0.share=2", "seed=5"]) == 2
    error = capsys.readouterr().err
    for part in ("train.lr was 0.01, is 0.02", "seed was 1, is 5", "data.sources", "choose another --run"):
        assert part in error
    assert outcome(run) == alone
    # What changes no number may differ.
    assert cli.run([*command, "train.log_every=1", "train.milestone_every=2"]) == 0


def test_resuming_what_is_not_there_is_refused(recipe, write_recipe, tmp_path, capsys):
    command = ["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run"), "--resume"]
    assert cli.run(command) == 2
    assert "nothing to resume: leave out --resume" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    assert cli.run(command) == 2
    assert re.search(r"run is not a run folder.*config\.yaml", capsys.readouterr().err)
    assert list((tmp_path / "run").iterdir()) == []


def kill_and_resume(spawn, command: list[str], run: Path, kills: int, duration_s: float, seed: int) -> int:
    """Start, kill at a random instant, resume, and so on; the last is left to end. Returns how many were killed."""
    draw = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = spawn([*command, "--resume"] if run.exists() else command)
        process.join(draw.uniform(0.1, 0.8) * duration_s)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    process = spawn([*command, "--resume"] if run.exists() else command)
    process.join()
    assert process.exitcode == 0
    return killed


@pytest.mark.parametrize(
    "kills",
    [3, pytest.param(10, marks=pytest.mark.slow(reason="ten starts of a run, a minute"))],
)
def test_a_run_killed_at_random_instants_ends_with_the_same_bits(recipe, write_recipe, tmp_path, spawn, kills):
    recipe["train"] |= {"steps": 20 + 10 * kills, "checkpoint_every": 3, "validate_every": 5, "milestone_every": 12}
    path = write_recipe(recipe)
    spawn(["--version"]).join()  # the server of processes has its imports behind it
    start_s = time.perf_counter()
    alone = spawn(["pretrain", path, "--run", str(tmp_path / "alone")])
    alone.join()
    duration_s = time.perf_counter() - start_s
    assert alone.exitcode == 0
    run = tmp_path / "run"
    killed = kill_and_resume(spawn, ["pretrain", path, "--run", str(run)], run, kills, duration_s, seed=kills)
    assert killed > 0
    assert outcome(run) == outcome(tmp_path / "alone")
    assert list(tmp_path.rglob(".*")) == [], "no draft is left behind"
    names = [{p.relative_to(r) for p in r.rglob("*") if "tensorboard" not in str(p)} for r in (run, tmp_path / "alone")]
    assert names[0] == names[1]
