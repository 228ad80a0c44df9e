"""The paper's results beside one's own: Tables 4, 5 and 6 with rows of the user's, as Markdown or LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from openelm.errors import UserError
from openelm.evaluate import suites
from openelm.evaluate.results import Evaluation, How, TaskResult
from openelm.evaluate.suites import Spec
from openelm.report.markdown import aligned

PUBLISHED = Path(__file__).with_name("published.yaml")
TOLERANCE = 0.01  # percentage points: what rounding the values and rounding their average can add up to
OWN_ROWS = "Rows in bold are one's own; the others are the paper's."
MISSING = "-"
FORMS = ("markdown", "latex")


@dataclass(frozen=True)
class Row:
    """One model in a table. Values are percentages by column title; a task that was not measured is absent."""

    name: str
    size: float | None  # parameters
    tokens: float | None  # of pre-training
    values: Mapping[str, float]
    variant: str = ""  # instruction tuned or not, or the method of fine-tuning, in tables that have such a column


@dataclass(frozen=True)
class OwnRow(Row):
    """A row of the user's: standard errors in percentage points where they are to be shown, and what to say of it."""

    errors: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class PublishedRow(Row):
    """A row of the paper's: its averages as printed, and as they follow from its values; None is a dash."""

    printed: Mapping[str, float | None] = field(default_factory=dict)
    averages: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def flags(self) -> dict[str, tuple[float, float | None]]:
        """Title -> (printed, recomputed) of each average that does not follow from the values."""
        pairs = {title: (value, self.averages[title]) for title, value in self.printed.items() if value is not None}
        return {title: pair for title, pair in pairs.items() if not _agree(*pair)}


@dataclass(frozen=True)
class Table:
    """The layout of a table of the paper, and its rows in the paper's order."""

    name: str
    title: str
    suite: str
    variant: str | None  # the heading of the column that stands in place of the pre-training tokens
    columns: tuple[str, ...]
    averages: Mapping[str, Sequence[str]]  # each with the columns that it is the mean of
    notes: tuple[str, ...]
    rows: tuple[PublishedRow, ...]

    @property
    def head(self) -> list[str]:
        return ["Model", "Model size", self.variant or "Pre-training tokens", *self.columns, *self.averages]


def names() -> tuple[str, ...]:
    """The paper's tables of accuracies."""
    return tuple(_published()["tables"])


def table(name: str) -> Table:
    """A table of the paper by its number, as "4a"; UserError for another."""
    published = _published()
    if name not in published["tables"]:
        raise UserError(f"table {name!r} is not one of accuracies in the paper: use one of {', '.join(names())}")
    entry = published["tables"][name]
    means = {title: columns for title, columns in suites.averages(entry["suite"]).items() if title in entry["averages"]}
    return Table(
        name=name,
        title=entry["title"],
        suite=entry["suite"],
        variant=entry.get("variant"),
        columns=tuple(entry["columns"]),
        averages=means,
        notes=tuple(note for column, note in published["notes"].items() if column in entry["columns"]),
        rows=tuple(_row(row, entry["columns"], means) for row in entry["rows"]),
    )


def rows(name: str) -> tuple[PublishedRow, ...]:
    """The paper's rows of a table, their averages recomputed and those that do not follow flagged."""
    return table(name).rows


def averages(values: Mapping[str, float], means: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """The mean over the columns of each average; None where one of them is missing."""
    return {
        title: sum(values[column] for column in columns) / len(columns) if set(columns) <= values.keys() else None
        for title, columns in means.items()
    }


# A row of one's own


def own_row(
    evaluation: Evaluation,
    name: str,
    *,
    label: str = "",
    tokens: float | None = None,
    variant: str = "",
    how: How | None = None,
) -> OwnRow:
    """What was measured of a model, as a row of a table; ``how`` shows nothing but what was measured in that way.

    ``label`` stands for the model's origin; ``tokens`` for those that the evaluation knows of. A task measured on its
    first examples only is shown where it was not measured whole, and the row says so.
    """
    model = evaluation.model
    values, errors, cut = {}, {}, []
    for spec in suites.suite(table(name).suite):
        result = measured(evaluation, spec) if how is None else evaluation.find(spec.task, spec.shots, how)
        if result is None or not math.isfinite(result.metrics.get(spec.metric, math.nan)):
            continue
        values[spec.title] = 100 * result.metrics[spec.metric]
        error = result.metrics.get(f"{spec.metric}_stderr", math.nan)
        if math.isfinite(error):
            errors[spec.title] = 100 * error
        if result.limit is not None:
            cut.append(f"{spec.title} on its first {result.limit:,} examples")
    return OwnRow(
        name=label or str(model.get("origin") or "this model").rstrip("/").rpartition("/")[2],
        size=model.get("parameters"),
        tokens=model.get("tokens") if tokens is None else tokens,
        values=values,
        variant=variant,
        errors=errors,
        note=", ".join(cut),
    )


def measured(evaluation: Evaluation, spec: Spec) -> TaskResult | None:
    """The result of a suite's task with the metric that it wants: with BOS, no chat, of all examples or of the most."""
    found = [
        result
        for result in evaluation.tasks.values()
        if (result.task, result.shots) == (spec.task, spec.shots)
        and math.isfinite(result.metrics.get(spec.metric, math.nan))
    ]

    def standard(result: TaskResult) -> tuple[bool, bool, float]:
        return result.bos, not result.chat, math.inf if result.limit is None else result.limit

    return max(found, key=standard, default=None)


# Text


def render(name: str, ours: Sequence[OwnRow], form: str = "markdown", *, errors: bool = False) -> str:
    """A table in the paper's layout as Markdown or LaTeX (with booktabs), and what must be known of it below.

    One's own rows are in bold, each behind the paper's last row that is no larger. With ``errors``, their values have
    standard errors.
    """
    if form not in FORMS:
        raise UserError(f"form {form!r} is not one that tables are written in: use one of {', '.join(FORMS)}")
    layout = table(name)
    notes: list[str] = []
    lines = [_cells(row, layout, notes, errors=errors) for row in _merged(layout.rows, ours)]
    below = [*([OWN_ROWS] if ours else []), *layout.notes]
    return (_markdown if form == "markdown" else _latex)(layout, lines, notes, below)


def amount(value: float | None, decimals: int) -> str:
    """A count with the paper's letters, which begin at a tenth: 0.27 B parameters, 0.2 T tokens."""
    if value is None:
        return MISSING
    scale = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
    unit, letter = next(((unit, letter) for unit, letter in scale if value >= unit / 10), (1e3, "k"))
    return f"{value / unit:.{decimals}f} {letter}"


@dataclass(frozen=True)
class _Cell:
    """A cell's text before it is escaped, and the number of its note, 0 for none."""

    text: str
    note: int = 0
    own: bool = False


def _cells(row: Row, layout: Table, notes: list[str], *, errors: bool) -> list[_Cell]:
    """A row's cells; what is to be said of it is appended to ``notes``."""
    means = averages(row.values, layout.averages)
    marks: dict[str, int] = {}
    shown_errors: Mapping[str, float] = {}
    if isinstance(row, PublishedRow):
        means = dict(row.printed)
        for title, (printed, recomputed) in row.flags.items():
            gives = f"{_percent(printed)} is printed, {_percent(recomputed)} is the mean of the values"
            notes.append(f"{row.name}, {amount(row.size, 2)}: {title}: {gives}.")
            marks[title] = len(notes)
    elif isinstance(row, OwnRow):
        shown_errors = row.errors if errors else {}
        if row.note:
            notes.append(f"{row.name}: {row.note}.")
            marks["Model"] = len(notes)
    third = (row.variant or MISSING) if layout.variant else amount(row.tokens, 1)
    values = [_percent(row.values.get(title), shown_errors.get(title)) for title in layout.columns]
    texts = [row.name, amount(row.size, 2), third, *values, *(_percent(means[title]) for title in layout.averages)]
    own = isinstance(row, OwnRow)
    return [
        _Cell(" ".join(text.split()), marks.get(title, 0), own and title == "Model")
        for title, text in zip(layout.head, texts, strict=True)
    ]


def _merged(published: Sequence[Row], ours: Sequence[OwnRow]) -> list[Row]:
    """The paper's rows in its order, which is by size class; each of ours behind the last that is no larger."""
    # Compared as they are printed: a model of 1,079,891,456 parameters is no smaller than one of 1.08 B.
    billions = [_billions(row) for row in published]
    places: list[tuple[int, float, Row]] = [(number, -1, row) for number, row in enumerate(published, 1)]
    for row in ours:
        size = _billions(row)
        behind = max((number for number, other in enumerate(billions, 1) if other <= size), default=0)
        places.append((behind, size, row))
    return [row for _, _, row in sorted(places, key=lambda place: place[:2])]


def _billions(row: Row) -> float:
    return math.inf if row.size is None else round(row.size / 1e9, 2)


def _percent(value: float | None, error: float | None = None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _markdown(layout: Table, lines: Sequence[Sequence[_Cell]], notes: Sequence[str], below: Sequence[str]) -> str:
    def text(cell: _Cell) -> str:
        inner = _escape_markdown(cell.text)
        return (f"**{inner}**" if cell.own else inner) + (f"<sup>{cell.note}</sup>" if cell.note else "")

    head = [_escape_markdown(title) for title in layout.head]
    written = aligned(head, [[text(cell) for cell in line] for line in lines])
    numbered = [f"<sup>{number}</sup> {_escape_markdown(note)}" for number, note in enumerate(notes, 1)]
    title = f"{layout.title} (Table {layout.name} of the paper)"
    return "\n\n".join([title, "\n".join(written), *numbered, *map(_escape_markdown, below)]) + "\n"


def _latex(layout: Table, lines: Sequence[Sequence[_Cell]], notes: Sequence[str], below: Sequence[str]) -> str:
    def text(cell: _Cell) -> str:
        inner = _escape_latex(cell.text)
        mark = rf"\textsuperscript{{{cell.note}}}" if cell.note else ""
        return (rf"\textbf{{{inner}}}" if cell.own else inner) + mark

    body = [[_escape_latex(title) for title in layout.head], *([text(cell) for cell in line] for line in lines)]
    widths = [max(len(row[index]) for row in body) for index in range(len(layout.head))]
    # The source's columns stand under each other too.
    written = [" & ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + r" \\" for row in body]
    numbered = [rf"\textsuperscript{{{number}}} {_escape_latex(note)}" for number, note in enumerate(notes, 1)]
    return "\n".join(
        [
            rf"% {layout.title} (Table {layout.name} of the paper); needs \usepackage{{booktabs}}",
            rf"\begin{{tabular}}{{l{'r' * (len(layout.head) - 1)}}}",
            r"\toprule",
            written[0],
            r"\midrule",
            *written[1:],
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par{{\footnotesize {note}\par}}" for note in [*numbered, *map(_escape_latex, below)]),
            "",
        ]
    )


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", text)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


# The published numbers


@cache
def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return data


def _published() -> dict[str, Any]:
    return _read(PUBLISHED)


def _row(entry: Mapping[str, Any], columns: Sequence[str], means: Mapping[str, Sequence[str]]) -> PublishedRow:
    values = {column: value for column, value in zip(columns, entry["values"], strict=True) if value is not None}
    tokens_b = entry.get("tokens_b")
    return PublishedRow(
        name=entry["model"],
        size=entry["size_b"] * 1e9,
        tokens=None if tokens_b is None else tokens_b * 1e9,
        values=values,
        variant=entry.get("variant", ""),
        printed=dict(zip(means, entry["printed"], strict=True)),
        averages=averages(values, means),
    )


def _agree(printed: float, recomputed: float | None) -> bool:
    # The smallest margin beyond the tolerance is for the binary fractions, which are not the decimal ones.
    return recomputed is not None and abs(printed - recomputed) <= TOLERANCE + 1e-9
