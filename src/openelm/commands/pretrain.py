"""openelm pretrain: train a model from a recipe, or say what that would take."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from openelm.commands import runs

if TYPE_CHECKING:
    from pathlib import Path

    from openelm.config import RunConfig

HELP = "Train a model from a recipe (a packaged name or a YAML file), with dotted overrides."
EXAMPLE = "openelm pretrain demo train.steps=100 --run runs/short"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm pretrain``."""
    parser.add_argument("recipe", metavar="RECIPE", help="packaged recipe (demo, ...) or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as train.steps=500 or model.size=270M")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="train.steps: as many as fit here, by a trial of three"
    )
    runs.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would happen: data, memory, disk, time")
    parser.add_argument("--json", action="store_true", help="print the summary (or the dry run) as JSON")


def run(args: argparse.Namespace) -> int:
    """Train to the end, then write model folder and report."""
    from openelm.config import load_recipe
    from openelm.errors import UserError

    config = load_recipe(args.recipe, args.overrides)
    folder, resume = runs.folder(args, config.name), runs.resume(args)
    if args.minutes is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--minutes tries three steps on one rank: with more, set train.steps=…")
    goes_on = (folder / "config.yaml").is_file() if resume is None else resume
    steps = None
    if goes_on and not any(override.startswith("train.steps=") for override in args.overrides):
        steps = _steps_begun(folder)  # which --minutes may have chosen
    elif args.minutes is not None and not goes_on:
        steps = _steps_that_fit(config, args.minutes)
    if steps is not None:
        config = load_recipe(args.recipe, [*args.overrides, f"train.steps={steps}"])
    if args.dry_run:
        return _dry_run(config, folder, as_json=args.json)
    from openelm.train.pretrain import pretrain

    summary = pretrain(
        config,
        folder,
        resume=resume,
        resume_step=args.resume_step,
        overwrite=args.overwrite,
        live=runs.live(config),
    )
    return runs.close(summary, folder, as_json=args.json, draw=not args.no_report)


def _steps_that_fit(config: RunConfig, minutes: float) -> int:
    """Steps of this recipe that the machine makes in ``minutes``, validation and saving not counted."""
    from openelm.bench.training import TrainingBench, bench_training
    from openelm.errors import UserError
    from openelm.train.parts import geometry, load_tokenizer

    if not minutes > 0:
        raise UserError(f"--minutes {minutes:g} must be more than 0")
    train, row_length = config.train, config.data.row_length
    bench = TrainingBench(
        row_length,
        train.micro_batch,
        train.global_batch // train.micro_batch,
        steps=3,
        warmup=1,
        dtype=train.dtype,
        compile=train.compile,
        activation_checkpointing=train.activation_checkpointing,
    )
    tokens_per_s = bench_training(geometry(config, load_tokenizer(config)), bench)["tokens_per_s"]
    steps = round(minutes * 60 * tokens_per_s / (train.global_batch * row_length))
    # Fewer would leave nothing to average, and no schedule worth the name.
    return max(steps, 2 * train.warmup_steps, train.average_last * train.checkpoint_every)


def _steps_begun(folder: Path) -> int | None:
    """The steps that a run was begun with; None where there is no run (what follows says so)."""
    import yaml

    from openelm.errors import UserError

    try:
        return int(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"])
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be resumed: its config.yaml does not say train.steps ({error})") from error


def _dry_run(config: RunConfig, folder: Path, *, as_json: bool) -> int:
    from openelm.train.plan import plan_run

    return runs.show(plan_run(config, folder), as_json=as_json)
