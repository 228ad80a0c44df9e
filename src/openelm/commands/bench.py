"""openelm bench: how fast training and data are here, beside the machine's own roof."""

from __future__ import annotations

import argparse
import json
from typing import Any

HELP = "Measure training or data speed against the machine's roof, in one run."
EXAMPLE = "openelm bench train --size 30M --micro-batches 1 --steps 1 --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm bench``."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    train = kinds.add_parser("train", help="training steps on random tokens, against a matrix product")
    train.add_argument("--size", default="270M", help="named size (default: 270M)")
    train.add_argument("--vocab-size", type=int, default=32000, metavar="N")
    train.add_argument("--row-length", type=int, default=512, metavar="T", help="tokens of a row (default: 512)")
    train.add_argument("--micro-batch", type=int, default=4, metavar="B", help="rows of a micro-batch (default: 4)")
    train.add_argument("--micro-batches", type=int, default=8, metavar="N", help="of a step (default: 8)")
    train.add_argument("--steps", type=int, default=3, metavar="N", help="steps counted (default: 3)")
    train.add_argument("--warmup", type=int, default=1, metavar="N", help="steps before (default: 1)")
    train.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    train.add_argument("--compile", action="store_true", help="through torch.compile")
    train.add_argument(
        "--activation-checkpointing",
        default="none",
        choices=("none", "selective", "full"),
        help="what the backward pass computes again to save memory: nothing, the FFNs, everything",
    )
    data = kinds.add_parser("data", help="source to packed row, against bare SentencePiece")
    data.add_argument("source", nargs="?", default="python", metavar="SOURCE", help="files, or python (default)")
    data.add_argument("--tokenizer", required=True, metavar="PATH", help="tokenizer.model, tokenizer.json or a folder")
    data.add_argument("--row-length", type=int, default=2048, metavar="T")
    data.add_argument("--packing", default="pack", choices=("pack", "pad"))
    data.add_argument("--megabytes", type=float, default=4.0, metavar="MB", help="text to measure with (default: 4)")
    data.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (default: 5)")
    for kind in (train, data):
        kind.add_argument("--json", action="store_true", help="print all figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, and print what came out."""
    result = _train(args) if args.kind == "train" else _data(args)
    if args.json:
        print(json.dumps(result))
    else:
        width = max(map(len, result))
        for name, value in result.items():
            print(f"{name.replace('_', ' '):<{width}}  {_text(value)}")
    return 0


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from openelm.bench.training import TrainingBench, bench_training
    from openelm.errors import UserError
    from openelm.model.geometry import ModelConfig

    for name in ("row_length", "micro_batch", "micro_batches", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    length = max(2048, args.row_length)
    config = ModelConfig.from_name(args.size, vocab_size=args.vocab_size, max_context_length=length)
    bench = TrainingBench(
        args.row_length,
        args.micro_batch,
        args.micro_batches,
        args.steps,
        args.warmup,
        args.dtype,
        args.compile,
        args.activation_checkpointing,
    )
    return {"size": args.size, **bench_training(config, bench)}


def _data(args: argparse.Namespace) -> dict[str, Any]:
    from openelm.bench.data import bench_data
    from openelm.data.packing import Packing
    from openelm.data.pieces import Preparation
    from openelm.data.sources import Source
    from openelm.data.tokenizer import Tokenizer

    return bench_data(
        Source("bench", args.source),
        Tokenizer.load(args.tokenizer),
        Preparation(),
        Packing(args.row_length, args.packing),
        max_bytes=int(args.megabytes * 1e6),
        repeats=args.repeats,
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "  ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
