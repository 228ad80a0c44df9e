"""What a benchmark finds: rows with every repetition, the roof of the same run, and on what it was measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openelm.environment import environment
from openelm.errors import UserError
from openelm.files import whole_file

FORMAT = 1
BUSY = 0.10  # a spread above this is that of a machine that does something else too
RESULT_FILE, TABLE_FILE, CHART_FILE = "result.json", "table.md", "chart.png"


@dataclass(frozen=True)
class Summary:
    """Repetitions in short. ``spread`` is (most - least) / median; ``quarters`` the middle half's ends."""

    median: float
    least: float
    most: float
    quarters: tuple[float, float]
    count: int

    @property
    def spread(self) -> float:
        """0 where all are equal, or there is one only."""
        return (self.most - self.least) / self.median if self.median else 0.0


def summary(values: Sequence[float]) -> Summary:
    """Of at least one value."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], (values[0], values[0]), 1)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(statistics.median(values), min(values), max(values), (low, high), len(values))


@dataclass
class Row:
    """One thing measured in one case: what it is, its metrics with every repetition, or why there are none."""

    name: str
    case: str = ""  # what was done with it: "35+1024"
    about: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    problem: str = ""

    def summary(self, metric: str) -> Summary | None:
        """Of a metric that has values."""
        values = self.metrics.get(metric)
        return summary(values) if values else None

    def speeds(self) -> dict[str, Summary]:
        """Of the metrics that are rates: the higher the better."""
        return {name: summary(values) for name, values in self.metrics.items() if name.endswith("_per_s") and values}

    @property
    def busy(self) -> bool:
        """Whether some rate is spread too wide to be quoted."""
        return any(found.spread > BUSY for found in self.speeds().values())


@dataclass
class Result:
    """A benchmark: ``kind`` is the command's, ``roof`` what was measured between the rows."""

    kind: str
    command: str
    settings: dict[str, Any]
    rows: list[Row]
    roof: dict[str, Any] = field(default_factory=dict)  # lists of bytes_per_s and flops_per_s, and how
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=environment)
    finished: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: int = FORMAT

    def best_roof(self, name: str) -> float | None:
        """The highest of the run; None where it was not measured."""
        return max(self.roof.get(name) or [0.0]) or None

    def as_json(self) -> dict[str, Any]:
        """All of it, each metric with its summary beside its repetitions."""
        data = asdict(self)
        for row, plain in zip(self.rows, data["rows"], strict=True):
            plain["summary"] = {
                name: {**asdict(found), "spread": found.spread}
                for name in row.metrics
                if (found := row.summary(name)) is not None
            }
            plain["busy"] = row.busy
        return data


def busy_note(rows: Sequence[Row]) -> str:
    """What to say of rows that are spread too wide; "" where none is."""
    busy = [f"{row.name} {row.case}".strip() for row in rows if row.busy]
    if not busy:
        return ""
    names = "all rows" if len(busy) == len(rows) > 1 else ", ".join(busy)
    return (
        f"busy machine: the repetitions of {names} lie more than {BUSY:.0%} of their median apart; end what else runs "
        "here, and measure again"
    )


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_result(path: Path) -> Result:
    """A result.json, or the folder that holds it. UserError for anything else."""
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give what `openelm bench … --out` wrote") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): give what `openelm bench … --out` wrote") from error
    try:
        if data["format"] != FORMAT:
            raise UserError(f"{file} is of format {data['format']!r}, and this reads {FORMAT}: measure it again")
        rows = [Row(**{key: row[key] for key in Row.__dataclass_fields__}) for row in data.pop("rows")]
        found = Result(rows=rows, **data)
        for row in rows:
            row.speeds()
        found.best_roof("bytes_per_s")
        return found
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, statistics.StatisticsError) as error:
        raise UserError(f"{file} is no result of openelm bench ({type(error).__name__}: {error})") from error
