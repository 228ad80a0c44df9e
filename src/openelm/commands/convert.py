"""openelm convert: one model, in the format of another engine."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.interop.source import Source
    from openelm.interop.target import Format
    from openelm.interop.verify import Agreement

HELP = "Convert a model for Hugging Face transformers, CoreNet, mlx-lm, llama.cpp or Ollama."
EXAMPLE = "openelm convert runs/demo demo.gguf --to gguf --quantize Q8_0 --verify"
TARGETS = ("hf", "corenet", "mlx", "gguf", "ollama")
CHATS = ("plain", "handbook")
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm convert``."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="model or run folder (ours, Apple's, mlx-lm's), CoreNet .pt, GGUF file, or Hub id (apple/OpenELM-270M); "
        "known by its content, whatever its name",
    )
    parser.add_argument("destination", metavar="DST", help="a file for corenet and gguf, else a folder")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the format to write (hf: transformers)")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPE_NAMES.values(), *DTYPE_NAMES),
        metavar="NAME",
        help="of the weights: float32, bfloat16, float16, or fp32, bf16, fp16 (default: as they are)",
    )
    parser.add_argument(
        "--quantize", default="", metavar="NAME", help="mlx: 4bit, 8bit; gguf, ollama: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1"
    )
    parser.add_argument("--group-size", type=int, metavar="N", help="mlx: weights that share a scale (default: 64)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a tokenizer for a source without one: file, folder or Hub id"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="keep only the first N rows of the embedding (32128 -> 32000)"
    )
    parser.add_argument("--geometry", metavar="YAML", help="CoreNet's configuration of a .pt (default: by its shapes)")
    parser.add_argument(
        "--chat",
        choices=CHATS,
        help="add the instruct models' chat template; handbook: with an empty system turn first",
    )
    parser.add_argument("--verify", action="store_true", help="run the result in its engine, and compare logits")
    parser.add_argument("--overwrite", action="store_true", help="replace DST where it is a model already")
    parser.add_argument("--json", action="store_true", help="what was done as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Open, convert, verify, say what was done."""
    from openelm.interop.convert import check_destination, convert, target
    from openelm.interop.verify import verify

    destination, chosen = Path(args.destination), target(args.to)
    check_destination(destination, is_file=chosen.is_file, overwrite=args.overwrite)
    source = chosen_source(args)
    form = chosen_format(args, source)
    for note in source.notes:
        print(note, file=sys.stderr)
    agreement: list[Agreement] = []

    def check(written: Path) -> None:
        if args.verify:
            agreement.append(verify(source, chosen, form, written))

    with Progress(source) as shown, ended_as_interrupted():
        convert(shown, args.to, destination, form, overwrite=args.overwrite, check=check)
    if source.tokenizer is None and args.to in ("hf", "mlx"):
        print(f"{destination} is written without a tokenizer. {how_to_get_one(args.source, source)}", file=sys.stderr)
    report(args, source, form, destination, agreement)
    return 0


def chosen_source(args: argparse.Namespace) -> Source:
    """The model that the arguments name, with the tokenizer, vocabulary and chat template that they choose."""
    from openelm.data.chat import CHAT_TEMPLATE, HANDBOOK_TEMPLATE
    from openelm.data.tokenizer import Tokenizer
    from openelm.interop.convert import open_source
    from openelm.interop.hub import tokenizer_path
    from openelm.interop.source import with_tokenizer, with_vocabulary

    source = open_source(args.source, geometry=Path(args.geometry) if args.geometry else None)
    if args.tokenizer:
        source = replace(source, tokenizer=Tokenizer.load(tokenizer_path(args.tokenizer)))
    if args.vocab_size is not None:
        source = with_vocabulary(source, args.vocab_size)
    if source.tokenizer is not None:
        source = with_tokenizer(source, source.tokenizer)
    if args.chat:
        source = replace(source, chat_template=CHAT_TEMPLATE if args.chat == "plain" else HANDBOOK_TEMPLATE)
    return source


def how_to_get_one(reference: str, source: Source) -> str:
    """What to do about a missing tokenizer: LLaMA's is the right one for released sizes of the vocabulary only."""
    from openelm.interop.hub import tokenizer_help

    if source.config.vocab_size in (32000, 32128):
        return tokenizer_help(reference)
    return f"{reference} has none: pass --tokenizer with the file or folder of the one that the model was trained with"


def chosen_format(args: argparse.Namespace, source: Source) -> Format:
    """dtype and quantisation; a warning where fp16 is known not to suffice."""
    import torch

    from openelm.interop.target import Format
    from openelm.model.folder import DTYPES

    if args.group_size is not None and not (args.to == "mlx" and args.quantize):
        raise UserError(f"--group-size {args.group_size} is for --to mlx with --quantize: leave it out")
    if args.dtype and args.quantize and args.to != "mlx":
        raise UserError(
            f"--dtype {args.dtype} and --quantize {args.quantize} exclude each other: leave one of them out"
        )
    dtype = DTYPES[DTYPE_NAMES.get(args.dtype, args.dtype)] if args.dtype else source.dtype
    if dtype == torch.float16 and source.config.num_parameters() > 2 * 10**9:
        print("activations of models as large as the 3B overflow float16: bfloat16 is safer", file=sys.stderr)
    return Format(dtype, args.quantize, args.group_size or 64)


@contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as Ctrl-C does: with nothing left behind."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A source whose reading is drawn as a bar on standard error, where that is a terminal."""

    def __init__(self, source: Source) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._source = source
        self._bar = Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> Source:
        from openelm.interop.convert import watched

        self._bar.start()
        task = self._bar.add_task("converting", total=self._source.config.num_parameters())
        return watched(self._source, lambda parameters: self._bar.advance(task, parameters))

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def report(
    args: argparse.Namespace, source: Source, form: Format, destination: Path, agreement: list[Agreement]
) -> None:
    """One line, and one more for what was verified; or all of it as JSON."""
    size = sum(file.stat().st_size for file in destination.rglob("*")) if destination.is_dir() else 0
    size = size or destination.stat().st_size
    weights = form.quantize or str(form.dtype).removeprefix("torch.")
    if args.json:
        figures: dict[str, Any] = {
            "source": source.origin,
            "destination": str(destination),
            "to": args.to,
            "weights": weights,
            "parameters": source.config.num_parameters(),
            "bytes": size,
            "notes": list(source.notes),
            "verified": asdict(agreement[0]) if agreement else None,
        }
        print(json.dumps(figures, ensure_ascii=False))
        return
    print(
        f"{destination}: {source.config.num_parameters():,} parameters, {weights}, {size / 1e6:,.1f} MB, for {args.to}"
    )
    for line in agreement:
        print(line)
