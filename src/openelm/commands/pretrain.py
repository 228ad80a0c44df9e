"""openelm pretrain: train a model from a recipe, or say what that would take."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm.config import RunConfig

HELP = "Train a model from a recipe (a packaged name or a YAML file), with dotted overrides."
EXAMPLE = "openelm pretrain demo train.steps=100 --run runs/short"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm pretrain``."""
    parser.add_argument("recipe", metavar="RECIPE", help="packaged recipe (demo, ...) or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as train.steps=500 or model.size=270M")
    parser.add_argument("--run", metavar="FOLDER", help="run folder (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--resume-step", type=int, metavar="STEP", help="go on from this checkpoint (an older one)")
    parser.add_argument("--overwrite", action="store_true", help="delete a run folder that is there, and start anew")
    parser.add_argument("--dry-run", action="store_true", help="only say what would happen: data, memory, disk, time")
    parser.add_argument("--json", action="store_true", help="print the summary (or the dry run) as JSON")


def run(args: argparse.Namespace) -> int:
    """Train to the end, then write model folder and report."""
    from pathlib import Path

    from openelm.config import load_recipe
    from openelm.errors import UserError

    config = load_recipe(args.recipe, args.overrides)
    folder = Path(args.run or Path("runs") / config.name)
    if args.dry_run:
        return _dry_run(config, folder, as_json=args.json)
    from openelm.train.pretrain import pretrain

    resume = args.resume or args.resume_step is not None
    summary = pretrain(config, folder, resume=resume, resume_step=args.resume_step, overwrite=args.overwrite)
    try:
        from openelm.report.page import write_report

        report = str(write_report(folder))
    except UserError as error:
        report = f"not drawn: {error}"
    if args.json:
        print(json.dumps({**summary, "run": str(folder), "report": report}, ensure_ascii=False))
    else:
        print(_closing_words(summary, folder, report))
    return 0


def _closing_words(summary: dict[str, Any], folder: Any, report: str) -> str:
    lines = [f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['elapsed_s']:.0f} s", ""]
    if summary["bits_per_byte"]:
        lines.append("held-out text, bits per byte (less is better):")
        lines += [f"  {name:<14} {value:.3f}" for name, value in summary["bits_per_byte"].items()]
    if "sample" in summary:
        lines += ["", "the model writes:", "", summary["sample"]["prompt"] + summary["sample"]["text"]]
    lines += ["", f"report: {report}", f"model:  {folder / 'model'}"]
    return "\n".join(lines)


def _dry_run(config: RunConfig, folder: Any, *, as_json: bool) -> int:
    from openelm.train.plan import plan_run

    plan = plan_run(config, folder)
    if as_json:
        print(json.dumps(plan))
        return 0
    width = max(map(len, plan))
    for name, value in plan.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"{name.replace('_', ' '):<{width}}  {text}")
    return 0
