"""openelm evaluate: the paper's suites, measured with lm-evaluation-harness on our engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from openelm.commands.generate import add_engine_arguments
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.evaluate.results import Evaluation, How, TaskResult
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
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: results are kept in a folder")
    subjects = named_apart([subject for reference in args.models for subject in find(reference, out)])
    set_threads(args)
    rows: list[tuple[str, Evaluation]] = []
    failures: list[str] = []
    codes: list[int] = []
    for subject in subjects:
        try:
            evaluation, problems = measure_all(args, subject, specs)
            rows.append((subject.label, evaluation))
            if args.card:
                write_card(subject, evaluation, specs, how(args))
        except UserError as error:  # a checkpoint that a running training has deleted, say
            problems = [(str(error), 2)]
        failures += [f"{subject.label}: {problem}" for problem in dict.fromkeys(said for said, _ in problems)]
        codes += [code for _, code in problems]
    if args.json:
        print(json.dumps({"evaluations": [asdict(evaluation) for _, evaluation in rows], "failures": failures}))
    elif any(evaluation.find(spec.task, spec.shots, how(args)) for _, evaluation in rows for spec in specs):
        print(shown(args, rows, specs))
    for failure in failures:
        print(f"not measured: {failure}", file=sys.stderr)
    return min(codes, default=0)  # our mistake (1) before the user's (2)


def how(args: argparse.Namespace) -> How:
    """In what way the arguments ask for tasks to be measured."""
    from openelm.evaluate.results import How

    return How(args.limit, not args.no_bos, args.chat, str(Path(args.data).resolve()) if args.data else "")


def named_apart(subjects: list[Subject]) -> list[Subject]:
    """Rows of a table must not bear one name: where they would, the references are taken."""
    labels = [subject.label for subject in subjects]
    return [replace(s, label=s.origin) if labels.count(s.label) > 1 else s for s in subjects]


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


def measure_all(
    args: argparse.Namespace, subject: Subject, specs: Sequence[Spec]
) -> tuple[Evaluation, list[tuple[str, int]]]:
    """What is known of a model after this; what could not be measured, with exit codes (other tasks are measured)."""
    from openelm.environment import environment
    from openelm.evaluate import harness, tasks
    from openelm.evaluate.subjects import find_tokenizer

    way, tokenizer = how(args), find_tokenizer(subject, args.tokenizer)
    engine = "transformers" if args.engine == "transformers" or not subject.is_openelm else "openelm"
    started = subject.begun(args.dtype or "stored", engine, tokenizer, environment())
    path, evaluation = started.path, started.evaluation
    missing = [spec for spec in specs if evaluation.find(spec.task, spec.shots, way) is None]
    problems: list[tuple[str, int]] = []
    make_lm = opened(args, subject, engine, tokenizer) if missing else None
    for spec in missing:
        assert make_lm is not None
        # A file a task: what an interrupted one has is not lost when another ends.
        answers = path.with_suffix(f".{spec.task}@{spec.shots}.answers.jsonl")
        try:
            loaded = tasks.load(spec, Path(args.data) if args.data else None)
            print(f"{subject.label}: {spec.task}, {spec.shots} shots …", file=sys.stderr, flush=True)
            result = harness.measure(make_lm(answers), loaded, spec, limit=args.limit, chat=args.chat)
        except UserError as error:
            # A message that names its task already, or that is the same for all of them, is said once.
            problems.append((str(error), 2))
            continue
        except Exception as error:
            place = extract_tb(error.__traceback__)[-1]
            said = f"{spec.task}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            problems.append((said, 1))
            continue
        evaluation = evaluation.with_task(replace(result, bos=way.bos, chat=way.chat, data=way.data)).save(path)
        answers.unlink(missing_ok=True)
        if result.truncated:
            print(f"{spec.task}: {result.truncated} requests were cut to the model's context", file=sys.stderr)
    return evaluation, problems


def opened(args: argparse.Namespace, subject: Subject, engine: str, tokenizer: Path | None) -> Callable[[Path], Any]:
    """The model, as a function of the file of answers that makes what lm-eval asks."""
    from openelm.evaluate import harness, tasks
    from openelm.evaluate.subjects import open_engine, open_transformers
    from openelm.model.folder import DTYPES
    from openelm.tune.adapters import merged

    with tasks.quiet():
        pass  # said once, where lm-eval is missing
    dtype = DTYPES[args.dtype] if args.dtype else None
    if engine == "transformers":
        lm = open_transformers(subject, dtype=dtype, device=args.device, tokenizer=tokenizer, add_bos=not args.no_bos)
        return lambda _: lm
    model, template = open_engine(
        subject, dtype=dtype, device=args.device, tokenizer=tokenizer, merge=partial(merged, untie=True)
    )
    return lambda answers: harness.EngineLM(model, add_bos=not args.no_bos, cache=answers, chat_template=template)


def write_card(subject: Subject, evaluation: Evaluation, specs: Sequence[Spec], way: How) -> None:
    """Put what was measured of all examples, in the usual way, into the card of a model of one's own."""
    from openelm.files import write_bytes
    from openelm.interop.card import Figure, evaluated_card
    from openelm.interop.source import read_text

    if way.limit is not None or not way.bos:
        return
    found = [(spec, evaluation.find(spec.task, spec.shots, way)) for spec in specs]
    figures = [
        Figure(spec.task, spec.shots, spec.metric, result.metrics[spec.metric])
        for spec, result in found
        if result is not None and spec.metric in result.metrics
    ]
    for readme in subject.cards if figures else ():
        card = evaluated_card(read_text(readme) or "", subject.label, figures)
        write_bytes(readme, card.encode("utf-8"))


def shown(args: argparse.Namespace, rows: Sequence[tuple[str, Evaluation]], specs: Sequence[Spec]) -> str:
    """The paper's table with our rows, where there is one for the suite; else a plain one."""
    from openelm.evaluate import tables

    way = how(args)
    if args.suite in TABLES:
        name = TABLES[args.suite]
        ours = [tables.own_row(found, name, label=label, how=way) for label, found in rows]
        return tables.render(name, ours, args.table, errors=True)
    columns = [f"{spec.task}{f'@{spec.shots}' if spec.shots else ''} {spec.metric}" for spec in specs]
    lines = [f"| model | {' | '.join(columns)} |", "|---" + "|--:" * len(columns) + "|"]
    for label, found in rows:
        cells = [_cell(found.find(spec.task, spec.shots, way), spec.metric) for spec in specs]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: TaskResult | None, metric: str) -> str:
    """Percent and standard error of a measurement; "-" where there is none."""
    if result is None or metric not in result.metrics:
        return "-"
    error = result.metrics.get(f"{metric}_stderr")
    return f"{100 * result.metrics[metric]:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")
