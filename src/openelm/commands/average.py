"""openelm average: the mean of a run's last checkpoints as a model folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.data.tokenizer import Tokenizer

HELP = "Average the weights of a run's last checkpoints into a model folder."
EXAMPLE = "openelm average runs/demo --last 5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm average``."""
    parser.add_argument("run", metavar="RUN", help="run folder, with checkpoints/ in it")
    parser.add_argument("--last", type=int, default=5, metavar="N", help="newest checkpoints to average (default: 5)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="model folder to write (default: RUN/model-averaged-STEP, the newest STEP)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights written (default: float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER where it exists")
    parser.add_argument("--json", action="store_true", help="print steps and folder as JSON")


def run(args: argparse.Namespace) -> int:
    """Average, write the folder, say of which steps."""
    from openelm.train.checkpoint import Checkpoints

    folder = Path(args.run)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a run folder, as pretrain wrote it")
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=args.last)
    if not (steps := checkpoints.steps()):
        raise UserError(
            f"{folder} has no checkpoints (looked in {checkpoints.folder}): give the folder of a run that has "
            "reached train.checkpoint_every steps"
        )
    out = Path(args.out) if args.out else folder / f"model-averaged-{steps[-1]}"
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists: choose another folder with --out, or pass --overwrite")
    if out.exists() and not (out / "config.json").is_file():
        # A slip such as `--out runs/demo --overwrite` must not cost a run.
        raise UserError(f"{out} is no model folder, so it is not replaced: choose another folder with --out")

    from openelm.files import whole_folder
    from openelm.model.folder import DTYPES, write_model
    from openelm.train.average import average_checkpoints

    config, weights, averaged = average_checkpoints(checkpoints, args.last)
    tokenizer = find_tokenizer(folder)
    with whole_folder(out, overwrite=args.overwrite) as draft:
        write_model(draft, config, weights, DTYPES[args.dtype])
        if tokenizer is not None:
            tokenizer.save(draft)
    if tokenizer is None:
        print(f"{folder} holds no tokenizer in model/ or tokenizer/: {out} is written without one", file=sys.stderr)
    if args.json:
        print(json.dumps({"folder": str(out), "steps": averaged, "tokenizer": tokenizer is not None}))
    else:
        print(f"{out}: the mean of the checkpoints of steps {', '.join(map(str, averaged))}")
    return 0


def find_tokenizer(run: Path) -> Tokenizer | None:
    """The tokenizer that a run keeps with its model, or by itself."""
    from openelm.data.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, Tokenizer

    for folder in (run / "model", run / "tokenizer"):
        if any((folder / name).is_file() for name in (SENTENCEPIECE_FILE, JSON_FILE)):
            return Tokenizer.load(folder)
    return None
