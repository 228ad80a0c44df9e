"""openelm merge: a model with an adapter's change in its own weights, as a model folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from openelm.commands.convert import DTYPE_NAMES, Progress, ended_as_interrupted
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.interop.source import Source
    from openelm.tune.adapters import Check

HELP = "Put an adapter's change into the model's own weights."
EXAMPLE = "openelm merge apple/OpenELM-270M-Instruct runs/peft/adapter merged --verify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm merge``."""
    parser.add_argument("model", metavar="MODEL", help="what the adapter was trained on, named as for openelm convert")
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="an adapter's folder (ours or PEFT's), a run's folder, or a Hub id"
    )
    parser.add_argument("out", metavar="OUT", help="the model folder to write")
    parser.add_argument(
        "--untie",
        action="store_true",
        help="give the result an output layer of its own, where the adapter changes an embedding that is both",
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPE_NAMES.values(), *DTYPE_NAMES),
        metavar="NAME",
        help="of the weights: float32, bfloat16, float16, or fp32, bf16, fp16 (default: the model's)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare logits with those of the model with the adapter beside it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is a model already")
    parser.add_argument("--json", action="store_true", help="what was done as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Open both, merge, verify, say what was done."""
    from openelm.interop.adapter import find_adapter_folder
    from openelm.interop.card import hub_id
    from openelm.interop.convert import check_destination, convert, open_source
    from openelm.interop.hub import adapter_path
    from openelm.interop.target import Format
    from openelm.model.folder import DTYPES
    from openelm.tune.adapters import check_merged, merged, unmerged_logits

    out, folder = Path(args.out), find_adapter_folder(adapter_path(args.adapter))
    check_destination(out, is_file=False, overwrite=args.overwrite)
    base = open_source(args.model)
    if out.resolve() in {Path(args.model).resolve(), (Path(args.model) / "model").resolve()}:
        raise UserError(f"{out} is the model itself, without which the adapter is worth nothing: choose another name")
    source = merged(base, folder, untie=args.untie, name=hub_id(args.adapter))
    form = Format(DTYPES[DTYPE_NAMES.get(args.dtype, args.dtype)] if args.dtype else source.dtype)
    for note in (*source.notes, *other_model(args.model, base, folder)):
        print(note, file=sys.stderr)
    expected = unmerged_logits(base, folder) if args.verify else None
    checks: list[Check] = []

    def check(written: Path) -> None:
        if expected is not None:
            checks.append(check_merged(expected, source, written, form.dtype))

    with Progress(source) as shown, ended_as_interrupted():
        convert(shown, "hf", out, form, overwrite=args.overwrite, check=check)
    report(args, source, str(form.dtype).removeprefix("torch."), checks)
    return 0


def other_model(model: str, base: Source, folder: Path) -> Iterator[str]:
    """A word on a model that is not the one that the adapter was trained on, or is not called so; it may be then."""
    from openelm.interop.adapter import read_config
    from openelm.tune.beginning import is_base

    run = folder.parent
    if (run / "config.yaml").is_file() and not is_base(run, base):
        yield f"{run} began from another model than {model} is now: merged with it, the adapter is noise"
        return
    trained_on = read_config(folder)[1]
    names = [
        name.partition("@")[0].rstrip("/").removesuffix("/model").rpartition("/")[2] for name in (model, trained_on)
    ]
    if trained_on and names[0] != names[1]:
        yield f"the adapter says that it was trained on {trained_on}: on any other model than that it is noise"


def report(args: argparse.Namespace, source: Source, dtype: str, checks: list[Check]) -> None:
    """One line, and one more for what was verified; or all of it as JSON."""
    parameters, tied = source.config.num_parameters(), source.config.share_input_output_layers
    size = sum(file.stat().st_size for file in Path(args.out).rglob("*"))
    if args.json:
        figures = {
            "model": args.model,
            "adapter": args.adapter,
            "destination": args.out,
            "weights": dtype,
            "parameters": parameters,
            "tied": tied,
            "bytes": size,
            "notes": list(source.notes),
            "verified": asdict(checks[0]) if checks else None,
        }
        print(json.dumps(figures, ensure_ascii=False))
        return
    print(f"{args.out}: {parameters:,} parameters, {dtype}, {size / 1e6:,.1f} MB")
    for line in checks:
        print(line)
