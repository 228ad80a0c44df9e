"""openelm quantize: a model's weights in 4 or 8 bits, and what that costs on text that it has not seen."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.commands.convert import DTYPE_NAMES, ended_as_interrupted, how_to_get_one
from openelm.errors import UserError

if TYPE_CHECKING:
    import torch

    from openelm.data.excerpts import Excerpts
    from openelm.infer.distance import Distance
    from openelm.interop.source import Source
    from openelm.interop.target import Format

HELP = "Round a model's weights to 4 or 8 bits; to 4 with GPTQ, calibrated on real text."
EXAMPLE = "openelm quantize runs/demo demo-4bit --bits 4 --group-size 32"
METHODS = ("round", "gptq")
PYTHON = "python"  # the text of the Python installation, where none is given
HELD_OUT = 0.02  # of its documents; a run on this text that holds out as many did not see them
ROW_LENGTH = 512  # of calibration text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm quantize``."""
    parser.add_argument("model", metavar="MODEL", help="what is to be quantised, named as for openelm convert")
    parser.add_argument("out", metavar="OUT", help="the folder to write, in mlx-lm's layout")
    parser.add_argument("--bits", type=int, choices=(4, 8), required=True, help="of a weight")
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), default=64, help="weights that share a scale (default: 64)"
    )
    parser.add_argument(
        "--method", choices=METHODS, help="round to nearest, or GPTQ on calibration text (default: gptq for 4 bits)"
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="TEXT",
        help="files or folders, as for a recipe's sources (default: the Python installation's own text)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=2**15,
        metavar="N",
        help="to calibrate on, and at most to evaluate on (default: 32768)",
    )
    parser.add_argument(
        "--evaluate",
        nargs="+",
        metavar="TEXT",
        help="text to compare with the unquantised model on (default: held-out documents of the Python installation)",
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPE_NAMES.values(), *DTYPE_NAMES),
        metavar="NAME",
        help="of scales and of what is not quantised (default: the model's, where it has 16 bits, else bfloat16)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a tokenizer for a model without one: file, folder or Hub id"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is a model already")
    parser.add_argument("--json", action="store_true", help="what was done as one JSON object")


@dataclass
class Result:
    """What was done."""

    method: str
    bits_per_weight: float
    before_bytes: int
    after_bytes: int = 0
    left: list[str] = field(default_factory=list)  # matrices that are not quantised
    calibrated_on: dict[str, Any] | None = None
    evaluated_on: dict[str, Any] | None = None


def run(args: argparse.Namespace) -> int:
    """Calibrate, write, compare, say what was done."""
    from openelm.interop.convert import convert, within_range

    method = args.method or ("gptq" if args.bits == 4 else "round")
    source = open_model(args, method)
    form = chosen_format(args, source)
    source = within_range(source, form)
    for note in source.notes:
        print(note, file=sys.stderr)
    result = Result(method, bits_per_weight(source, form), stored_bytes(args.model), left=left_alone(source, form))
    with ended_as_interrupted():
        held_out = evaluation_text(args, source, method)
        if method == "gptq":
            source = calibrated(args, source, form, held_out, result)
        else:
            source = with_note(source, f"{args.bits} bits in groups of {args.group_size}, rounded to nearest")

        def check(written: Path) -> None:
            if held_out is not None:
                result.evaluated_on = evaluated(args, source, form, held_out, written)

        convert(source, "mlx", Path(args.out), form, overwrite=args.overwrite, check=check)
    result.after_bytes = stored_bytes(args.out)
    report(args, form, result)
    return 0


def open_model(args: argparse.Namespace, method: str) -> Source:
    """The model, with the tokenizer that was asked for; UserError, before anything is computed, for what cannot be."""
    from openelm.data.tokenizer import Tokenizer
    from openelm.interop.convert import check_destination, open_source
    from openelm.interop.hub import tokenizer_path
    from openelm.interop.source import with_tokenizer

    out = Path(args.out)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens} must be at least 1")
    if args.calibration and method == "round":
        raise UserError(
            f"--calibration {' '.join(args.calibration)} is of no use to rounding: leave it out, or pass --method gptq"
        )
    check_destination(out, is_file=False, overwrite=args.overwrite)
    source = open_source(args.model)
    if out.resolve() in {Path(args.model).resolve(), (Path(args.model) / "model").resolve()}:
        raise UserError(f"{out} is the model itself, of which quantised weights keep less: choose another name")
    if source.quantized:
        raise UserError(
            f"{args.model} is quantised already, and codes of codes are further off: give the model that it was made of"
        )
    tokenizer = Tokenizer.load(tokenizer_path(args.tokenizer)) if args.tokenizer else source.tokenizer
    return with_tokenizer(source, tokenizer) if tokenizer is not None else source


def chosen_format(args: argparse.Namespace, source: Source) -> Format:
    """Bits, groups and dtype. UserError where no matrix has rows of whole groups."""
    import torch

    from openelm.interop.target import Format
    from openelm.model.folder import DTYPES
    from openelm.model.quantize import fits

    dtype = source.dtype if source.dtype.itemsize == 2 else torch.bfloat16
    if args.dtype:
        dtype = DTYPES[DTYPE_NAMES.get(args.dtype, args.dtype)]
    if not any(fits(shape, args.group_size) for shape in source.shapes.values()):
        longest = max(shape[1] for shape in source.shapes.values() if len(shape) == 2)
        raise UserError(
            f"--group-size {args.group_size}: no matrix of {args.model} has rows of whole groups (the longest row has "
            f"{longest} values), so nothing would be quantised: choose a smaller one"
        )
    return Format(dtype, f"{args.bits}bit", args.group_size)


def bits_per_weight(source: Source, form: Format) -> float:
    """Of all that is written, scales and norms included."""
    from openelm.interop.mlx import entries_of

    size = sum(entry.num_bytes for name, shape in source.shapes.items() for entry in entries_of(name, shape, form))
    return 8 * size / source.config.num_parameters()


def left_alone(source: Source, form: Format) -> list[str]:
    """Matrices whose rows are not whole groups."""
    from openelm.interop.mlx import is_quantized

    return [name for name, shape in source.shapes.items() if len(shape) == 2 and not is_quantized(shape, form)]


def stored_bytes(reference: str) -> int:
    """Size of a model's weights on disk: of a folder's safetensors, or of a file."""
    from openelm.interop.hub import model_path
    from openelm.model.folder import find_model_folder

    path = model_path(reference)
    files = find_model_folder(path).glob("model*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def evaluation_text(args: argparse.Namespace, source: Source, method: str) -> Excerpts | None:
    """The documents that both models are asked about; None, said, where there is no tokenizer and none is needed."""
    from openelm.data.excerpts import excerpts

    if source.tokenizer is None:
        help_ = how_to_get_one(args.model, source)
        if method == "round" and not args.evaluate:
            print(f"what is lost is not measured. {help_}", file=sys.stderr)
            return None
        raise UserError(help_)
    own = bool(args.evaluate)
    found = excerpts(args.evaluate or [PYTHON], source.tokenizer, args.tokens, held_out=1.0 if own else HELD_OUT)
    if not found.documents:
        raise UserError(f"--evaluate {' '.join(args.evaluate or [PYTHON])}: there is no text in it: give another")
    return found


def calibrated(
    args: argparse.Namespace, source: Source, form: Format, held_out: Excerpts | None, result: Result
) -> Source:
    """The source with codes of GPTQ. UserError where there is not as much text as was asked for."""
    from openelm.data.excerpts import excerpts
    from openelm.infer.calibrate import calibrate, passes

    assert source.tokenizer is not None and held_out is not None
    paths = args.calibration or [PYTHON]
    length = min(ROW_LENGTH, source.config.max_context_length)
    found = excerpts(paths, source.tokenizer, args.tokens, but=held_out.digests)
    rows = found.rows(length)[: -(-args.tokens // length)]
    if found.tokens < args.tokens or not rows:
        raise UserError(
            f"calibration on {args.tokens:,} tokens: {' '.join(paths)} has {found.tokens:,} beside those that are "
            f"evaluated on, and a row takes {length}: give more text, or a smaller --tokens"
        )
    start_s = time.monotonic()
    with progress("calibrating", passes(source.config) * source.config.num_transformer_layers) as done:
        codes = calibrate(source.config, reader(source, form), rows, args.bits, args.group_size, done)
    tokens = len(rows) * length
    result.calibrated_on = {
        "text": paths,
        "documents": len(found.digests),
        "tokens": tokens,
        "seconds": time.monotonic() - start_s,
        "notes": codes.notes,
    }
    note = f"{args.bits} bits in groups of {args.group_size} by GPTQ, on {tokens:,} tokens of {in_words(paths)}"
    return with_note(replace(source, codes=codes.codes), note)


def evaluated(
    args: argparse.Namespace, source: Source, form: Format, held_out: Excerpts, written: Path
) -> dict[str, Any]:
    """The comparison with the unquantised model, which the card tells too."""
    from openelm.infer.distance import distance
    from openelm.interop.source import open_folder

    start_s, config = time.monotonic(), source.config
    with progress("comparing", 2 * config.num_transformer_layers) as done:
        found = distance(
            config, reader(source, form), open_folder(written).weight, held_out.documents, held_out.num_bytes, done
        )
    figures = as_dict(found)
    paths = args.evaluate or [PYTHON]
    about = {"text": paths, "documents": len(held_out.digests), "tokens": held_out.tokens, "bytes": held_out.num_bytes}
    add_to_card(written / "README.md", f"{in_words(paths)}: {in_one_line(figures)}")
    return {**about, **figures, "seconds": time.monotonic() - start_s}


def reader(source: Source, form: Format) -> Callable[[str], torch.Tensor]:
    """The unquantised weights in the dtype that the result has."""
    return lambda name: source.weight(name).to(form.dtype)


def with_note(source: Source, note: str) -> Source:
    """The source with a remark for the model card."""
    return replace(source, notes=(*source.notes, note))


def add_to_card(file: Path, line: str) -> None:
    """One more remark below what the card says of the conversion."""
    from openelm.interop.card import CONVERTED, parse, render, section, with_section

    metadata, body = parse(file.read_text(encoding="utf-8"))
    text = f"{section(body, CONVERTED)}\n- {line}"
    file.write_text(render(metadata, with_section(body, CONVERTED, text)), encoding="utf-8")


def in_words(paths: list[str]) -> str:
    """Where text is from, for a card: no path of anybody's machine."""
    names = ("the Python installation" if path == PYTHON else Path(path).name for path in paths)
    return f"text of {', '.join(names)}"


def as_dict(found: Distance) -> dict[str, float]:
    """The figures by name."""
    return {
        "bits_per_byte_before": found.reference.bits_per_byte,
        "bits_per_byte": found.model.bits_per_byte,
        "perplexity_ratio": found.perplexity_ratio,
        "kl": found.kl,
        "top_1_agreement": found.agreement,
    }


def in_one_line(figures: dict[str, Any]) -> str:
    """The figures in words."""
    return (
        f"{figures['bits_per_byte']:.4f} bits per byte, before {figures['bits_per_byte_before']:.4f} (perplexity times "
        f"{figures['perplexity_ratio']:.4f}), KL {figures['kl']:.5f} nats a token, the same likeliest token at "
        f"{figures['top_1_agreement']:.2%}"
    )


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where that is a terminal; gives what advances it."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def report(args: argparse.Namespace, form: Format, result: Result) -> None:
    """A few lines, or all of it as JSON."""
    dtype = str(form.dtype).removeprefix("torch.")
    if args.json:
        figures = {
            "source": args.model,
            "destination": args.out,
            "bits": args.bits,
            "group_size": args.group_size,
            "method": result.method,
            "dtype": dtype,
            "bits_per_weight": result.bits_per_weight,
            "bytes_before": result.before_bytes,
            "bytes": result.after_bytes,
            "not_quantized": result.left,
            "calibration": result.calibrated_on,
            "evaluation": result.evaluated_on,
        }
        print(json.dumps(figures, ensure_ascii=False))
        return
    print(
        f"{args.out}: {args.bits} bits in groups of {args.group_size} ({result.method}), {result.bits_per_weight:.2f} "
        f"bits a weight with scales in {dtype}; {result.before_bytes / 1e6:,.1f} MB -> "
        f"{result.after_bytes / 1e6:,.1f} MB"
    )
    if result.left:
        print(f"{len(result.left)} matrices whose rows are not whole groups stay in {dtype}: {', '.join(result.left)}")
    if (on := result.calibrated_on) is not None:
        print(f"calibrated on {on['tokens']:,} tokens of {in_words(on['text'])} in {on['seconds']:,.0f} s")
        print(*on["notes"], sep="\n", end="\n" if on["notes"] else "")
    if (on := result.evaluated_on) is not None:
        where = f"{on['tokens']:,} tokens of {in_words(on['text'])} that calibration did not see"
        print(f"on {where} ({on['seconds']:,.0f} s): {in_one_line(on)}")
