"""The report page of a run: what it says of finished, unfinished, killed and resumed runs."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import UserError
from openelm.report import plots
from openelm.report.page import write_report
from openelm.report.run_files import read_metrics, read_run

CONFIG = """\
geometry:
  name: demo
  num_parameters: 4931200
  num_transformer_layers: 8
  model_dim: 256
  head_dim: 64
  num_gqa_groups: 4
  num_query_heads: [4, 4, 4, 8, 8, 8, 8, 12]
  num_kv_heads: [1, 1, 1, 2, 2, 2, 2, 3]
  ffn_dims: [128, 256, 384, 512, 640, 768, 896, 1024]
  vocab_size: 4096
  max_context_length: 256
train:
  steps: 300
data:
  note: "a < b"
"""
ENVIRONMENT = {"python": "3.11.9", "hardware": {"cpu": "Two cores", "threads": 2}, "git": {"revision": "abc123"}}
SUMMARY: dict[str, Any] = {
    "steps": 300,
    "tokens": 2457600,
    "elapsed_s": 250.0,
    "bits_per_byte": {"last": 1.75, "averaged": 1.731, "order-0 bytes": 4.617, "xz -9": 1.742},
    "sample": {"prompt": "def ", "text": "def final(self):\n    return 1"},
}


def train(step: int, loss: float) -> dict[str, Any]:
    timing = {"elapsed_s": 0.8 * step, "step_s": 0.8, "tokens_per_s": 10240.0 + step, "mfu": 0.41}
    timing |= {"data_wait_s": 0.002, "memory_bytes": 2**30}
    record = {"kind": "train", "step": step, "loss": loss, "cross_entropy": loss, "z_loss": 0.004}
    return record | {"grad_norm": 0.8, "lr": 1e-3, "tokens": 8192 * step, "timing": timing}


def metrics(steps: int = 300) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        noise = 0.05 * math.sin(1.7 * step)
        records.append(train(step, 3.0 + 5.5 * math.exp(-step / 60) + noise))
        if step % 50 == 0:
            score = 1.75 + 1.6 * math.exp(-step / 80)
            records.append({"kind": "validation", "step": step, "bits_per_byte": score, "tokens": 30000})
            records.append({"kind": "sample", "step": step, "prompt": "def ", "text": f"def step_{step}(self):"})
            source = {"documents": 3 * step, "tokens": 8192 * step, "bytes": 25000 * step, "epoch": 1}
            account = {"documents": 3 * step, "kept": 3 * step - 16, "too_few_characters": 10}
            account |= {"too_few_tokens": 5, "undecodable": 1, "invalid_utf8": 0, "held_out": 0}
            # Counted too, but no part of the documents: they once filled the whole bar.
            account |= {"pieces": 9 * step, "bytes": 25000 * step, "tokens": 8192 * step, "corrupt_files": 0}
            records.append({"kind": "data", "step": step, **account, "sources": {"python": source}})
    return records


def write_run(folder: Path, records: list[dict[str, Any]], summary: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(autouse=True)
def few_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures: the tests look at what is said, not at the pixels."""
    monkeypatch.setattr(plots, "DOTS_PER_INCH", 40)


def report(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_finished_run_shows_its_numbers_and_keeps_its_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", metrics(), SUMMARY)
    text = report(run)
    assert "<h1>my run</h1>" in text
    assert "Finished after 300 steps." in text
    for figure in ("4.93M", "4,931,200", "2.46M", "1.731<small>best: averaged", "4 min 10 s", "MFU 41%", "1.00 GiB"):
        assert figure in text
    assert "order-0 bytes 4.617, xz -9 1.742" in text  # the bars
    assert "62.5% below order-0 bytes, 0.6% below xz -9" in text
    assert "order-0 bytes 4.62; xz -9 1.74" in text  # the reference lines
    assert "Waiting for data took 0.25% of the step time." in text
    assert "hardware.threads" in text and "git.revision" in text and "a &lt; b" in text
    names = {"loss", "validation", "comparison", "heads", "ffn", "lr", "grad_norm", "tokens_per_s"}
    found = list((run / "report").iterdir())  # nothing under a temporary name is left
    assert {path.name for path in found} == {f"{name}.png" for name in names} | {"index.html"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found if path.suffix == ".png")


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "run", metrics(), SUMMARY))
    targets = re.findall(r'\b(?:src|srcset|href)="([^"]*)"', text)
    assert len(targets) == 16 and all(target.startswith("data:image/png;base64,") for target in targets)
    assert not re.search(r"http|url\(|@import|<script|<link|<iframe|\$[a-z]", re.sub(r"base64,[\w+/=]+", "", text))


def test_markup_in_samples_prompts_and_names_is_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script></pre>\x00\ud800 $name & end"
    records = [*metrics(50), {"kind": "sample", "step": 60, "prompt": "<b onclick=x>", "text": nasty}]
    text = report(write_run(tmp_path / "<i>run", records))
    assert "<script" not in text and "<i>run" not in text and "<b onclick" not in text and "\x00" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;/pre&gt;\N{REPLACEMENT CHARACTER}? $name &amp; end" in text


def test_unfinished_run_says_how_far_it_came(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "run", metrics(200)))
    assert "still running, or stopped, at step 200 of 300." in text
    assert "best: validation at step 200" in text
    assert "Beside plain compressors" not in text
    assert text.index("def </b>step_200") < text.index("def </b>step_50(")
    assert text.count("<details open>") == 1


def test_finished_models_sample_is_first_and_open(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "run", metrics(), SUMMARY))
    first = text[text.index("<details open>") :]
    assert first.index("The finished model") < first.index("def </b>final(self)") < first.index("Step 300")


def test_data_account_is_the_last_one(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "run", metrics(), SUMMARY))
    assert "900 documents read by step 300." in text
    assert "<td>kept</td><td>884</td><td>98.22%</td>" in text
    assert "<td>too few characters</td><td>10</td><td>1.11%</td>" in text
    assert "<td>python</td><td>900</td><td>2,457,600</td><td>7,500,000</td><td>1</td>" in text


def test_torn_last_line_and_unknown_kinds_are_ignored(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [*metrics(100), {"kind": "weather", "step": 100, "loss": [1]}])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(json.dumps(train(110, 2.0)).encode()[:-20] + b"\xc3")
    assert [record["step"] for record in read_run(run).of_kind("train")] == list(range(10, 101, 10))
    assert "at step 100 of 300" in report(run)


def test_resumed_steps_replace_those_of_the_killed_life() -> None:
    killed = [train(10, 5.0), train(20, 4.0), {"kind": "validation", "step": 20, "loss": 4.0}, train(30, 3.9)]
    resumed = [train(20, 4.5), {"kind": "validation", "step": 20, "loss": 4.5}, train(40, 3.0)]
    lines = [json.dumps(record) for record in killed + resumed]
    lines.insert(4, lines[3][:30])  # the torn line stays in the middle when a run goes on
    kept = read_metrics("\n".join(lines))
    assert sorted((r["kind"], r["step"], r["loss"]) for r in kept) == [
        ("train", 10, 5.0),
        ("train", 20, 4.5),
        ("train", 40, 3.0),
        ("validation", 20, 4.5),
    ]


def test_two_prompts_at_one_step_are_both_shown() -> None:
    lines = [json.dumps({"kind": "sample", "step": 5, "prompt": p, "text": p}) for p in ("def ", "class ")]
    assert [record["prompt"] for record in read_metrics("\n".join(lines))] == ["def ", "class "]


@pytest.mark.parametrize(
    "config", ["", "geometry: {}\n", "geometry: [1\n", "geometry: {num_query_heads: 4}\ntrain: 3\n"]
)
def test_sparse_run_still_gives_a_page(tmp_path: Path, config: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config)
    (run / "summary.json").write_text('{"bits_per_byte": {"last": null}, "sample": null}')
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2, "loss": NaN}\n')
    assert "Learning curve" in report(run)
    (run / "metrics.jsonl").unlink()
    assert "Nothing has been logged yet." in report(run)


def test_uniform_model_stands_at_the_mean_of_the_layers(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "run", metrics(10)))
    assert "Query heads from 4 to 12; uniform 7." in text
    assert "FFN width from 128 to 1,024; uniform 576." in text


def test_second_report_replaces_the_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics(100))
    report(run)
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    assert "No summary yet" not in report(run)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither config\.yaml nor metrics\.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_missing_matplotlib_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", metrics(10))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'openelm-framework\[plot\]'"):
        write_report(run)
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(4931200, "4.93M"), (999_700, "1M"), (999_400, "999k"), (12, "12"), (0.0012, "0.0012"), (0, "0")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert plots.short_number(value) == text


def test_running_mean_follows_a_straight_line_and_passes_over_nan() -> None:
    line = [float(value) for value in range(240)]
    # A window reaches four points to each side; the last four hold its last mean.
    assert plots.running_mean(line) == pytest.approx([*line[:-4], *[235.0] * 4])
    assert plots.running_mean([1.0, math.nan, 3.0, 5.0]) == [1.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize(("elapsed_s", "text"), [(59.7, "1 min 00 s"), (12, "12 s"), (7500, "2 h 05 min")])
def test_durations(elapsed_s: float, text: str) -> None:
    assert plots.duration(elapsed_s) == text


def test_steps_out_of_the_ordinary_are_listed_wherever_they_stand_in_the_file(tmp_path: Path) -> None:
    records = metrics()
    # The host learns of a step some steps later: what was written in between must stay.
    late = {"kind": "guard", "step": 95, "problem": "spike", "action": "skipped", "loss": 9.125, "grad_norm": "inf"}
    records.insert([record["step"] for record in records].index(120), late)
    text = report(write_run(tmp_path / "run", records, SUMMARY))
    assert re.search(r"95.*spike.*skipped.*9\.125.*inf", text, re.DOTALL)
    assert "Finished after 300 steps." in text
    files = read_run(tmp_path / "run")
    assert [record["step"] for record in files.of_kind("train")] == list(range(10, 301, 10))
