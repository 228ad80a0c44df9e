"""openelm pretrain --minutes: as many steps as fit, and the same number when it is resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import cli
from openelm.bench import training
from openelm.config import load_recipe


def test_minutes_choose_the_steps_and_a_resume_keeps_them(
    recipe: dict[str, Any],
    write_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A machine that makes 64 tokens a second: half a step of 4 rows of 32.
    monkeypatch.setattr(training, "bench_training", lambda config, bench: {"tokens_per_s": 64.0})
    run, file = tmp_path / "run", write_recipe(recipe)
    command = ["pretrain", file, "--run", str(run), "--json"]
    assert cli.run([*command, "--minutes", "0.4"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 12
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 12
    for more in ([], ["--minutes", "7"]):  # the recipe itself says 8
        assert cli.run([*command, "--resume", *more]) == 0
        assert json.loads(capsys.readouterr().out)["steps"] == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "0"], "--minutes 0 must be more than 0"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--resume"], "there is nothing to resume"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str],
    said: str,
    recipe: dict[str, Any],
    write_recipe: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run), *words]) == 2
    assert said in capsys.readouterr().err
    assert not run.exists()


def test_a_named_size_replaces_the_recipes_own_geometry() -> None:
    # Every field of the demo's model once overrode the named size, so that nothing of it was left.
    model = load_recipe("demo", ["model.size=270M", "model.head_dim=128"]).model
    built = model.build(vocab_size=32000, bos_id=1, eos_id=2)
    assert (built.model_dim, built.num_transformer_layers, built.head_dim) == (1280, 16, 128)
    assert built.max_context_length == 512


def test_a_runs_own_config_is_a_recipe(
    recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run)]) == 0
    assert cli.run(["pretrain", str(run / "config.yaml"), "--run", str(run), "--resume"]) == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_what_is_no_run_folder_is_never_overwritten(
    overwrite: list[str],
    recipe: dict[str, Any],
    write_recipe: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for name in ("file", "folder"):
        assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / name), *overwrite]) == 2
        assert "is there and is no run folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"


@pytest.mark.parametrize("override", ["seed=99999999999999999999", "seed=-1", "name=../../out"])
def test_seeds_and_names_out_of_range_are_refused(
    override: str, recipe: dict[str, Any], write_recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["pretrain", write_recipe(recipe), override, "--dry-run"]) == 2
    assert override.partition("=")[0] in capsys.readouterr().err


def test_nothing_held_out_is_said(
    recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["data"]["held_out"] = 1e-9
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 0
    assert "no document was held out (data.held_out=1e-09" in capsys.readouterr().err


def test_under_a_torchrun_that_restarts_nothing_is_deleted_and_the_run_goes_on(
    recipe, write_recipe, tmp_path, capsys, monkeypatch
):
    command = ["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert cli.run(command) == 0
    made = (tmp_path / "run" / "environment.json").stat().st_mtime_ns
    assert cli.run([*command, "--overwrite"]) == 2
    assert "would delete the run at each restart" in capsys.readouterr().err
    assert cli.run(command) == 0
    assert (tmp_path / "run" / "environment.json").stat().st_mtime_ns == made


def test_a_source_whose_text_is_all_dropped_is_named_before_anything_is_made(recipe, write_recipe, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    recipe["data"]["sources"].append({"name": "empty", "path": str(tmp_path / "short.txt"), "share": 0.001})
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 2
    assert "no document of source 'empty' is left after filtering" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
