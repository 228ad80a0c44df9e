"""Real questions and a model of the demo's size: does tuning teach it to choose? docs/log.md has the figures."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import cli

DEMO = Path(__file__).parents[2] / "runs" / "demo" / "model"
SETS = ("ARC-Easy", "openbookqa")
TUNED = {"global_batch": 8, "micro_batch": 8, "lr": 1e-3, "min_lr": 1e-5, "warmup_ratio": 0.05, "weight_decay": 0.1}
PREFERRED = {"global_batch": 16, "micro_batch": 16, "lr": 3e-4, "warmup_ratio": 0.1}


def question(record: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The question as lm-eval's arc_easy puts it, and what there is to choose from."""
    text, *rest = re.split(r"\s*Answer(\d): ", record["instruction"].split("\n\nAnswer format")[0])
    text = text.removeprefix("Please choose the correct answer to the question: ").strip()
    answers = {f"answer{number}": answer.strip() for number, answer in zip(rest[::2], rest[1::2], strict=True)}
    return f"Question: {text}\nAnswer:", answers


def write(file: Path, records: list[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def tune(command: str, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, **recipe}))
    assert cli.run([command, str(file), "--run", str(folder / name)]) == 0
    summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return summary["held_out"]


def accuracy(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> tuple[float, float]:
    capsys.readouterr()
    out = str(model.parent / "evaluation")
    assert cli.run(["evaluate", str(model), "--tasks", "arc_easy", "--data", str(data), "--out", out, "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)["evaluations"][0]["tasks"].values()
    return task["metrics"]["acc_norm"], task["metrics"]["acc_norm_stderr"]


@pytest.mark.slow  # minutes on a quiet machine
@pytest.mark.skipif(not DEMO.is_dir(), reason="takes the model of `make demo`")
def test_it_learns_to_choose_better_than_any_constant_answer(shared, tmp_path, capsys):
    commonsense, data = shared / "data" / "commonsense", shared / "data" / "evaluation"
    examples, pairs = [], []
    for name in SETS:
        for record in json.loads((commonsense / name / "train.json").read_text()):
            prompt, answers = question(record)
            right = f" {answers.pop(record['answer'])}"
            examples.append({"prompt": prompt, "answer": right})
            pairs += [{"prompt": prompt, "chosen": right, "rejected": f" {wrong}"} for wrong in answers.values()]
    for record in json.loads((commonsense / "boolq" / "train.json").read_text()):
        text = re.search(r"question: (.*?)\n", record["instruction"])[1]
        answer = " yes" if record["answer"] == "true" else " no"
        examples.append({"prompt": f"Question: {text}?\nAnswer:", "answer": answer})

    texts = {"name": "examples", "path": write(tmp_path / "examples.jsonl", examples), "format": "prompt"}
    held_out = tune(
        "finetune",
        tmp_path,
        "tuned",
        {
            "model": {"path": str(DEMO)},
            "data": {"sources": [texts], "row_length": 256, "packing": "pack", "loss_on": "all", "held_out": 0.02},
            "train": {"epochs": 4, "validate_every": 200, "log_every": 10, "dtype": "float32", **TUNED},
        },
    )
    assert held_out["last"]["loss"] < held_out["before"]["loss"] - 1
    model = tmp_path / "tuned" / "model"
    reached, error = accuracy(model, data, capsys)
    test = [json.loads(line) for line in (data / "ai2_arc" / "ARC-Easy" / "test.jsonl").read_text().splitlines()]
    places = [entry["choices"]["label"].index(entry["answerKey"]) for entry in test]
    assert reached > max(map(places.count, range(5))) / len(test) + 3 * error

    preferences = {"name": "pairs", "path": write(tmp_path / "pairs.jsonl", pairs), "format": "preference"}
    held_out = tune(
        "dpo",
        tmp_path,
        "preferred",
        {
            "model": {"path": str(model)},
            "data": {"sources": [preferences], "row_length": 192, "held_out": 0.06, "validation_examples": 2000},
            "preference": {"loss": "sigmoid", "beta": 0.1},
            "train": {"steps": 400, "validate_every": 200, "log_every": 10, "dtype": "float32", **PREFERRED},
        },
    )
    # Three pairs of a question are no three witnesses: the error is that of as many questions.
    questions = held_out["last"]["pairs"] / 3
    assert held_out["last"]["accuracy"] > 0.5 + 3 * math.sqrt(0.25 / questions)
