"""openelm dpo: tune a model on preferences."""

from __future__ import annotations

import argparse

from openelm.commands import runs

HELP = "Tune a model on pairs of answers, of which one was preferred (DPO, hinge, IPO)."
EXAMPLE = "openelm dpo instruct model.path=runs/tuned tokenizer.path=null data.sources.0.path=pairs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm dpo``."""
    parser.add_argument("recipe", metavar="RECIPE", help="packaged recipe (instruct, ...) or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as model.path=FOLDER or train.lr=1e-4")
    runs.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would happen: records, rows, steps")
    parser.add_argument("--json", action="store_true", help="print the summary (or the dry run) as JSON")


def run(args: argparse.Namespace) -> int:
    """Train to the end, then write the model, the adapter where there is one, and the report."""
    from openelm.errors import UserError
    from openelm.tuning_config import load_tuning

    config = load_tuning(args.recipe, args.overrides)
    if config.preference is None:
        raise UserError(
            f"{args.recipe} has no section preference, so it tunes on examples: run `openelm finetune`, or add one"
        )
    return runs.tune(config, args)
