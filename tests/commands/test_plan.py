"""openelm plan: the paper's runs come out, every option counts, and what makes no sense is refused by name."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from openelm import cli
from openelm.model.geometry import ModelConfig


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON of ``openelm plan WORDS``."""

    def call(*words: str) -> dict[str, Any]:
        assert cli.run(["plan", *words, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call


def test_the_papers_runs_imply_the_known_shares_of_the_peak(plan: Callable[..., dict[str, Any]]) -> None:
    paper = plan("--size", "3B", "--gpus", "128", "--gpu", "h100-80")["paper"]
    assert [row["size"] for row in paper] == ["270M", "450M", "1.1B", "3B"]
    assert [row["parameters"] for row in paper] == [271_527_168, 457_179_136, 1_079_891_456, 3_036_647_424]
    assert [round(100 * row["implied_mfu"]) for row in paper] == [26, 14, 27, 20]
    # 6 a parameter of all matrices, the tied output layer once, and half a square of attention: by hand for the 270M.
    heads = 5 * 12 + 7 * 16 + 4 * 20
    gains = 16 * (2 * 1280 + 2 * 64) + 1280
    assert paper[0]["flops_per_token"] == 6 * (271_527_168 - gains) + 6 * 2048 * 64 * heads
    assert all(row["memory_bytes"] <= 0.92 * 80e9 for row in paper)


def test_speed_days_and_cost_follow_from_the_stated_mfu(plan: Callable[..., dict[str, Any]]) -> None:
    words = ["--size", "270M", "--gpus", "128", "--gpu", "a100-80", "--mfu", "0.5", "--price-per-gpu-hour", "2"]
    found = plan(*words)
    flops = ModelConfig.from_name("270M").train_flops_per_token(2048)
    assert found["tokens"] == 350_000 * 4_194_304
    assert found["tokens_per_s"] == pytest.approx(128 * 312e12 * 0.5 / flops)
    assert found["days"] == pytest.approx(found["tokens"] * flops / (128 * 312e12 * 0.5) / 86_400)
    assert found["cost"] == pytest.approx(2 * 128 * 24 * found["days"])
    assert found["reading"]["bytes_per_s"] == pytest.approx(4 * found["tokens_per_s"])
    assert found["mfu_rule"] == "as given"
    # A step of twice the rows is half as many for the same tokens.
    twice = plan(*words, "--global-batch-tokens", "8388608", "--tokens", str(found["tokens"]))
    assert twice["setting"]["steps"] == 175_000
    assert twice["days"] == pytest.approx(found["days"])


def test_the_interval_is_the_one_that_loses_least(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--size", "3B", "--gpus", "1024", "--gpu", "h100-80", "--gpu-hours-per-failure", "10000")
    checkpoint = found["checkpoint"]
    assert checkpoint["bytes"] == 12 * 3_036_647_424
    assert checkpoint["save_s"] == pytest.approx(12 * 3_036_647_424 / 2e9)
    assert checkpoint["failure_every_s"] == pytest.approx(10_000 * 3600 / 1024)

    def lost(steps: int) -> float:
        interval_s = steps * found["step_s"]
        return checkpoint["save_s"] / interval_s + interval_s / (2 * checkpoint["failure_every_s"])

    best = checkpoint["interval_steps"]
    assert checkpoint["lost_share"] == pytest.approx(lost(best))
    assert lost(best) <= min(lost(best - 1), lost(best + 1), lost(best // 2), lost(2 * best))


def test_a_recipe_gives_what_no_flag_changes(
    recipe: dict[str, Any], write_recipe: Callable[..., str], plan: Callable[..., dict[str, Any]]
) -> None:
    recipe["train"]["dtype"] = "auto"
    recipe["train"]["sharding"] = "full"
    recipe["train"]["ema_decay"] = 0.99
    file = write_recipe(recipe)
    found = plan(file, "train.steps=9", "--gpu", "h200", "--gpus", "2")
    model = ModelConfig(**recipe["model"], vocab_size=400)
    assert found["parameters"] == model.num_parameters()
    expected = {"row_length": 32, "micro_batch": 2, "global_batch": 4, "steps": 9, "sharding": "full", "ema": True}
    assert {key: found["setting"][key] for key in expected} == expected
    assert found["checkpoint"]["bytes"] == 16 * model.num_parameters()
    changed = plan(file, "--gpu", "h200", "--row-length", "16", "--micro-batch", "1", "--sharding", "none")["setting"]
    assert (changed["row_length"], changed["micro_batch"], changed["sharding"]) == (16, 1, "none")
    assert plan(file, "--gpu", "h200", "train.steps=5", "--mfu", "0.5")["setting"]["steps"] == 5
    assert plan(file, "--size", "30M", "--gpu", "h200", "--row-length", "16")["setting"]["steps"] == 8


def test_what_does_not_fit_is_said_with_the_nearest_setting_that_does(
    plan: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "3B", "--gpus", "8", "--gpu", "rtx4090", "--micro-batch", "4"]
    found = plan(*words)
    assert not found["fits"]
    # Checkpointing alone cannot do it: weights, gradients and moments take 49 GB a copy.
    assert found["nearest_that_fits"] == {"activation_checkpointing": "selective", "sharding": "node", "micro_batch": 4}
    assert cli.run(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "it does not fit; the nearest that does: activation-checkpointing selective, sharding node" in said
    assert cli.run(["plan", "--size", "3B", "--gpu", "rtx4090"]) == 0
    said = capsys.readouterr().out
    assert "it does not fit, whatever the setting; 4 such devices would do" in said
    assert plan(*words[:2], "--gpu", "rtx4090", "--gpus", "4", "--sharding", "full")["fits"]
    assert cli.run(["plan", "--size", "3B", "--gpu", "rtx4090", "--row-length", "4194304"]) == 0
    assert "on however many such devices" in capsys.readouterr().out


def test_a_person_reads_the_figures_and_the_papers_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--size", "1.1B", "--gpus", "128", "--gpu", "a100-80", "--price-per-gpu-hour", "1.5"]) == 0
    said = capsys.readouterr().out
    for part in ("1,079,891,456", "7.010 GFLOP a token", "a device hour", "activations", "it fits", "(assumed"):
        assert part in said
    assert max(map(len, said.splitlines())) <= 140


def test_this_machine_can_be_planned_on(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--size", "30M", "--global-batch-tokens", "8192", "--steps", "10")
    assert found["hardware"]["name"] == "cpu"
    assert found["hardware"]["memory_bytes"] > 2**30
    assert found["hardware"]["flops_per_s"] > 1e8
    assert found["memory"]["process"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a RECIPE, or --size"),
        (["--size", "271M"], "did you mean 270M?"),
        (["--size", "3B", "--gpu", "h100"], "did you mean h100-80?"),
        (["--size", "3B", "--gpu", "H200x"], "did you mean h200?"),
        (["--size", "3B", "--gpus", "0", "--gpu", "h200"], "--gpus: 0 is too few"),
        (["--size", "3B", "--gpus", "100", "--gpu", "h200"], "use 2,000 rows (4,096,000 tokens) or 2,100 rows"),
        (["--size", "3B", "--gpus", "4096", "--gpu", "h200"], "use 4,096 rows (8,388,608 tokens), or other --gpus"),
        (["--size", "3B", "--gpu", "h200", "--micro-batch", "3"], "= 3: use 2,046 rows (4,190,208 tokens) or 2,049"),
        (["--size", "3B", "--gpu", "h200", "--micro-batch", "0"], "--micro-batch: 0 is too few"),
        (["--size", "3B", "--gpu", "h200", "--row-length", "0"], "--row-length"),
        (["--size", "3B", "--gpu", "h200", "--row-length", "-5"], "--row-length"),
        (["--size", "3B", "--gpu", "h200", "--global-batch-tokens", "5000"], "use 4,096 or 6,144"),
        (["--size", "3B", "--gpu", "h200", "--global-batch-tokens", "0"], "--global-batch-tokens 0"),
        (["--size", "3B", "--gpu", "h200", "--steps", "0"], "--steps: 0 is too few"),
        (["--size", "3B", "--gpu", "h200", "--tokens", "0"], "--steps: 0 is too few"),
        (["--size", "3B", "--gpu", "h200", "--vocab-size", "0"], "vocab_size=0"),
        (["--size", "3B", "--gpu", "h200", "--mfu", "0"], "--mfu 0 must be more than 0 and at most 1"),
        (["--size", "3B", "--gpu", "h200", "--mfu", "40"], "--mfu 40"),
        (["--size", "3B", "--gpu", "h200", "--mfu", "nan"], "--mfu nan"),
        (["--size", "3B", "--gpu", "h200", "--price-per-gpu-hour", "-1"], "--price-per-gpu-hour -1"),
        (["--size", "3B", "--gpu", "h200", "--price-per-gpu-hour", "nan"], "--price-per-gpu-hour nan"),
        (["--size", "3B", "--gpu", "h200", "--write-bytes-per-s", "0"], "--write-bytes-per-s 0"),
        (["--size", "3B", "--gpu", "h200", "--gpu-hours-per-failure", "inf"], "--gpu-hours-per-failure inf"),
        (["--size", "3B", "--gpu", "h200", "--gpus", "12", "--sharding", "node"], "use 8 or 16, or sharding=full"),
        (["nowhere"], "no packaged recipe"),
        (["demo", "train.nonsense=1"], "train.nonsense is not a key"),
        (["demo", "train.dtype=float32", "--gpu", "h200"], "set it to auto"),
        (["demo", "--gpu", "h200", "--row-length", "1024"], "longer than the context of 512"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", *words]) == 2
    assert said in capsys.readouterr().err
