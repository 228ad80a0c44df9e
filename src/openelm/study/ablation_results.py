"""What is known of an ablation: results.json, table.md and the pictures, written anew as runs end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openelm.environment import environment
from openelm.files import write_json
from openelm.report.run_files import number, read_run
from openelm.study import ablation_report
from openelm.study.ablation import Trial
from openelm.study.ablation_runs import Runs, Start, read_mapping
from openelm.study.processes import Task, last_lines, say

RESULTS = "results.json"
COUNTED = ("documents", "kept", "pieces", "bytes", "tokens")  # by a run, of what it read
CONTEXT, REPEATS = 64, 5  # of the generation that is measured: tokens made behind as many


def write(runs: Runs, *, pictures: bool) -> dict[str, Any]:
    """Write what is known by now, and return what results.json holds."""
    known = results(runs)
    write_json(runs.out / RESULTS, known)
    ablation_report.write(known, runs.out, pictures=pictures)
    return known


def measure_generation(runs: Runs, start: Start) -> None:
    """How fast the kinds of a size generate: the models of a seed, in turns; again where there are others by now."""
    for size in runs.ablation.bases:
        first = {
            trial.label: trial.name
            for trial in reversed(runs.ablation.final(runs.factors()))
            if trial.size == size and not trial.data and runs.is_trained(trial)
        }
        if not first or set(first.values()) <= _speeds(_bench(runs, size)).keys():
            continue
        folders = [str(runs.out / name) for name in reversed(first.values())]
        tokens = str(min(CONTEXT, runs.ablation.model(size).max_context_length // 2))
        words = ("bench", "generate", *folders, "--context", tokens, "--tokens", tokens, "--repeats", str(REPEATS))
        words += ("--out", str(_bench(runs, size).parent), "--overwrite")
        for task, code in start([Task(words, runs.out / f"generation-{size}.log")]):
            if code:
                say(f"generation at {size} was not measured: it left with {code}{last_lines(task.log, 0)}")


def _bench(runs: Runs, size: str) -> Path:
    return runs.out / "generation" / size / "result.json"


def results(runs: Runs) -> dict[str, Any]:
    """All figures, ready for JSON."""
    ablation, factors = runs.ablation, runs.factors()
    section = ablation.section
    sizes: dict[str, Any] = {}
    for size, base in ablation.bases.items():
        sizes[size] = {
            "steps": ablation.steps(size),
            "tokens": ablation.steps(size) * base.train.global_batch * base.data.row_length,
            "global_batch": base.train.global_batch,
            "row_length": base.data.row_length,
            "lr": base.train.lr,
            "parameters": ablation.model(size).num_parameters(),
            "kinds": {},
        }
    speeds = {size: _speeds(_bench(runs, size)) for size in ablation.bases}
    for trial in ablation.final(ablation.untuned() | factors):
        kind = sizes[trial.size]["kinds"].setdefault(
            trial.label,
            {
                **ablation.about(trial.size, trial.kind),
                "data": section.on_other_data.get(trial.data, {}),
                "like": trial.kind if trial.data else None,
                "lr_factor": factors.get(trial.kind),
                "generation": speeds[trial.size].get(trial.name),  # of its first seed
                "runs": [],
            },
        )
        kind["runs"].append(_record(runs, trial, kind["flops_per_token"]))
    return {
        "name": ablation.name,
        "command": runs.command,
        "reference": section.reference,
        "tokens_per_parameter": section.tokens_per_parameter,
        "within": section.within,
        "held_out": _held_out(runs),
        "sizes": sizes,
        "tuning": _search(runs, factors),
        "environment": environment(),
    }


def _search(runs: Runs, factors: dict[str, float]) -> dict[str, Any] | None:
    found = {kind: {f"{factor:g}": score for factor, score in scores.items()} for kind, scores in runs.found().items()}
    if not found:
        return None
    section = runs.ablation.section
    about = {"size": runs.ablation.smallest, "seed": section.tuning_seed, "share": section.tuning_share}
    return {**about, "found": found, "chosen": factors}


def _held_out(runs: Runs) -> dict[str, int] | None:
    """How much text the runs were judged on, where any was."""
    trials = [*runs.ablation.tuning(), *runs.ablation.final(runs.factors())]
    for trial in filter(runs.is_trained, trials):
        score = runs.score(trial)
        return {"bytes": score["bytes"], "tokens": score["tokens"]}
    return None


def _record(runs: Runs, trial: Trial, flops_per_token: int) -> dict[str, Any]:
    """A run: its seed, and its figures once it is trained."""
    record: dict[str, Any] = {"seed": trial.seed, "bits_per_byte": None, "failure": runs.failure(trial)}
    if not runs.is_trained(trial):
        return record
    files, score = read_run(runs.folder(trial)), runs.score(trial)
    tokens = number(files.summary.get("tokens")) or 0.0
    data, train = runs.ablation.bases[trial.size].data, runs.ablation.bases[trial.size].train
    counted = files.of_kind("data")[-1:] or [{}]
    # By tokens of whole rows, which are the same for all seeds; a few of them, at the seams of pieces, are no targets.
    curve = [
        [entry["step"] * train.global_batch * data.row_length, entry["bits_per_byte"]]
        for entry in files.of_kind("validation")
        if number(entry.get("bits_per_byte")) is not None
    ]
    return {
        **record,
        **{key: score[key] for key in ("bits_per_byte", "rows_sha256", "rows_hashed")},
        "tokens": int(tokens),
        "flops": tokens * flops_per_token,
        "elapsed_s": number(files.summary.get("elapsed_s")),
        "counted": {key: counted[0].get(key) for key in COUNTED},
        "curve": curve,
    }


def _speeds(file: Path) -> dict[str, dict[str, Any]]:
    """Tokens per second by run folder, as the bench found them."""
    rows = read_mapping(file, json.loads)["rows"] if file.is_file() else []
    return {
        row["name"]: {
            "tokens_per_s": speed["median"],
            "least": speed["least"],
            "most": speed["most"],
            "engine": row["about"].get("engine"),
        }
        for row in rows
        if (speed := row["summary"].get("generation_tokens_per_s"))
    }
