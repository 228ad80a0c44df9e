"""openelm tokenizer: train one on any text, or look at one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.data.tokenizer import Tokenizer

HELP = "Train a tokenizer, or look at one."
EXAMPLE = "openelm tokenizer train python --vocab-size 4096 --out tokenizer.model"
SHOW_EXAMPLE = 'openelm tokenizer show tokenizer.model --text "def main():"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm tokenizer``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        shape = argparse.RawDescriptionHelpFormatter  # the default one would break the example's line
        return actions.add_parser(name, help=text, epilog=f"example: {example}", formatter_class=shape)

    train = add("train", "train a SentencePiece BPE with byte fallback", EXAMPLE)
    train.add_argument(
        "files", metavar="FILE", nargs="+", help="text: a file, folder, glob or URL, or `python` for Python's own"
    )
    train.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="pieces (default: 4096)")
    train.add_argument("--out", required=True, metavar="PATH", help="the .model file to write")
    train.add_argument(
        "--max-bytes",
        type=int,
        default=100_000_000,
        metavar="N",
        help="text to train on at most, a sample shared among the FILEs by size (default: 100 MB)",
    )
    train.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or Parquet column (default: text)")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default: 0)")
    train.add_argument("--overwrite", action="store_true", help="replace PATH where it exists")
    train.set_defaults(act=train_one)
    show = add("show", "size, special tokens, and how a text is cut", SHOW_EXAMPLE)
    show.add_argument("path", metavar="PATH", help=".model file, tokenizer.json, or a folder that holds one")
    show.add_argument("--text", metavar="TEXT", help="text to cut into pieces")
    show.add_argument("--json", action="store_true", help="print as one JSON object")
    show.set_defaults(act=show_one)


def run(args: argparse.Namespace) -> int:
    """What the action's function does."""
    code: int = args.act(args)
    return code


def train_one(args: argparse.Namespace) -> int:
    """Train on a sample of the text and write the .model file."""
    from openelm.data.tokenizer import train_tokenizer

    out = Path(args.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of a file in it, as {out / 'tokenizer.model'}")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists: choose another name with --out, or pass --overwrite")
    if args.max_bytes < 1:
        raise UserError(f"--max-bytes {args.max_bytes} must be at least 1")
    texts = Sample(args)
    tokenizer = train_tokenizer(texts, out, args.vocab_size)
    print(f"{out}: {tokenizer.vocab_size} pieces, trained on {texts.documents:,} documents of {texts.bytes:,} bytes")
    return 0


class Sample:
    """Shuffled documents of each FILE, up to its part of --max-bytes; counted while they are read."""

    def __init__(self, args: argparse.Namespace) -> None:
        from openelm.data.sources import Source, find_units

        self.sources = [Source(name=path, path=path, text_key=args.text_key) for path in args.files]
        self.sizes = [max(1, sum(unit.size_bytes for unit in find_units(source))) for source in self.sources]
        self.max_bytes, self.seed = args.max_bytes, args.seed
        self.documents = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        from openelm.data.filters import utf8_bytes
        from openelm.data.walk import documents_once

        for index, source in enumerate(self.sources):
            left = self.max_bytes * self.sizes[index] / sum(self.sizes)
            for text in documents_once(source, (self.seed, index)):
                if left <= 0:
                    break
                size = utf8_bytes(text)
                left -= size
                self.documents += 1
                self.bytes += size
                yield text


def show_one(args: argparse.Namespace) -> int:
    """Print what a tokenizer is, and what it makes of a text."""
    from openelm.data.tokenizer import Tokenizer

    found = describe(Tokenizer.load(args.path), args.text)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    for name in ("bos", "eos", "pad"):
        entry = found[name]
        found[name] = f"{entry['id']} {entry['piece']}" if entry else "none"
    pieces = found.pop("pieces", None)
    found.pop("ids", None)
    for name, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<16}{shown}")
    if pieces is not None:
        _print_encodable(f"{'pieces':<16}{' '.join(pieces)}")
    return 0


def describe(tokenizer: Tokenizer, text: str | None) -> dict[str, Any]:
    """Size and special tokens; with a text also its ids, pieces and bytes per token."""
    from openelm.data.filters import utf8_bytes

    found: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    for name, id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
        found[name] = None if id is None else {"id": id, "piece": tokenizer.piece(id)}
    found["sha256"] = tokenizer.fingerprint
    if text is not None:
        ids = tokenizer.encode(text)
        size = utf8_bytes(text)
        found |= {"bytes": size, "tokens": len(ids), "bytes_per_token": size / len(ids) if ids else None}
        found |= {"ids": ids, "pieces": [tokenizer.piece(id) for id in ids]}
    return found


def _print_encodable(text: str) -> None:
    """Pieces spell a space as U+2581, which not every terminal's encoding has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
