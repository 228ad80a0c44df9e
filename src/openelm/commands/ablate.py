"""openelm ablate: twins of a model, trained on the same rows and compared on the same text."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.study.ablation_runs import Runs

HELP = "Train models that differ in how their layers are scaled, and nothing else, and say what that changes."
EXAMPLE = "openelm ablate ablation --at-once 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm ablate``."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="packaged recipe (ablation) or YAML file with a section ablation"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as ablation.seeds=[0,1] or train.lr=1e-3")
    parser.add_argument("--out", metavar="FOLDER", help="for runs and results (default: ablations/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="delete an ablation that is there, and start anew")
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="runs at a time, which share the cores (default: 1)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be trained: twins, runs, FLOPs and hours"
    )
    parser.add_argument("--gpu", default="cpu", metavar="KIND", help="of --dry-run, as h200 (default: this CPU)")
    parser.add_argument("--mfu", type=float, metavar="X", help="share of its peak that --dry-run assumes")
    parser.add_argument(
        "--commands", action="store_true", help="run nothing: print what can be run now, a line a run, for a cluster"
    )
    parser.add_argument("--json", action="store_true", help="print the results (or the dry run) as JSON")


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, judge it, and show the table. 1 where a run has failed."""
    from openelm.report.plots import require_matplotlib
    from openelm.study.ablation import load_ablation
    from openelm.study.ablation_runs import Runs
    from openelm.train.run_folder import locked

    if args.at_once < 1:
        raise UserError(f"--at-once {args.at_once} must be at least 1")
    if args.commands and (args.json or args.dry_run):
        raise UserError("--commands prints commands, --json results, --dry-run a plan: give one of them")
    if not args.dry_run and (args.mfu is not None or args.gpu != "cpu"):
        raise UserError("--gpu and --mfu are of --dry-run: training takes what is here")
    ablation = load_ablation(args.recipe, args.overrides)
    if args.dry_run:
        from openelm.study.ablation_plan import planned

        plan = planned(ablation, args.gpu, args.mfu)
        print(json.dumps(plan) if args.json else draw_plan(plan))
        return 0
    out = Path(args.out or Path("ablations") / ablation.name)
    runs = Runs(ablation, out, shlex.join(["openelm", "ablate", args.recipe, *args.overrides]))
    if not args.commands:
        require_matplotlib()
    with locked(out):
        runs.prepare(overwrite=args.overwrite)
        return print_commands(runs) if args.commands else train(runs, args.at_once, as_json=args.json)


def train(runs: Runs, at_once: int, *, as_json: bool) -> int:
    """Do all that is left, and show what came of it."""
    from openelm.study.ablation_report import table
    from openelm.study.ablation_results import measure_generation, write
    from openelm.study.processes import say, start_processes

    note = partial(write, runs)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} if at_once > 1 else {}
    runs.run(partial(start_processes, at_once=at_once, environment=threads), partial(note, pictures=False))
    measure_generation(runs, start_processes)
    results = note(pictures=True)
    print(json.dumps(results) if as_json else table(results), end="\n" if as_json else "")
    failed = [trial for trial in [*runs.ablation.tuning(), *runs.ablation.final(runs.factors())] if runs.failure(trial)]
    for trial in failed:
        say(f"failed: {trial.name}, see {runs.task(trial).log}")
    return 1 if failed else 0


def print_commands(runs: Runs) -> int:
    """What can be run now, and what must be known before the rest can be."""
    from openelm.study.ablation_results import write
    from openelm.study.processes import say

    left = runs.left()
    for trial in left:
        runs.write_recipe(trial)
        print(shlex.join(["openelm", *runs.task(trial).words]))
    write(runs, pictures=False)
    say(f"{len(left):,} runs are left{runs.of_the_search(left)}; what is done: {runs.out / 'table.md'}")
    return 0


def draw_plan(plan: dict[str, Any]) -> str:
    """A table of the runs by size and kind, and what they take together."""
    from openelm.report.markdown import aligned

    head = ["size", "kind", "parameters", "off", "MFLOP a token", "off", "tokens a run", "runs", "hours"]
    rows = [
        [
            row["size"],
            row["label"],
            f"{row['parameters']:,}",
            f"{row['parameters_off']:+.2%}",
            f"{row['flops_per_token'] / 1e6:,.2f}",
            f"{row['flops_off']:+.2%}",
            f"{row['tokens']:,}",
            f"{row['runs']}",
            f"{row['hours']:,.3g}",
        ]
        for row in plan["rows"]
    ]
    search, device = plan["search"], "this machine" if plan["hardware"] == "cpu" else f"one {plan['hardware']}"
    seeds = ", ".join(map(str, plan["seeds"]))
    lines = [*aligned(head, rows, left=2), "", f"{plan['runs']:,} runs, those of a kind from the seeds {seeds}."]
    if search["runs"]:
        lines.append(
            f"{search['runs']} of them look for learning rates at {search['size']}, with {search['share']:g} of the "
            "tokens and a seed of their own."
        )
    lines.append(
        f"{plan['flops']:.3g} FLOPs, {plan['hours']:,.3g} hours of {device} at the speed of its matrix products "
        f"({plan['rule']}). Off: against the size's own model."
    )
    small = [f"{row['size']} {row['label']}" for row in plan["rows"] if not row["micro_batch_fits"]]
    lines += [f"The micro-batch does not fit its memory: {', '.join(small)}."] if small else []
    return "\n".join(lines)
