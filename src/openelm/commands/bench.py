"""openelm bench: how fast this machine generates, trains and reads text, beside its own roof and beside others."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.commands import bench_speed
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.bench.results import Result

HELP = "Measure generation, training or data speed against the machine's roof, the paper and other engines."
EXAMPLE = "openelm bench generate --sizes 270M --weights bf16 8bit 4bit --quick --out bench-270M"
TRAIN_EXAMPLE = "openelm bench train --size 30M --micro-batches 1 --steps 1 --json"
COMPARE_EXAMPLE = "openelm bench compare before after"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm bench``."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    bench_speed.add_arguments(kinds)
    _add_train(kinds)
    _add_data(kinds)
    for kind in kinds.choices.values():
        kind.add_argument("--out", metavar="FOLDER", help="also write result.json, table.md and chart.png there")
        kind.add_argument("--overwrite", action="store_true", help="replace a result that is there")
    compare = kinds.add_parser("compare", help="two results: what changed beyond the noise", epilog=COMPARE_EXAMPLE)
    compare.add_argument("before", metavar="A", help="a result.json, or the folder that holds it")
    compare.add_argument("after", metavar="B", help="another of the same kind")
    for kind in kinds.choices.values():
        kind.add_argument("--json", action="store_true", help="print all figures as JSON")


def _add_train(kinds: Any) -> None:
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


def _add_data(kinds: Any) -> None:
    data = kinds.add_parser("data", help="source to packed row, against bare SentencePiece")
    data.add_argument("source", nargs="?", default="python", metavar="SOURCE", help="files, or python (default)")
    data.add_argument("--tokenizer", required=True, metavar="PATH", help="tokenizer.model, tokenizer.json or a folder")
    data.add_argument("--row-length", type=int, default=2048, metavar="T")
    data.add_argument("--packing", default="pack", choices=("pack", "pad", "both"))
    data.add_argument("--megabytes", type=float, default=4.0, metavar="MB", help="text to measure with (default: 4)")
    data.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Measure, and print what came out."""
    if args.kind == "compare":
        return _compare(args)
    out = Path(args.out) if args.out else None
    if out is not None:
        _check_out(out, args.overwrite)
    if args.kind in bench_speed.KINDS:
        result = bench_speed.run(args)
    else:
        result = _train(args) if args.kind == "train" else _data(args)
    if out is not None:
        _write(out, result)
    if args.json:
        print(json.dumps(result.as_json(), ensure_ascii=False))
    elif args.kind in bench_speed.KINDS:
        from openelm.bench.tables import markdown

        print(markdown(result), end="")
    else:
        print("\n".join(_lines(result)))
    measured = [row for row in result.rows if not row.problem]
    if not measured:
        raise UserError(f"nothing could be measured: {result.rows[0].name}: {result.rows[0].problem}")
    return 0


def _check_out(out: Path, overwrite: bool) -> None:
    """UserError, before anything is measured, where results would be lost or no chart could be drawn."""
    from openelm.bench.results import RESULT_FILE
    from openelm.report.plots import require_matplotlib

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if (out / RESULT_FILE).exists() and not overwrite:
        raise UserError(f"{out / RESULT_FILE} exists: choose another --out, or pass --overwrite")
    require_matplotlib()


def _write(out: Path, result: Result) -> None:
    from openelm.bench.results import CHART_FILE, RESULT_FILE, TABLE_FILE, write_text
    from openelm.bench.tables import chart, markdown
    from openelm.files import disk_errors_named, write_bytes

    with disk_errors_named(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / RESULT_FILE, json.dumps(result.as_json(), indent=1, ensure_ascii=False) + "\n")
        write_text(out / TABLE_FILE, markdown(result))
        if any(row.speeds() for row in result.rows):
            write_bytes(out / CHART_FILE, chart(result))
    print(f"{out}: {RESULT_FILE}, {TABLE_FILE}, {CHART_FILE}", file=sys.stderr)


def _compare(args: argparse.Namespace) -> int:
    from openelm.bench.compare import as_plain, compare
    from openelm.bench.results import read_result

    before, after = read_result(Path(args.before)), read_result(Path(args.after))
    lines = compare(before, after)
    print(json.dumps(as_plain(before, after)) if args.json else "\n".join(lines))
    return 0


def _train(args: argparse.Namespace) -> Result:
    from openelm.bench.results import Result, Row
    from openelm.bench.training import TrainingBench, announced_memory, bench_training
    from openelm.model.geometry import ModelConfig

    for name, least in (("row_length", 1), ("micro_batch", 1), ("micro_batches", 1), ("steps", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
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
    print(announced_memory(config, bench), file=sys.stderr)
    found = {"size": args.size, **bench_training(config, bench)}
    metrics = {"tokens_per_s": found.pop("tokens_per_s_all")}
    roof = {"flops_per_s": found.pop("gemm_flops_per_s_all"), "gemm_by": "the best square product of 2,048"}
    case = f"{args.micro_batches} x {args.micro_batch} rows of {args.row_length}"
    row = Row(f"training {args.size}", case, found, metrics)
    return Result("train", command_line(), settings(args), [row], roof)


def _data(args: argparse.Namespace) -> Result:
    from openelm.bench.data import bench_data
    from openelm.bench.results import Result, Row
    from openelm.data.packing import Packing
    from openelm.data.pieces import Preparation
    from openelm.data.sources import Source
    from openelm.data.tokenizer import Tokenizer

    for name in ("row_length", "repeats", "megabytes"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be more than 0")
    rows = []
    for mode in ("pack", "pad") if args.packing == "both" else (args.packing,):
        found = bench_data(
            Source("bench", args.source),
            Tokenizer.load(args.tokenizer),
            Preparation(),
            Packing(args.row_length, mode),
            max_bytes=int(args.megabytes * 1e6),
            repeats=args.repeats,
        )
        names = ("pipeline_bytes_per_s", "pipeline_tokens_per_s", "sentencepiece_bytes_per_s")
        metrics = {name: found.pop(f"{name}_all") for name in names}
        rows.append(Row(f"data, {mode}", f"rows of {args.row_length}", found, metrics))
    return Result("data", command_line(), settings(args), rows)


def _lines(result: Result) -> list[str]:
    """Name and value, one a line; of rates the median, then all."""
    from openelm.bench.results import busy_note

    lines = []
    for row in result.rows:
        values = {name: value for name, value in row.about.items() if name not in row.metrics}
        shown = {name: _text(value) for name, value in values.items()}
        for name, found in row.speeds().items():
            shown[name] = f"{_text(found.median)}  (all: {_text(row.metrics[name])}; spread {found.spread:.0%})"
        width = max(map(len, shown))
        lines += [f"{name.replace('_', ' '):<{width}}  {text}" for name, text in shown.items()]
    return lines + ([note] if (note := busy_note(result.rows)) else [])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "  ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def command_line() -> str:
    """The words that this was called with, for whoever repeats it."""
    return shlex.join(["openelm", *sys.argv[1:]])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, defaults too; where results go is none of it."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "json", "overwrite")}
