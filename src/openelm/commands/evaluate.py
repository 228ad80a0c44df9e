"""openelm evaluate: the paper's suites, measured with lm-evaluation-harness on our engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.commands.generate import add_engine_arguments
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.evaluate.results import Evaluation
    from openelm.evaluate.subjects import Subject
    from openelm.evaluate.suites import Spec

HELP = "Measure models on the paper's suites, or on any task of lm-evaluation-harness."
EXAMPLE = "openelm evaluate runs/demo/model --tasks arc_easy,winogrande@5 --data my-data --limit 200"
TABLES = {"zero-shot": "4a", "openllm": "4b", "llm360": "4c", "commonsense": "6"}  # of the paper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm evaluate``."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="*", help="model folders, checkpoints, runs (all their checkpoints), Hub ids"
    )
    parser.add_argument("--suite", metavar="NAME", help="zero-shot, openllm, llm360, commonsense, safety or all")
    parser.add_argument("--tasks", metavar="A,B@5", help="lm-eval's tasks instead, with the number of shots behind @")
    parser.add_argument("--data", metavar="FOLDER", help="take the data from local files instead of the Hub")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    parser.add_argument(
        "--out", metavar="FOLDER", help="where results are kept (default: RUN/evaluation, else evaluations/)"
    )
    parser.add_argument(
        "--engine", choices=("openelm", "transformers"), default="openelm", help="who computes (default: openelm)"
    )
    parser.add_argument("--no-bos", action="store_true", help="texts begin without a BOS")
    parser.add_argument("--chat", action="store_true", help="prompts as conversations, by the model's chat template")
    parser.add_argument("--card", action="store_true", help="write the figures into the model's README.md as well")
    parser.add_argument("--prefetch", action="store_true", help="download the tasks' data into the cache, and end")
    parser.add_argument("--table", choices=("markdown", "latex"), default="markdown", help="form of the table")
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="all results as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure what is not measured yet, write it down task by task, and show the table."""
    specs = chosen_specs(args)
    if args.prefetch:
        return prefetch(specs)
    if not args.models:
        raise UserError("name a model to evaluate: a model folder, a run, or a Hub id")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1")
    from openelm.evaluate.subjects import find

    out = Path(args.out) if args.out else None
    subjects = [subject for reference in args.models for subject in find(reference, out)]
    set_threads(args)
    evaluations, failures = [], []
    for subject in subjects:
        evaluation, problems = measure_all(args, subject, specs)
        evaluations.append(evaluation)
        failures += [f"{subject.label}: {problem}" for problem in problems]
        if args.card:
            write_card(subject, evaluation, specs)
    if args.json:
        print(json.dumps({"evaluations": [asdict(evaluation) for evaluation in evaluations], "failures": failures}))
    else:
        print(shown(args, evaluations, specs))
    for failure in failures:
        print(f"not measured: {failure}", file=sys.stderr)
    return 2 if failures else 0


def chosen_specs(args: argparse.Namespace) -> tuple[Spec, ...]:
    """The tasks that --suite or --tasks names."""
    from openelm.evaluate import suites, tasks

    if bool(args.suite) == bool(args.tasks):
        raise UserError(f"choose what to measure: --suite ({', '.join(suites.names())}) or --tasks, one of the two")
    return suites.suite(args.suite) if args.suite else tasks.parse(args.tasks)


def prefetch(specs: Sequence[Spec]) -> int:
    """Fill the cache, for machines without a network."""
    from openelm.evaluate import tasks

    fetched = tasks.prefetch(specs, lambda found: print(f"{found.task}: {found.examples:,} examples", file=sys.stderr))
    print(f"{len(fetched)} tasks, {sum(found.bytes for found in fetched) / 1e6:,.1f} MB in the cache")
    return 0


def set_threads(args: argparse.Namespace) -> None:
    """CPU threads, where --threads names a number."""
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads {args.threads} must be at least 1")
        torch.set_num_threads(args.threads)


def measure_all(args: argparse.Namespace, subject: Subject, specs: Sequence[Spec]) -> tuple[Evaluation, list[str]]:
    """What is known of a model after this, and what could not be measured: the other tasks are, all the same."""
    from openelm.environment import environment
    from openelm.evaluate import harness, tasks
    from openelm.evaluate.subjects import open_lm
    from openelm.model.folder import DTYPES

    evaluation = subject.begun(f"{args.dtype or 'as stored'} ({args.engine})", environment())
    # Answers are of these weights in this dtype: those of an interrupted run with others must not be taken for them.
    kind = f"{evaluation.model['digest'][:8]}-{args.dtype or 'stored'}"
    answers = subject.results.with_suffix(f".{kind}.answers.jsonl")
    problems: list[str] = []
    lm: Any = None
    for spec in specs:
        if is_measured(evaluation, spec, args):
            continue
        try:
            loaded = tasks.load(spec, Path(args.data) if args.data else None)
            lm = lm or open_lm(
                subject,
                dtype=DTYPES[args.dtype] if args.dtype else None,
                device=args.device,
                tokenizer=args.tokenizer,
                add_bos=not args.no_bos,
                transformers=args.engine == "transformers",
                answers=answers,
            )
            print(f"{subject.label}: {spec.task}, {spec.shots} shots …", file=sys.stderr, flush=True)
            result = harness.measure(lm, loaded, spec, limit=args.limit, chat=args.chat)
        except UserError as error:
            problems.append(f"{spec.task}: {error}")
            continue
        evaluation = evaluation.with_task(replace(result, chat=args.chat))
        evaluation.save(subject.results)
        if result.truncated:
            print(f"{spec.task}: {result.truncated} prompts were cut to the model's context", file=sys.stderr)
    if not problems:
        answers.unlink(missing_ok=True)  # all that they led to is in the results
    return evaluation, problems


def write_card(subject: Subject, evaluation: Evaluation, specs: Sequence[Spec]) -> None:
    """Put what was measured of all examples into the card of a model of one's own."""
    from openelm.evaluate.tables import measured
    from openelm.files import write_bytes
    from openelm.interop.card import Figure, evaluated_card
    from openelm.interop.source import read_text

    if not Path(subject.origin).exists() or (subject.folder / "manifest.json").is_file():
        return  # of the Hub's cache, or a checkpoint, whose files have checksums
    found = [(spec, measured(evaluation, spec)) for spec in specs]
    figures = [
        Figure(spec.task, spec.shots, spec.metric, result.metrics[spec.metric])
        for spec, result in found
        if result is not None and result.limit is None
    ]
    if figures:
        readme = subject.folder / "README.md"
        card = evaluated_card(read_text(readme) or "", subject.label, figures)
        write_bytes(readme, card.encode("utf-8"))


def is_measured(evaluation: Evaluation, spec: Spec, args: argparse.Namespace) -> bool:
    """Whether this very measurement is there: same task, shots, examples and BOS."""
    return any(
        (found.task, found.shots, found.limit, found.bos, found.chat)
        == (spec.task, spec.shots, args.limit, not args.no_bos, args.chat)
        for found in evaluation.tasks.values()
    )


def shown(args: argparse.Namespace, evaluations: Sequence[Evaluation], specs: Sequence[Spec]) -> str:
    """The paper's table with our rows, where there is one for the suite; else a plain one."""
    from openelm.evaluate import tables

    if args.suite in TABLES:
        name = TABLES[args.suite]
        ours = [tables.own_row(found, name, label=found.model.get("label", "")) for found in evaluations]
        return tables.render(name, ours, args.table, errors=True)
    columns = [f"{spec.task}{f'@{spec.shots}' if spec.shots else ''} {spec.metric}" for spec in specs]
    lines = [f"| model | {' | '.join(columns)} |", "|---" + "|--:" * len(columns) + "|"]
    for found in evaluations:
        cells = [_cell(found, spec, args.limit) for spec in specs]
        lines.append(f"| {found.model.get('label', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(evaluation: Evaluation, spec: Spec, limit: int | None) -> str:
    """Percent and standard error of a measurement; "-" where there is none."""
    for result in evaluation.tasks.values():
        if (result.task, result.shots, result.limit) == (
            spec.task,
            spec.shots,
            limit,
        ) and spec.metric in result.metrics:
            error = result.metrics.get(f"{spec.metric}_stderr")
            return f"{100 * result.metrics[spec.metric]:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")
    return "-"
