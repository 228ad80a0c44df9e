"""openelm data: look at what becomes of a text, count a recipe's sources, hash its rows, look for test sets in them."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from openelm.commands import data_overlap
from openelm.commands.progress import Progress
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.config import RunConfig
    from openelm.data.packing import Packing
    from openelm.data.pieces import Preparation
    from openelm.data.sources import Source, Unit
    from openelm.data.stream_state import Account
    from openelm.data.tokenizer import Tokenizer

HELP = "Inspect documents; count the text of a recipe, hash its rows, or look for test sets in it."
EXAMPLE = "openelm data count demo --max-documents 200"
INSPECT_EXAMPLE = "openelm data inspect notes.jsonl --tokenizer tokenizer.model --row-length 512 --json"
HASH_EXAMPLE = "openelm data hash demo train.steps=100 --rows 1000 --ranks 2 --workers 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm data``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        shape = argparse.RawDescriptionHelpFormatter  # the default one would break the example's line
        return actions.add_parser(name, help=text, epilog=f"example: {example}", formatter_class=shape)

    _add_inspect(add("inspect", "every piece of every document", INSPECT_EXAMPLE))
    count = add("count", "documents, bytes and tokens of a recipe's sources", EXAMPLE)
    _add_recipe(count)
    count.add_argument("--max-documents", type=int, metavar="N", help="of each source, shuffled (default: all)")
    count.set_defaults(act=count_recipe)
    rows = add("hash", "a checksum of a recipe's first rows", HASH_EXAMPLE)
    _add_recipe(rows)
    rows.add_argument("--rows", type=int, default=10_000, metavar="N", help="rows (default: 10000)")
    rows.add_argument("--ranks", type=int, default=1, metavar="N", help="as if on N ranks (default: 1)")
    rows.add_argument(
        "--workers", type=int, default=1, metavar="N", help="as if with N workers a rank, 0 for a thread (default: 1)"
    )
    rows.set_defaults(act=hash_rows)
    shared = add("overlap", "which test examples stand in a recipe's training text", data_overlap.EXAMPLE)
    _add_recipe(shared)
    data_overlap.add_arguments(shared)
    shared.set_defaults(act=data_overlap.run)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="text: a file, folder, glob or URL, or `python`")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help=".model file, tokenizer.json or folder")
    # The paper's settings, as the recipe's DataSection has them.
    for option, default, meaning in (
        ("--row-length", 2048, "tokens of a row"),
        ("--min-characters", 200, "pieces with fewer normalised characters are dropped"),
        ("--min-tokens", 256, "pieces with fewer tokens, BOS and EOS counted, are dropped"),
        ("--split-words", 2048, "words of a piece"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or Parquet column (default: text)")
    parser.add_argument("--ids", action="store_true", help="the ids of each piece too, as a padded row has them")
    parser.add_argument("--json", action="store_true", help="one JSON object a piece, each on its own line")
    parser.set_defaults(act=inspect)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="packaged recipe (demo, ...) or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as data.min_tokens=32")
    parser.add_argument("--json", action="store_true", help="print as one JSON object")


def run(args: argparse.Namespace) -> int:
    """What the action's function does."""
    code: int = args.act(args)
    return code


# inspect


def inspect(args: argparse.Namespace) -> int:
    """Print an entry for every piece, kept or dropped."""
    from openelm.data.pieces import Preparation
    from openelm.data.sources import Source, find_units
    from openelm.data.tokenizer import Tokenizer

    for option, least in (("row_length", 2), ("min_characters", 0), ("min_tokens", 0), ("split_words", 1)):
        _at_least(args, option, least)
    preparation = Preparation(args.min_characters, args.min_tokens, args.split_words)
    tokenizer = Tokenizer.load(args.tokenizer)
    # All are looked for first: a name that is not there is said before anything is printed.
    sources = [Source(name=path, path=path, text_key=args.text_key) for path in args.files]
    entries = inspected([(source, unit) for source in sources for unit in find_units(source)], preparation, tokenizer)
    if args.json:
        for entry in entries:
            print(json.dumps(_with_ids(entry, args)))
    else:
        _print_table(entries, args)
    return 0


def inspected(
    parts: list[tuple[Source, Unit]], preparation: Preparation, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """An entry a piece, documents numbered over all parts in reading order."""
    from openelm.data.sources import decode_record, read_records
    from openelm.data.stream import UNDECODABLE

    document = 0
    for source, unit in parts:
        for record in read_records(unit, source):
            text = decode_record(record, unit, source).text
            if text is None:
                nothing = {"piece": 0, "normalized_characters": 0, "tokens": 0, "kept": False}
                yield {"document": document, **nothing, "reason": UNDECODABLE, "ids": []}
            else:
                for entry in preparation.inspect(text, tokenizer):
                    yield {"document": document, **entry}
            document += 1


def _with_ids(entry: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The entry with its ids as a padded row has them, or without."""
    ids = entry.pop("ids")
    return {**entry, "ids": ids[: args.row_length + 1]} if args.ids else entry


def _print_table(entries: Iterator[dict[str, Any]], args: argparse.Namespace) -> None:
    """A line a piece, then the totals."""
    print(f"{'document':>8}  {'piece':>5}  {'characters':>10}  {'tokens':>8}  {'in row':>8}  outcome")
    documents, tokens, served = 0, 0, 0
    outcomes: Counter[str] = Counter()
    for entry in entries:
        outcome = entry["reason"] or "kept"
        in_row = min(entry["tokens"], args.row_length + 1) if entry["kept"] else 0
        print(
            f"{entry['document']:>8}  {entry['piece']:>5}  {entry['normalized_characters']:>10,}  "
            f"{entry['tokens']:>8,}  {in_row:>8,}  {outcome.replace('_', ' ')}"
        )
        if args.ids:
            print(f"          {' '.join(map(str, entry['ids'][: args.row_length + 1]))}")
        documents = entry["document"] + 1
        tokens, served = tokens + entry["tokens"], served + in_row
        outcomes[outcome] += 1
    pieces = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in outcomes.most_common())
    print(f"\n{documents:,} documents, {outcomes.total():,} pieces ({pieces or 'none'})")
    print(f"{tokens:,} tokens, {served:,} of them in rows of {args.row_length:,} (padded, one row a piece)")


# count


def count_recipe(args: argparse.Namespace) -> int:
    """Read every document of each source once, and print what there is."""
    from openelm.config import load_recipe
    from openelm.train import parts

    if args.max_documents is not None:
        _at_least(args, "max_documents", 1)
    config = load_recipe(args.recipe, args.overrides)
    sources, tokenizer = parts.sources(config), parts.load_tokenizer(config)
    progress = Progress()
    found = {
        source.name: count_source(config, tokenizer, index, source, args.max_documents, progress)
        for index, source in enumerate(sources)
    }
    progress.end()
    tokens, shares = sum(entry["tokens"] for entry in found.values()), sum(source.share for source in sources)
    for source in sources:
        entry = found[source.name]
        entry["share_of_tokens"] = entry["tokens"] / tokens if tokens else 0.0
        entry["share_of_mixture"] = source.share / shares
    result = {"recipe": config.name, "sources": found, "total": _total(found)}
    print(json.dumps(result, ensure_ascii=False) if args.json else _count_table(result))
    return 0


def count_source(
    config: RunConfig, tokenizer: Tokenizer, index: int, source: Source, limit: int | None, progress: Progress
) -> dict[str, Any]:
    """The account of one source's documents, each read once, in the order of the stream's first epoch.

    Counts are those of training text, as the stream's account has them; held-out text is counted apart.
    """
    from dataclasses import asdict

    from openelm.data.filters import utf8_bytes
    from openelm.data.packing import Packing
    from openelm.data.sources import find_units
    from openelm.data.stream import HELD_OUT, UNDECODABLE, is_held_out
    from openelm.data.stream_state import Account
    from openelm.data.walk import Blocks, NothingLeft, Walk
    from openelm.train import parts

    preparation, packing = parts.preparation(config), Packing(config.data.row_length, config.data.packing)
    corrupt: set[str] = set()
    walk = Walk(Blocks(source, find_units(source), corrupt.add), shard=0, shards=1, key=(config.seed, index))
    training, held_out, read_bytes, complete = Account(), Account(), 0, False
    while limit is None or training.documents < limit:
        try:
            found = walk.next()
        except NothingLeft:
            complete = True
            break
        if found.after.epoch:
            complete = True
            break
        training = training.plus(documents=1, invalid_utf8=int(found.problem == "invalid_utf8"))
        if found.text is None:
            training = training.plus(**{UNDECODABLE: 1})
        else:
            read_bytes += utf8_bytes(found.text)
            if is_held_out(found.text, config.data.held_out):
                training = training.plus(**{HELD_OUT: 1})
                held_out = _add_document(held_out, found.text, preparation, packing, tokenizer)
            else:
                training = _add_document(training, found.text, preparation, packing, tokenizer)
        progress.show(source.name, training.documents, read_bytes)
    apart = {f"held_out_{name}": getattr(held_out, name) for name in ("pieces", "bytes", "tokens")}
    return {**asdict(training), **apart, "read_bytes": read_bytes, "corrupt_files": len(corrupt), "complete": complete}


def _add_document(
    account: Account, text: str, preparation: Preparation, packing: Packing, tokenizer: Tokenizer
) -> Account:
    """The account with one document more: kept where one of its pieces is, else under its first piece's reason."""
    from openelm.data.filters import utf8_bytes
    from openelm.data.stream import KEPT

    fate = ""
    for piece in preparation.pieces(text, tokenizer):
        fate = KEPT if piece.ids else fate or piece.reason
        if piece.ids:
            account = account.plus(pieces=1, bytes=utf8_bytes(piece.text), tokens=packing.targets(piece.ids))
    return account.plus(**{fate: 1})


def _total(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sums over the sources of all that can be summed."""
    names = [name for name, value in next(iter(found.values())).items() if type(value) is int]
    complete = all(entry["complete"] for entry in found.values())
    return {**{name: sum(entry[name] for entry in found.values()) for name in names}, "complete": complete}


def _count_table(result: dict[str, Any]) -> str:
    """The account with a column a source, and what its words mean."""
    columns = {**result["sources"], **({"all": result["total"]} if len(result["sources"]) > 1 else {})}
    names = list(next(iter(result["sources"].values())))
    width = max(12, *(len(column) for column in columns))
    lines = [f"{'':<18}" + "".join(f"  {column:>{width}}" for column in columns)]
    for name in names:
        values = "".join(f"  {_shown(entry.get(name, '')):>{width}}" for entry in columns.values())
        lines.append(f"{name.replace('_', ' '):<18}{values}")
    lines += [
        "",
        "documents = kept + too few characters + too few tokens + undecodable + held out; pieces, bytes and tokens "
        "are those kept",
        "for training (a token is a target of the loss: all but each piece's BOS); read bytes are those of all text.",
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2%}" if isinstance(value, float) else str(value)


# hash


def hash_rows(args: argparse.Namespace) -> int:
    """Print a checksum over the recipe's first rows, and one of every thousand of them."""
    from openelm.config import load_recipe
    from openelm.data.row_hashes import row_hashes
    from openelm.train import parts

    for option, least in (("rows", 1), ("ranks", 1), ("workers", 0)):
        _at_least(args, option, least)
    config = load_recipe(args.recipe, args.overrides)
    stream = parts.token_stream(config, parts.load_tokenizer(config))
    result = row_hashes(stream, args.rows, args.ranks, max(1, args.workers))
    if args.json:
        print(json.dumps(result))
    else:
        for number, digest in enumerate(result["per_thousand"]):
            print(f"from row {1000 * number:>9,}  {digest}")
        print(f"{result['rows']:,} rows  {result['sha256']}")
    return 0


def _at_least(args: argparse.Namespace, option: str, least: int) -> None:
    value = getattr(args, option)
    if value < least:
        raise UserError(f"--{option.replace('_', '-')} {value} must be at least {least}")
