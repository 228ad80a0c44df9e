"""openelm sweep: a grid of runs, each trained and evaluated; the best by the average of a suite."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.study.ranking import Aim
    from openelm.study.sweep import Sweep

HELP = "Train a model at each point of a grid of settings, evaluate all, and find the best by a suite's average."
EXAMPLE = "openelm sweep recipe.yaml --grid train.lr=2e-5,5e-5 --grid train.epochs=3,5 --suite zero-shot"
SUITE = "zero-shot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm sweep``."""
    parser.add_argument("recipe", metavar="RECIPE", help="packaged recipe or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all points, as data.row_length=1024")
    parser.add_argument(
        "--grid",
        metavar="KEY=A,B,C",
        action="append",
        default=[],
        help="values to try; may be given again for another key (default: learning rates and epochs of Appendix B)",
    )
    parser.add_argument(
        "--with",
        dest="trainer",
        choices=("pretrain", "finetune", "dpo"),
        help="the command that trains (default: as the recipe has preferences, a model to begin with, or neither)",
    )
    parser.add_argument("--suite", metavar="NAME", help=f"whose average decides (default: {SUITE})")
    parser.add_argument("--tasks", metavar="A,B@5", help="lm-eval's tasks instead; the mean of their metrics decides")
    parser.add_argument("--data", metavar="FOLDER", help="take the tasks' data from local files instead of the Hub")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    parser.add_argument("--out", metavar="FOLDER", help="for runs and results (default: sweeps/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="delete a sweep that is there, and start anew")
    parser.add_argument(
        "--commands", action="store_true", help="run nothing: print what is left to run, a line a point, for a cluster"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet, or say how; then show the table. 1 where a point has failed."""
    from openelm.study import sweep as study
    from openelm.study.processes import say
    from openelm.study.ranking import Ranking

    if args.commands and args.json:
        raise UserError("--commands prints commands, --json results: give one of them")
    sweep = asked_for(args)
    if args.commands:
        outcomes = study.gather(sweep)
        left = [one.point for one in outcomes if one.average is None]
        say(f"{len(left):,} of {len(outcomes):,} points are left; what is done: {sweep.out / 'table.md'}")
        for point in left:
            print(sweep.commands(point))
        return 0
    outcomes = study.run(sweep)
    ranking = Ranking(outcomes, sweep.aim)
    if args.json:
        print(json.dumps(ranking.as_plain(), ensure_ascii=False))
    else:
        print(ranking.table(), end="")
    failed = [one for one in outcomes if one.failure]
    for one in failed:
        print(f"failed: {one.point.name}, see {one.point.log}", file=sys.stderr)
    return 1 if failed else 0


def asked_for(args: argparse.Namespace) -> Sweep:
    """The sweep that the arguments ask for, its folder made; all that can be refused is refused before."""
    from openelm.evaluate.results import How
    from openelm.study import sweep as study
    from openelm.study.ranking import Aim

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1")
    grid = study.parse_grid(args.grid)
    trainer = args.trainer or study.trainer_of(
        args.recipe, [*args.overrides, *study.settings(study.combinations(grid)[0])]
    )
    if not grid and trainer == "pretrain":
        raise UserError("pretrain knows no epochs, but the paper's grid does: name one, as --grid train.lr=1e-3,2e-3")
    grid = grid or study.PAPER_GRID
    config = study.check(trainer, args.recipe, args.overrides, grid)
    suite = args.suite or (None if args.tasks else SUITE)
    data = str(Path(args.data).resolve()) if args.data else ""
    aim = Aim.of(suite, args.tasks, How(args.limit, data=data))
    if not args.commands:  # which others run, where there may be more
        check_data(aim)
    measuring = ["--suite", suite] if suite else ["--tasks", args.tasks]
    measuring += ["--data", args.data] if args.data else []
    measuring += ["--limit", str(args.limit)] if args.limit is not None else []
    out = Path(args.out or Path("sweeps") / config.name)
    sweep = study.Sweep(trainer, args.recipe, tuple(args.overrides), grid, out, aim, tuple(measuring))
    return study.begin(sweep, overwrite=args.overwrite)


def check_data(aim: Aim) -> None:
    """Refuse now what would be refused once the first run is trained: no lm-eval, no data of a task."""
    from openelm.evaluate import suites, tasks

    with tasks.quiet():
        if not aim.how.data:
            return
        there = tasks.available(Path(aim.how.data))
    names = [spec.task for spec in aim.columns.values() if suites.known(spec.task)]
    if missing := [name for name in names if name not in there]:
        has = ", ".join(there) or "no task of the suites"
        raise UserError(f"--data {aim.how.data} has no data for {', '.join(missing)}; it has data for {has}")
