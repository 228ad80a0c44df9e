"""What the commands that train have in common: where the run is, whether it goes on, and what is said at its end."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from openelm.config import RunConfig
    from openelm.train.run import Live
    from openelm.tuning_config import TuneConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a run."""
    parser.add_argument("--run", metavar="FOLDER", help="run folder (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on where there is a run, else begin (for job scripts)",
    )
    parser.add_argument("--resume-step", type=int, metavar="STEP", help="go on from this checkpoint (an older one)")
    parser.add_argument("--overwrite", action="store_true", help="delete a run folder that is there, and start anew")
    parser.add_argument("--no-report", action="store_true", help="draw none at the end; `openelm report` does it later")


def tune(config: TuneConfig, args: argparse.Namespace) -> int:
    """Train to the end, then write the model, the adapter where there is one, and the report; or say what would be."""
    place, goes_on = folder(args, config.name), resume(args)
    if args.dry_run:
        from openelm.tune.beginning import outlook

        return show(outlook(config, place), as_json=args.json)
    from openelm.tune.tuning import tune

    summary = tune(
        config,
        place,
        resume=goes_on,
        resume_step=args.resume_step,
        overwrite=args.overwrite,
        live=live(config),
    )
    return close(summary, place, as_json=args.json, draw=not args.no_report)


def show(plan: dict[str, Any], *, as_json: bool) -> int:
    """Print what a run would be."""
    if as_json:
        print(json.dumps(plan, ensure_ascii=False))
        return 0
    notes = plan.pop("notes", [])
    width = max(map(len, plan))
    for name, value in plan.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key.replace('_', ' ')} {count:,}" for key, count in value.items() if count)
        else:
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        print(f"{name.replace('_', ' '):<{width}}  {text}")
    for note in notes:
        print(note)
    return 0


def folder(args: argparse.Namespace, name: str) -> Path:
    """Where the run is."""
    from pathlib import Path

    return Path(args.run or Path("runs") / name)


def resume(args: argparse.Namespace) -> bool | None:
    """Whether the run goes on; None as there is one or not."""
    from openelm.errors import UserError

    goes_on: bool = args.resume or args.resume_step is not None
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if args.overwrite and (goes_on or args.auto_resume):
        raise UserError("--resume and --auto-resume go on with a run, --overwrite deletes it: give one of them")
    if args.overwrite and restarts:
        raise UserError("--overwrite with torchrun --max-restarts would delete the run at each restart: leave one out")
    if not goes_on and (args.auto_resume or restarts):
        return None  # a rank cannot tell whether torchrun has started it before
    return goes_on


def live(config: RunConfig | TuneConfig) -> Live | None:
    """The tasks that are measured while it trains."""
    if not config.train.evaluate_every:
        return None
    from openelm.evaluate.live import live

    return live(config)


def close(summary: dict[str, Any], folder: Path, *, as_json: bool, draw: bool) -> int:
    """Draw the report and say how it went, on rank 0, which alone has a summary."""
    from openelm.errors import UserError

    if not summary:
        return 0
    try:
        from openelm.commands.report import write_page

        report = str(write_page(folder)) if draw else f"not drawn: `openelm report {folder}` does it"
    except UserError as error:
        report = f"not drawn: {error}"
    if as_json:
        print(json.dumps({**summary, "run": str(folder), "report": report}, ensure_ascii=False))
    else:
        print(_closing_words(summary, folder, report))
    return 0


def _closing_words(summary: dict[str, Any], folder: Path, report: str) -> str:
    lines = [f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['elapsed_s']:.0f} s", ""]
    if scores := summary.get("bits_per_byte"):
        lines.append("held-out text, bits per byte (less is better):")
        lines += [f"  {name:<14} {value:.3f}" for name, value in scores.items()]
    if scores := summary.get("held_out"):
        lines.append("held-out examples:")
        for name, found in scores.items():
            line = f"  {name:<14} loss {found['loss']:.3f}"
            if "accuracy" in found:
                line += f", accuracy {found['accuracy']:.3f} ± {found['accuracy_stderr']:.3f}"
            lines.append(line)
    if "sample" in summary:
        prompt, text = summary["sample"]["prompt"], summary["sample"]["text"]
        # A tuned model answers; another goes on in the middle of a word.
        lines += ["", "the model writes:", "", f"{prompt}\n> {text}" if "held_out" in summary else prompt + text]
    lines += ["", f"report: {report}", f"model:  {folder / 'model'}"]
    if (folder / "adapter").is_dir():
        lines.append(f"adapter: {folder / 'adapter'}")
    return "\n".join(lines)
