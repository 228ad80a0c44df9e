"""What each command promises, looked at after exit code 0 in a newcomer's folder: files that open, figures that fit."""

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loopback_hub import Hub
from newcomer import CORENET_STEPS, QUESTIONS
from openelm.config import load_recipe
from openelm.data.pairs import CUT
from openelm.evaluate import suites, tasks
from openelm.interop.convert import open_source
from openelm.interop.gguf import open_gguf
from openelm.model.folder import load_model
from openelm.study.ablation import load_ablation
from openelm.study.sweep import PAPER_GRID, parse_grid, settings
from openelm.tuning_config import load_tuning


@dataclass(frozen=True)
class Done:
    """A command that has run: its name, its arguments, what it printed, and the Hub that it had."""

    command: str
    given: argparse.Namespace
    out: str
    hub: Hub


def result_of(command: str, given: argparse.Namespace) -> Path | None:
    """The file or folder that a command makes, and so finds nowhere before."""
    if command == "convert":
        return Path(given.destination)
    if command == "pretrain":
        return Path(given.run or f"runs/{given.recipe}")
    if command in ("finetune", "dpo"):
        return Path(given.run or f"runs/{load_tuning(given.recipe, given.overrides).name}")
    if command in ("reject", "merge", "quantize"):
        return Path(given.out)
    return Path(given.run) / "report" if command == "report" else None


def converted(done: Done) -> None:
    """The result is read back, with as many parameters as the command says."""
    place, to = Path(done.given.destination), done.given.to
    if to in ("gguf", "ollama"):
        source = open_gguf(place / "model.gguf" if to == "ollama" else place, dequantize=True)
    else:
        source = open_source(str(place))
    assert done.out.startswith(f"{place}: {source.config.num_parameters():,} parameters, ")
    assert all(source.weight(name).isfinite().all() for name in source.shapes)
    if to in ("gguf", "ollama") or (to == "hf" and done.given.tokenizer):
        assert source.tokenizer is not None
    if to == "mlx":
        assert json.loads((place / "config.json").read_text())["quantization"]["bits"] == 4
    if to == "ollama":
        assert "TEMPLATE" in (place / "Modelfile").read_text()
    if done.given.vocab_size:
        assert source.config.vocab_size == done.given.vocab_size


def trained(done: Done) -> None:
    """The run ends at the step that was asked for, with a model; evaluated, or gone on with, where that was asked."""
    run, train = result_of(done.command, done.given), load_recipe(done.given.recipe, done.given.overrides).train
    entries = entries_of(run)
    first = CORENET_STEPS + 1 if train.init_optimizer else 1
    steps = [entry["step"] for entry in entries if entry["kind"] == "train"]
    assert steps == list(range(first, train.steps + 1))[:: train.log_every]
    assert json.loads((run / "summary.json").read_text())["steps"] == train.steps
    assert load_model(run / "model").config.num_transformer_layers == 2
    assert f"model:  {run / 'model'}" in done.out
    live = {spec.task for spec in tasks.parse(train.evaluate_tasks)} if train.evaluate_every else set()
    assert {entry["task"] for entry in entries if entry["kind"] == "evaluation"} == live


def tuned(done: Done) -> None:
    """All records are accounted for, the steps made; a model that has learned, with its adapter where there is one."""
    run, config = result_of(done.command, done.given), load_tuning(done.given.recipe, done.given.overrides)
    if done.given.dry_run:
        assert not run.exists() and re.search(r"^parameters trained +[1-9]", done.out, re.MULTILINE)
        assert re.search(rf"^steps +{config.train.steps}$", done.out, re.MULTILINE)
        return
    summary = json.loads((run / "summary.json").read_text())
    account = summary["examples"]
    assert account["trained_on"] > 0
    assert account.pop("records") == sum(count for name, count in account.items() if name not in CUT)
    steps = [entry for entry in entries_of(run) if entry["kind"] == "train"]
    assert [entry["step"] for entry in steps] == list(range(1, summary["steps"] + 1))
    assert summary["steps"] == config.train.steps
    if done.command == "dpo":  # before anything is learned all pairs are ties, which count as wrong
        assert steps[0]["accuracy"] == steps[0]["margin"] == 0 < steps[0]["loss"]
    model, base = load_model(run / "model"), load_model(config.model.path)
    tokens = torch.tensor([[1, 300, 400]])
    assert not torch.equal(model(tokens), base(tokens))
    assert f"model:  {run / 'model'}" in done.out
    assert (run / "adapter" / "adapter_config.json").is_file() == (config.adapter is not None)


def entries_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def merged(done: Done) -> None:
    """A model folder, which computes what the run's own merged model does."""
    model = load_model(done.given.out)
    assert done.out.startswith(f"{done.given.out}: {model.config.num_parameters():,} parameters, ")
    assert ("merged and unmerged agree" in done.out) == done.given.verify
    tokens = torch.tensor([[1, 300, 400]])
    expected = load_model(Path(done.given.adapter).with_name("model"))(tokens)
    assert (model(tokens) - expected).abs().max() < 1e-4


def quantized(done: Done) -> None:
    """A folder in the bits that were asked for, near to its model on text of its own."""
    given, source = done.given, open_source(done.given.out)
    how = json.loads(Path(given.out, "config.json").read_text())["quantization"]
    assert (how["bits"], how["group_size"]) == (given.bits, given.group_size) and source.quantized
    assert done.out.startswith(f"{given.out}: {given.bits} bits in groups of {given.group_size}")
    assert float(re.search(r"KL ([\d.]+) nats", done.out)[1]) < (0.002 if given.bits == 8 else 0.1)


def evaluated(done: Done) -> None:
    """A row for each model, with a figure for each task."""
    rows = [line for line in done.out.splitlines() if " ± " in line]
    assert rows and not any("| - |" in row for row in rows)
    for model in done.given.models:
        # A run has a row for each checkpoint and one for its model, under its own name.
        is_run = Path(model, "checkpoints").is_dir()
        label = Path(model).name if is_run else model.replace("/", "-")
        wanted = 1 + len(list(Path(model, "checkpoints").iterdir())) if is_run else 1
        assert sum(label in row for row in rows) == wanted, done.out


def looked_at(done: Done) -> None:
    """The account adds up, the rows have a checksum, the questions are compared with the text."""
    given = done.given
    if given.action == "inspect":
        assert re.search(r"\n[1-9]\d* documents, [1-9]\d* pieces", done.out)
    elif given.action == "count":
        counts = dict(re.findall(r"^(\w[a-z ]*?)  +([\d,]+)", done.out, re.MULTILINE))
        documents, *fates = (
            int(counts[name].replace(",", ""))
            for name in ("documents", "kept", "too few characters", "too few tokens", "undecodable", "held out")
        )
        assert documents == sum(fates) > 0
    elif given.action == "hash":
        assert re.search(r"\b[0-9a-f]{64}\b", done.out)
    elif given.json:
        sets = {one["set"]: one["examples"] for one in json.loads(done.out)["sets"]}
        assert sets == dict.fromkeys((spec.task for spec in suites.suite(given.suite)), QUESTIONS)
    elif given.tests:
        assert re.search(r"^questions\S* +1 +0 +1 +100\.00%$", done.out, re.MULTILINE), done.out
    else:
        for task in given.tasks.split(","):
            assert re.search(rf"^{task} +{QUESTIONS} +0 ", done.out, re.MULTILINE), done.out


def pushed(done: Done) -> None:
    """The weights are in the repository, on the branch that was asked for; a dry run asks the Hub nothing."""
    source, given = Path(done.given.source), done.given
    if given.dry_run:
        assert done.hub.requests == [] and "model.safetensors" in done.out
        return
    is_run = (source / "checkpoints").is_dir()
    repository = done.hub.repositories[given.repo]
    weights = (source / "model" if is_run else source) / "model.safetensors"
    assert repository.at(given.revision)[1]["model.safetensors"] == weights.read_bytes()
    assert repository.private == given.private
    steps = {f"step-{int(path.name[5:])}" for path in source.glob("checkpoints/step_*")}
    assert steps <= set(repository.branches) and bool(steps) == is_run


def paired(done: Done) -> None:
    """A preference set, in which the reward of the chosen answer is the higher one."""
    pairs = [json.loads(line) for line in Path(done.given.out).read_text().splitlines()]
    assert pairs and all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert all({"prompt", "chosen", "rejected"} <= pair.keys() for pair in pairs)


def swept(done: Done) -> None:
    """A line for each point of the grid, each with a training of its own."""
    grid = parse_grid(done.given.grid) or PAPER_GRID
    lines = done.out.splitlines()
    assert len(set(lines)) == len(lines) == math.prod(map(len, grid.values()))
    for line, point in zip(lines, itertools.product(*grid.values()), strict=True):
        assert all(change in line for change in settings(dict(zip(grid, point, strict=True)))), line


def ablated(done: Done) -> None:
    """A row for each kind of each size, or the runs by which each kind finds its rate, which come first."""
    ablation = load_ablation(done.given.recipe, done.given.overrides)
    if done.given.commands:
        runs = [re.search(r"--run \S+/(\S+) ", line)[1] for line in done.out.splitlines()]
        assert runs == [trial.name for trial in ablation.tuning()]
        return
    rows = re.findall(r"^\| (\S+) +\| ([\w, -]+?) +\| +[\d,]+ \|", done.out, re.MULTILINE)
    assert rows == list(dict.fromkeys((trial.size, trial.label) for trial in ablation.final(ablation.untuned())))


def averaged(done: Done) -> None:
    folder, steps = re.fullmatch(r"(\S+): the mean of the checkpoints of steps ([\d, ]+)\n", done.out).groups()
    assert len(steps.split(",")) == done.given.last
    assert load_model(folder).config == load_model("runs/demo/model").config


def drawn(done: Done) -> None:
    page = result_of(done.command, done.given) / "index.html"
    assert done.out == f"{page}\n" and "<html" in page.read_text(encoding="utf-8")


def measured(done: Done) -> None:
    if done.given.kind == "generate":
        for case in ("64+4", "32+1"):
            assert re.search(rf"^\| \S+ +\| +[\d.]+ B \| +{re.escape(case)} \| +[\d,.]+ \|", done.out, re.MULTILINE)
        return
    speed = "tokens per s" if done.given.kind == "train" else "pipeline bytes per s"
    assert float(re.search(rf"^{speed} +([\d.,]+)", done.out, re.MULTILINE)[1].replace(",", "")) > 0


def planned(done: Done) -> None:
    name = f"OpenELM-{done.given.size}" if done.given.size else f"recipe {done.given.recipe}"
    assert done.out.startswith(f"{name} on {done.given.gpus} x ") and "memory of a rank" in done.out


def written(done: Done) -> None:
    if done.given.json:
        account = json.loads(done.out)
        drafts, made = account["speculation"], account["completion_tokens"]
        assert account["completion"] and drafts["accepted"] > 0
        # The prompt gives the first token, and each pass one beside those that it accepts.
        assert account["finish_reason"] != "length" or made == 1 + drafts["passes"] + drafts["accepted"]
        return
    assert done.out.startswith(done.given.prompt) and len(done.out) > len(done.given.prompt) + 1


def talked(done: Done) -> None:
    """One message was typed, and it was answered."""
    assert done.out.strip()


def served(done: Done) -> None:
    """It says where it is. That a client was answered there, test_docs.py asks."""
    assert re.search(r" at http://127\.0\.0\.1:\d+ \((chat|completions)", done.out)


def described(done: Done) -> None:
    if done.given.like:
        found = f"{done.given.kind} twin of OpenELM-{done.given.like}:" if done.given.kind else "\nuniform "
        assert found in done.out and "none is within" not in done.out
        return
    assert done.given.target == "1.1B" and "1,079,891,456" in done.out


def listed(done: Done) -> None:
    assert torch.__version__ in done.out


PROMISES: dict[str, Callable[[Done], None]] = {
    "ablate": ablated,
    "average": averaged,
    "bench": measured,
    "chat": talked,
    "serve": served,
    "convert": converted,
    "data": looked_at,
    "dpo": tuned,
    "env": listed,
    "evaluate": evaluated,
    "finetune": tuned,
    "generate": written,
    "info": described,
    "merge": merged,
    "plan": planned,
    "pretrain": trained,
    "push": pushed,
    "quantize": quantized,
    "reject": paired,
    "report": drawn,
    "sweep": swept,
}
