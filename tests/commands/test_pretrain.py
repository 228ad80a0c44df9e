"""openelm pretrain --minutes: as many steps as fit, and the same number when it is resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import cli
from openelm.bench import training


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
        (["--resume", "--overwrite"], "give one of the two"),
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
