"""openelm finetune: tune a model on examples."""

from __future__ import annotations

import argparse

from openelm.commands import runs

HELP = "Tune a model on examples: conversations, prompts with answers, or text; all weights, or an adapter."
EXAMPLE = "openelm finetune peft model.path=runs/demo tokenizer.path=null data.row_length=512 --run runs/tuned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm finetune``."""
    parser.add_argument("recipe", metavar="RECIPE", help="packaged recipe (peft, ...) or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as model.path=FOLDER or train.lr=1e-4")
    runs.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would happen: records, rows, steps")
    parser.add_argument("--json", action="store_true", help="print the summary (or the dry run) as JSON")


def run(args: argparse.Namespace) -> int:
    """Train to the end, then write the model, the adapter where there is one, and the report."""
    from openelm.errors import UserError
    from openelm.tuning_config import load_tuning

    config = load_tuning(args.recipe, args.overrides)
    if config.preference is not None:
        raise UserError(
            f"{args.recipe} has a section preference, so it tunes on pairs: run `openelm dpo`, or take the section out"
        )
    return runs.tune(config, args)
