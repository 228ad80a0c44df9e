"""openelm perplexity: how well a model predicts text files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from openelm.commands.generate import add_engine_arguments, load_engine
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.infer.score import Score

HELP = "Measure perplexity and bits per byte of text files under a model."
EXAMPLE = "openelm perplexity runs/demo README.md docs/architecture.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm perplexity``."""
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder (its model/ is taken), or Hub id")
    parser.add_argument("files", metavar="FILE", nargs="+", help="UTF-8 text, each file one document")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: half of the model's context)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows computed at a time (default: 1)")
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Score each file by itself, and all together."""
    texts = read_texts(args.files)
    engine = load_engine(args)

    from openelm.infer.score import score_text

    scores = {
        file: score_text(engine.model, engine.tokenizer, text, stride=args.stride, batch_size=args.batch)
        for file, text in texts.items()
    }
    total = sum(list(scores.values())[1:], start=next(iter(scores.values())))
    if args.json:
        files = [{"file": file, **_as_dict(score)} for file, score in scores.items()]
        print(json.dumps({"files": files, "total": _as_dict(total)}, indent=1, ensure_ascii=False))
    else:
        print(_table({**scores, "all": total} if len(scores) > 1 else scores))
    return 0


def read_texts(files: list[str]) -> dict[str, str]:
    """Contents by file name, each file once; all that cannot be scored are named together."""
    texts, problems = {}, []
    for file in files:
        try:
            texts[file] = Path(file).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"{file} is not UTF-8 (byte {error.start}): convert it first")
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
        else:
            if not texts[file]:
                problems.append(f"{file} is empty: there is nothing to score")
    if problems:
        raise UserError("; ".join(problems))
    return texts


def _as_dict(score: Score) -> dict[str, float]:
    return {
        "bytes": score.bytes,
        "tokens": score.tokens,
        "nats": score.nats,
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
    }


def _table(scores: dict[str, Score]) -> str:
    width = max(4, *map(len, scores))
    lines = [f"{'file':<{width}}  {'bytes':>11}  {'tokens':>10}  {'bits/byte':>9}  {'perplexity':>10}"]
    for file, score in scores.items():
        lines.append(
            f"{file:<{width}}  {score.bytes:>11,}  {score.tokens:>10,}  {score.bits_per_byte:>9.4f}  "
            f"{score.perplexity:>10.2f}"
        )
    return "\n".join(lines)
