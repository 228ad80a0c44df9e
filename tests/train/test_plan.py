"""A dry run says what the run would do, and writes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm import cli
from openelm.config import load_recipe
from openelm.model.geometry import ModelConfig
from openelm.train.plan import memory_bytes


def test_dry_run_counts_rows_tokens_and_flops(
    recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    model = ModelConfig(**recipe["model"], vocab_size=400)
    assert plan["parameters"] == model.num_parameters()
    assert plan["rows"] == 8 * 4
    assert plan["tokens_at_most"] == 8 * 4 * 32
    assert plan["flops"] == 8 * 4 * 32 * model.train_flops_per_token(32)
    assert plan["disk_bytes"] == 3 * 12 * model.num_parameters()
    assert plan["source_words"].startswith("40 files")
    assert not run.exists()


def test_memory_of_the_270m_is_what_was_measured() -> None:
    recipe = ["data.row_length=2048", "model.max_context_length=2048", "train.global_batch=1", "train.micro_batch=1"]
    config = load_recipe("demo", recipe)
    # docs/benchmarks.md: 7.64 GB, fp32, rows of 2,048.
    assert memory_bytes(config, ModelConfig.from_name("270M"), compute_bytes=4) == pytest.approx(7.64e9, rel=0.05)
