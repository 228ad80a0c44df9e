"""openelm average: the mean of a run's last checkpoints as a model folder, or as an adapter's."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from openelm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from openelm.data.tokenizer import Tokenizer
    from openelm.train.checkpoint import Checkpoints
    from openelm.train.form import Form

HELP = "Average the weights of a run's last checkpoints into a model folder, or an adapter's."
EXAMPLE = "openelm average runs/demo --last 5"
MOST = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm average``."""
    parser.add_argument("run", metavar="RUN", help="run folder, with checkpoints/ in it")
    parser.add_argument(
        "--last",
        type=int,
        metavar="N",
        help=f"newest checkpoints to average (default: as many as there are in a row, at most {MOST})",
    )
    parser.add_argument(
        "--every", type=int, metavar="STEPS", help="only checkpoints at multiples of STEPS, such as milestones"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the exponential average that the run kept (train.ema_decay) instead"
    )
    parser.add_argument(
        "--step", type=int, metavar="STEP", help="of which checkpoint, with --ema (default: the newest)"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder to write (default: RUN/model-averaged-STEP, or RUN/adapter-averaged-STEP; the newest STEP)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the model's weights as they are written (default: float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER where it exists")
    parser.add_argument("--json", action="store_true", help="print steps and folder as JSON")


def run(args: argparse.Namespace) -> int:
    """Average, write the folder, say of which steps."""
    from openelm.train.checkpoint import Checkpoints

    folder = Path(args.run)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a run")
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=MOST)
    steps = chosen_steps(args, checkpoints)
    from openelm.train.average import Average, exponential_average
    from openelm.train.form import open_form

    form, _ = open_form(checkpoints.path(steps[-1]))
    out = destination(args, folder, form, steps[-1])
    if args.ema:
        form, read = exponential_average(checkpoints, steps[-1])
    else:
        average = Average(checkpoints, steps)
        form, read = average.form, average.read
    tokenizer = find_tokenizer(folder)
    what = f"the mean of the checkpoints of steps {', '.join(map(str, steps))}"
    what = f"the exponential average that the checkpoint of step {steps[-1]} holds" if args.ema else what
    write(out, form, read, args, folder, tokenizer, card(folder, out.resolve().name, what))
    if tokenizer is None:
        print(f"{folder} holds no tokenizer in model/ or tokenizer/: {out} is written without one", file=sys.stderr)
    if args.json:
        figures = {"folder": str(out), "steps": steps, "ema": args.ema, "tokenizer": tokenizer is not None}
        print(json.dumps(figures | {"adapter": form.adapter is not None}))
        return 0
    print(f"{out}: {what}")
    if form.adapter is not None:
        print(f"an adapter; a model of it: {shlex.join(['openelm', 'merge', form.base or 'MODEL', str(out), 'OUT'])}")
    return 0


def destination(args: argparse.Namespace, run: Path, form: Form, step: int) -> Path:
    """The folder to write; UserError where it is taken, or where the arguments do not fit an adapter."""
    from openelm.interop.adapter import CONFIG

    kind, file = ("model", "config.json") if form.adapter is None else ("adapter", CONFIG)
    if form.adapter is not None and args.dtype not in (None, "float32"):
        raise UserError(
            f"--dtype {args.dtype}: {run} trains an adapter, which is kept in float32: leave it out, and give it to "
            "`openelm merge`"
        )
    out = Path(args.out) if args.out else run / f"{kind}-{'ema' if args.ema else 'averaged'}-{step}"
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists: choose another folder with --out, or pass --overwrite")
    if out.exists() and not (out / file).is_file():
        # A slip such as `--out runs/demo --overwrite` must not cost a run.
        raise UserError(f"{out} is no {kind} folder, so it is not replaced: choose another folder with --out")
    return out


def write(
    out: Path,
    form: Form,
    read: Callable[[str], Tensor],
    args: argparse.Namespace,
    run: Path,
    tokenizer: Tokenizer | None,
    card: str,
) -> None:
    """A model folder, or an adapter's, with the run's tokenizer and chat template, and ``card`` as README.md."""
    from openelm.files import whole_folder
    from openelm.interop.adapter import write_adapter
    from openelm.interop.transformers_folder import complete
    from openelm.model.folder import DTYPES, write_model

    with whole_folder(out, overwrite=args.overwrite) as draft:
        if form.adapter is None:
            write_model(draft, form.config, read, DTYPES[args.dtype or "float32"])
        else:
            write_adapter(draft, form.adapter, form.config, read, form.base, "")
        if card:
            (draft / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(draft)
        template = run / "model" / "chat_template.jinja"
        if template.is_file():
            shutil.copyfile(template, draft / template.name)
        if form.adapter is None:
            complete(draft)


def card(run: Path, name: str, what: str) -> str:
    """The card of an average: licence and data as of the run's model, none of its figures; "" where that has none."""
    from openelm.interop.card import CARRIED, parse, render, section
    from openelm.interop.source import read_text

    metadata, body = parse(read_text(run / "model" / "README.md") or "")
    if not metadata and not body:
        return ""
    metadata.pop("model-index", None)
    parts = [
        f"# {name}",
        f"These weights are {what}. They were not evaluated by themselves; what follows is from the card of the run's "
        "model.",
        *(f"## {heading}\n\n{text}" for heading in CARRIED if (text := section(body, heading))),
    ]
    return render(metadata, "\n\n".join(parts))


def chosen_steps(args: argparse.Namespace, checkpoints: Checkpoints) -> list[int]:
    """The checkpoints that the arguments name, oldest first: one with --ema."""
    from openelm.train.average import newest, newest_in_a_row

    steps = checkpoints.steps()
    if not steps:
        raise UserError(
            f"{args.run} has no checkpoints (looked in {checkpoints.folder}): give the folder of a run that has "
            "reached train.checkpoint_every steps"
        )
    if args.ema:
        if args.last is not None or args.every is not None:
            raise UserError("--ema takes one checkpoint's average as it is: leave out --last and --every")
        if args.step is not None and args.step not in steps:
            raise UserError(f"there is no checkpoint of step {args.step} in {checkpoints.folder}: there are {steps}")
        return [steps[-1] if args.step is None else args.step]
    if args.step is not None:
        raise UserError(f"--step {args.step} goes with --ema: choose checkpoints with --last and --every")
    if args.every is not None:
        if args.every < 1 or not any(step % args.every == 0 for step in steps):
            raise UserError(f"--every {args.every}: no checkpoint is at a multiple of that; there are {steps}")
        steps = [step for step in steps if step % args.every == 0]
    if args.last is not None:
        return newest(checkpoints, steps, args.last)
    return newest_in_a_row(steps, MOST, args.every or checkpoint_every(Path(args.run)))


def checkpoint_every(run: Path) -> int | None:
    """Steps between the checkpoints of a run, where its config says so."""
    import yaml

    try:
        return int(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]["checkpoint_every"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def find_tokenizer(run: Path) -> Tokenizer | None:
    """The tokenizer that a run keeps with its model, or by itself."""
    from openelm.data.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, Tokenizer

    for folder in (run / "model", run / "tokenizer"):
        if any((folder / name).is_file() for name in (SENTENCEPIECE_FILE, JSON_FILE)):
            return Tokenizer.load(folder)
    return None
