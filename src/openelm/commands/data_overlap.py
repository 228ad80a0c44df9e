"""openelm data overlap: which examples of test sets stand in a recipe's training text."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.commands.progress import Progress
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.config import RunConfig
    from openelm.data.overlap import Overlap, Read, SetOverlap
    from openelm.data.test_sets import TestExample
    from openelm.evaluate.suites import Spec

EXAMPLE = "openelm data overlap demo --tests questions.jsonl --n 8"
SHOWN_CHARACTERS = 240  # of a passage; --json has it whole
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm data overlap``, beside those of every action on a recipe."""
    sets = parser.add_mutually_exclusive_group(required=True)
    sets.add_argument("--suite", metavar="NAME", help="the test sets of a suite, as `openelm evaluate` has them")
    sets.add_argument("--tasks", metavar="A,B", help="those of these tasks")
    sets.add_argument("--tests", metavar="FILE", nargs="+", help="test sets: JSON lines (also .gz, .zst) or Parquet")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with --suite or --tasks: their local files")
    parser.add_argument("--field", metavar="NAME", help="with --tests: the text to compare (default: all of a row)")
    # Not from data/overlap.py: help must not wait for numpy.
    parser.add_argument("--n", type=int, default=13, metavar="N", help="words in a row that count (default: 13)")
    parser.add_argument("--max-documents", type=int, metavar="N", help="of each source (default: all)")
    parser.add_argument("--show", type=int, default=5, metavar="N", help="examples shown of each set (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Read the training text once; print what the test sets share with it, also when stopped by Ctrl-C."""
    for option, value, least in (("n", args.n, 1), ("max-documents", args.max_documents, 1), ("show", args.show, 0)):
        if value is not None and value < least:
            raise UserError(f"--{option} {value} must be at least {least}")
    if args.tests is None and args.field is not None:
        raise UserError(f"--field {args.field} goes with --tests: leave it out")
    if args.tests is not None and args.data is not None:
        raise UserError(f"--data {args.data} goes with --suite or --tasks: leave it out")

    from openelm.config import load_recipe
    from openelm.data.overlap import Overlap
    from openelm.data.test_sets import read_examples

    # Overrides may stand behind the files, where argparse takes them for more of these.
    behind = [word for word in args.tests or () if re.match(r"[\w.]+=", word) and not Path(word).exists()]
    config = load_recipe(args.recipe, args.overrides + behind)
    if args.tests is not None:
        files = [word for word in dict.fromkeys(args.tests) if word not in behind]
        examples: Iterable[TestExample] = (one for file in files for one in read_examples(file, args.field))
    else:
        from openelm.evaluate import suites, tasks

        examples = task_examples(suites.suite(args.suite) if args.suite else tasks.parse(args.tasks), args.data)
    overlap = Overlap(examples, args.n)
    sources, interrupted = read_training_text(config, overlap, args.max_documents)
    sets = overlap.found()
    if args.json:
        print(json.dumps(as_dict(config.name, args.n, sources, sets), ensure_ascii=False))
    else:
        print(_tables(args, sources, sets))
    return INTERRUPTED if interrupted else 0


def read_training_text(config: RunConfig, overlap: Overlap, limit: int | None) -> tuple[dict[str, Read], bool]:
    """Look at every source that is trained on; what was read of each, and whether Ctrl-C ended it."""
    from openelm.data.overlap import Read, read_source
    from openelm.train import parts

    wanted = [(index, source) for index, source in enumerate(parts.sources(config)) if source.share]
    reads = {source.name: Read() for _, source in wanted}
    progress, held_out = Progress(), config.data.held_out
    try:
        for index, source in wanted:
            read, seed = reads[source.name], (config.seed, index)
            for _ in read_source(source, overlap, read, held_out=held_out, limit=limit, seed=seed):
                progress.show(source.name, read.documents, read.bytes)
    except KeyboardInterrupt:
        progress.end()
        print("interrupted: this is what was found so far", file=sys.stderr)
        return reads, True
    progress.end()
    return reads, False


# Test sets of a suite


def task_examples(specs: Iterable[Spec], data: Path | None) -> Iterator[TestExample]:
    """The examples of tasks, each as prompt and right answer, every task once."""
    from openelm.data.test_sets import TestExample
    from openelm.evaluate.tasks import load

    done: set[str] = set()
    for spec in specs:
        # No few-shot examples: what they are taken from is not what is measured.
        for name, task in load(replace(spec, shots=0), data)["tasks"].items() if spec.task not in done else ():
            if name not in done:
                done.add(name)
                for number, doc in enumerate(task.eval_docs):
                    yield TestExample(name, str(number), text_of(task, doc))
        done.add(spec.task)


def text_of(task: Any, doc: Any) -> str:
    """Prompt and right answer of an example.

    Either may be the number of a choice: WinoGrande's prompts are its choices.
    """

    def said(part: Any) -> str:
        if isinstance(part, list | tuple):
            return " ".join(map(said, part))
        is_choice = isinstance(part, int) and task.OUTPUT_TYPE == "multiple_choice"
        return str(task.doc_to_choice(doc)[part] if is_choice else part)

    return f"{said(task.doc_to_text(doc))} {said(task.doc_to_target(doc))}"


# What is printed


def as_dict(recipe: str, n: int, sources: dict[str, Read], sets: list[SetOverlap]) -> dict[str, Any]:
    """The whole result; passages are named by source, file and number of the document."""
    return {
        "recipe": recipe,
        "n": n,
        "complete": all(read.complete for read in sources.values()),
        "sources": {name: asdict(read) for name, read in sources.items()},
        "sets": [
            {
                "set": one.set,
                "examples": one.examples,
                "short": one.short,
                "shared": len(one.shared),
                "share": one.share,
                "found": [
                    {
                        "id": example.id,
                        "words": example.words,
                        "covered": example.covered,
                        "longest": {
                            "words": example.longest.words,
                            "text": example.longest.text,
                            **example.longest.location._asdict(),
                        },
                    }
                    for example in one.shared
                ],
            }
            for one in sets
        ],
    }


def _tables(args: argparse.Namespace, sources: dict[str, Read], sets: list[SetOverlap]) -> str:
    """What was read, what each set shares with it, and the examples that share most."""
    width = max(12, *map(len, sources))
    lines = [f"{'source':<{width}}  {'documents':>11}  {'held out':>9}  {'undecodable':>11}  {'MB':>9}"]
    for name, read in sources.items():
        counts = f"{read.documents:>11,}  {read.held_out:>9,}  {read.undecodable:>11,}  {read.bytes / 1e6:>9,.1f}"
        lines.append(f"{name:<{width}}  {counts}" + ("" if read.complete else "  in part"))
    width = max(12, *(len(one.set) for one in sets))
    lines += ["", f"{'test set':<{width}}  {'examples':>9}  {'too short':>9}  {'shared':>7}  {'share':>7}"]
    for one in sets:
        share = "-" if one.share is None else f"{one.share:.2%}"
        lines.append(f"{one.set:<{width}}  {one.examples:>9,}  {one.short:>9,}  {len(one.shared):>7,}  {share:>7}")
    lines += [
        "",
        f"shared: {args.n} or more of its words in a row stand in a training document, case and punctuation aside; too",
        "short: with fewer words of its own, not compared; share: of those compared. Held-out text is not looked at.",
    ]
    for one in sets:
        if shown := one.shared[: args.show]:
            lines += ["", f"{one.set}: {len(shown):,} of {len(one.shared):,} shared, the most covered first"]
        for example in shown:
            found = example.longest
            place = f"{found.location.source}: {found.location.file}, document {found.location.document}"
            measure = f"{example.covered:.0%} of {example.words:,} words, {found.words:,} in a row"
            lines.append(f"  example {example.id}: {measure} in {place}")
            passage = textwrap.shorten(found.text, SHOWN_CHARACTERS, placeholder=" …")
            lines.append(textwrap.indent(textwrap.fill(passage, 112), "    "))
    return "\n".join(lines)
