"""The page of a tuning run: what was trained, on how many examples, and how well it does on others."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm.report import plots
from openelm.report.page import write_report

pytest.importorskip("matplotlib")
ACCOUNT = {"records": 130, "trained_on": 100, "held_out": 20, "held_out_unused": 7, "empty_answer": 3, "long_prompt": 0}
ACCOUNT |= {"cut_prompts": 9, "cut_answers": 0}
GEOMETRY = {"num_parameters": 4_931_200, "num_transformer_layers": 2, "num_query_heads": [4, 8], "ffn_dims": [128, 256]}
ADAPTER = {"kind": "dora", "r": 8, "alpha": 16.0, "dropout": 0.1, "targets": ["qkv_proj", "out_proj"]}


@pytest.fixture(autouse=True)
def few_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures: the tests look at what is said, not at the pixels."""
    monkeypatch.setattr(plots, "DOTS_PER_INCH", 40)


def write_run(folder: Path, records: list[dict[str, Any]], summary: dict[str, Any] | None, **sections: Any) -> Path:
    source = {"name": "words", "path": "words.jsonl", "format": "preference" if "preference" in sections else "chat"}
    data = {"sources": [source], "loss_on": "answers"}
    config = {
        "geometry": GEOMETRY,
        "train": {"steps": 100},
        "model": {"path": "someone/<base>"},
        "data": data,
        **sections,
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "data.json").write_text(json.dumps({"model": "1", "account": ACCOUNT}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def train(step: int, loss: float) -> dict[str, Any]:
    timing = {"elapsed_s": 0.8 * step, "step_s": 0.8, "tokens_per_s": 10240.0, "mfu": 0.41, "memory_bytes": 2**30}
    record = {"kind": "train", "step": step, "loss": loss, "grad_norm": 0.8, "lr": 1e-3, "tokens": 8192 * step}
    return record | {"timing": timing}


def examples() -> list[dict[str, Any]]:
    records = [train(step, 3.0 - step / 100) | {"cross_entropy": 2.9 - step / 100} for step in range(10, 101, 10)]
    records += [{"kind": "validation", "step": step, "loss": 2.5 - step / 200, "tokens": 700} for step in (50, 100)]
    return [*records, {"kind": "examples", "step": 100, "epoch": 1.25, "examples": 100}]


def pairs() -> list[dict[str, Any]]:
    def figures(step: int) -> dict[str, float]:
        return {"reward_chosen": step / 500, "reward_rejected": -step / 250, "margin": 3 * step / 500}

    records = [train(step, 0.7) | figures(step) | {"accuracy": 0.5} for step in range(10, 101, 10)]
    for step, accuracy in ((50, 0.55), (100, 0.625)):
        found = {"loss": 0.68, "accuracy": accuracy, "accuracy_stderr": 0.05, "pairs": 100, **figures(step)}
        records.append({"kind": "validation", "step": step, **found})
    return records


def report(run: Path, trained: int = 0) -> str:
    return write_report(run, lambda _: "", trained).read_text(encoding="utf-8")


def test_an_adapter_on_examples(tmp_path):
    held_out = {"last": {"loss": 2.0, "tokens": 700}, "averaged": {"loss": 1.9375, "tokens": 700}}
    sample = {"prompt": "Why?", "text": "So."}
    summary = {"steps": 100, "tokens": 4096, "held_out": held_out, "examples": ACCOUNT, "sample": sample}
    text = report(write_run(tmp_path / "run", examples(), summary, adapter=ADAPTER), trained=24_800)
    assert "Parameters trained</dt><dd>24.8k<small>beside the model&#x27;s 4,931,200" in text
    assert "Held-out loss</dt><dd>1.938<small>best: averaged" in text
    # The z-loss is left out, as it is of the held-out loss.
    assert "Loss (nats per token): training from 2.8 to 2" in text and "held out from 2.25 to 2." in text
    assert "<td>last</td><td>2.0000</td><td>700</td>" in text and "<td>averaged</td><td>1.9375</td>" in text
    assert "dora: r 8, alpha 16, dropout 0.1, on qkv_proj, out_proj" in text
    assert "24,800, 0.50% of the model&#x27;s 4,931,200" in text
    assert "someone/&lt;base&gt;" in text and "next token, of answers" in text and "words.jsonl (chat)" in text
    assert "1.25 epochs of 100 examples by step 100. Too long, and cut: 9 prompts." in text
    assert "<td>trained on</td><td>100</td><td>76.92%</td>" in text and "<td>empty answer</td><td>3</td>" in text
    assert "long prompt" not in text and "Beside plain compressors" not in text
    assert "<pre><b>Why?</b>\n\nSo.</pre>" in text  # an answer does not go on in the prompt's line
    assert not list((tmp_path / "run" / "report").glob("validation.png"))


def test_pairs_show_accuracy_with_its_error_and_the_rewards(tmp_path):
    run = write_run(tmp_path / "run", pairs(), None, preference={"loss": "hinge", "beta": 0.01, "label_smoothing": 0.0})
    text = report(run)
    assert "Held-out accuracy</dt><dd>62.5%<small>± 5.0% (step 100)" in text  # the run is not done
    assert "Loss (hinge, a pair): training from" in text
    assert "Chosen preferred (share): training from 0.5 to 0.5, held out from 0.55 to 0.625." in text
    assert "Rewards, held-out pairs: chosen from 0.1 to 0.2, rejected from -0.2 to -0.4." in text
    assert "Margin between rewards: training from 0.06" in text
    head = "<th>model</th><th>loss</th><th>accuracy</th><th>reward of chosen</th><th>of rejected</th><th>margin</th>"
    assert head in text
    assert "<td>0.6250 ± 0.0500</td><td>0.2000</td><td>-0.4000</td><td>0.6000</td><td>100</td>" in text
    assert "<td>hinge, beta 0.01</td>" in text and "<td>all weights</td>" in text
    # What became of the records is known from the beginning.
    assert "<td>held out unused</td><td>7</td>" in text
    names = {path.stem for path in (run / "report").glob("*.png")}
    assert {"loss", "accuracy", "rewards", "margin", "lr", "grad_norm"} <= names


def test_without_held_out_pairs_the_rewards_are_those_of_training(tmp_path):
    records = [record for record in pairs() if record["kind"] == "train"]
    text = report(write_run(tmp_path / "run", records, {"steps": 100, "held_out": {}}, preference={"loss": "ipo"}))
    assert "Rewards, training: chosen from 0.02" in text and "Held-out" not in re.sub("<style.*?</style>", "", text)


@pytest.mark.parametrize(
    "sections", [{"data": None}, {"adapter": {"kind": 3}}, {"preference": {"loss": None}}, {"data": {"sources": [1]}}]
)
def test_a_run_that_has_hardly_begun_still_has_a_page(tmp_path, sections):
    run = write_run(
        tmp_path / "run", [{"kind": "train", "step": 1}, {"kind": "validation", "step": 1}], None, **sections
    )
    assert "What was trained" in report(run)
    (run / "metrics.jsonl").unlink()
    (run / "data.json").write_text("[")
    assert "Nothing has been logged yet." in report(run)
