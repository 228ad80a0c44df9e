"""What came of the points of a sweep: read from their run folders, put in order, shown as a table."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from openelm.errors import UserError
from openelm.evaluate import suites, tasks
from openelm.evaluate.results import Evaluation, How
from openelm.evaluate.suites import Spec
from openelm.report.markdown import aligned
from openelm.report.run_files import number, read_run

LESS_IS_BETTER = ("perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Aim:
    """What a sweep chooses by: the mean of its columns, each a task's metric, measured in one way."""

    columns: Mapping[str, Spec]  # by their titles
    how: How

    @classmethod
    def of(cls, suite: str | None, names: str | None, how: How) -> Aim:
        """Of a suite, or of lm-eval's tasks instead; UserError where their mean would say nothing."""
        if bool(suite) == bool(names):
            raise UserError(f"choose what to measure: --suite ({', '.join(suites.names())}) or --tasks, one of the two")
        if suite:
            if not suites.averages(suite):
                fit = ", ".join(name for name in suites.names() if suites.averages(name))
                raise UserError(f"--suite {suite} has no average to choose the best by: use one of {fit}, or --tasks")
            return cls({spec.title: spec for spec in suites.suite(suite)}, how)
        specs = tasks.parse(names or "")
        if wrong := [spec for spec in specs if any(word in spec.metric for word in LESS_IS_BETTER)]:
            raise UserError(
                f"--tasks {wrong[0].task} is measured by {wrong[0].metric}, of which less is better: the best point is "
                "the one with the highest average, so leave it out"
            )
        return cls({f"{spec.task}@{spec.shots}" if spec.shots else spec.task: spec for spec in specs}, how)

    def as_plain(self) -> dict[str, Any]:
        """What distinguishes it from another."""
        return {"tasks": [f"{s.task}@{s.shots} {s.metric}" for s in self.columns.values()], **asdict(self.how)}


@dataclass(frozen=True)
class Point:
    """One place in the grid. ``training`` is the command that trains it, without its run folder."""

    name: str
    run: Path
    values: Mapping[str, Any]
    training: tuple[str, ...]

    @property
    def log(self) -> Path:
        """What its training and its evaluation have said."""
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def evaluations(self) -> Path:
        """Where its results are kept."""
        return self.run / "evaluation"


class Score(NamedTuple):
    """A share between 0 and 1, and its standard error where one is known."""

    value: float
    error: float | None = None

    def __str__(self) -> str:
        return f"{100 * self.value:.2f}" + ("" if self.error is None else f" ± {100 * self.error:.2f}")


@dataclass(frozen=True)
class Outcome:
    """What is known of a point. A run that has not come to its end has no summary."""

    point: Point
    summary: Mapping[str, Any] = field(default_factory=dict)
    loss: float | None = None  # of the last step that was recorded
    scores: Mapping[str, Score] = field(default_factory=dict)  # by column
    average: Score | None = None  # once all columns are measured
    failure: str = ""

    @property
    def figures(self) -> dict[str, float]:
        """What the summary says of held-out data, by titles: bits per byte of text, or the final model on examples."""
        found = {f"bits_per_byte ({name})": value for name, value in _group(self.summary, "bits_per_byte").items()}
        scores = _group(self.summary, "held_out")
        final = "averaged" if "averaged" in scores else "last"
        found |= {f"held-out {name} ({final})": _group(scores, final).get(name) for name in ("loss", "accuracy")}
        return {title: known for title, value in found.items() if (known := number(value)) is not None}


def _group(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def read(point: Point, aim: Aim) -> Outcome:
    """What a point's run folder says; UserError for results that cannot be read."""
    if not (point.run / "summary.json").is_file():
        return Outcome(point)
    files = read_run(point.run)
    steps = files.of_kind("train")
    scores = dict(_scores(point, aim))
    average = None
    if len(scores) == len(aim.columns):
        errors = [score.error for score in scores.values()]
        known = [error for error in errors if error is not None]
        mean = math.fsum(score.value for score in scores.values()) / len(scores)
        # The tasks' questions are others, so their errors are independent.
        average = Score(mean, math.hypot(*known) / len(known) if len(known) == len(errors) else None)
    return Outcome(point, files.summary, number(steps[-1].get("loss")) if steps else None, scores, average)


def _scores(point: Point, aim: Aim) -> Iterator[tuple[str, Score]]:
    """What was measured of a point's model, from the newest file and those of the same weights."""
    newest_first = sorted(point.evaluations.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    found = [Evaluation.load(file) for file in newest_first]
    found = [one for one in found if (one.model.get("dtype"), one.model.get("engine")) == ("stored", "openelm")]
    found = [one for one in found if one.model.get("digest") == found[0].model.get("digest")]
    for title, spec in aim.columns.items():
        results = [result for one in found if (result := one.find(spec.task, spec.shots, aim.how))]
        value = results[0].metrics.get(spec.metric, math.nan) if results else math.nan
        if math.isfinite(value):
            yield title, Score(value, number(results[0].metrics.get(f"{spec.metric}_stderr")))


class Ranking:
    """Outcomes in order: the highest average first, the earlier point where two are equal, then what has none."""

    def __init__(self, outcomes: Sequence[Outcome], aim: Aim) -> None:
        self.aim = aim
        self.rows = sorted(outcomes, key=lambda one: -one.average.value if one.average else math.inf)
        self.measured = [row for row in self.rows if row.average]

    @property
    def best(self) -> Outcome | None:
        """The first in order, once any is measured."""
        return self.measured[0] if self.measured else None

    def as_good(self) -> list[Outcome]:
        """The others that are no further from the best than its standard error (equal ones, where it has none)."""
        if self.best is None or self.best.average is None:
            return []
        least = self.best.average.value - (self.best.average.error or 0.0)
        return [row for row in self.measured[1:] if row.average and row.average.value >= least]

    def as_plain(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "best": self.best.point.name if self.best else None,
            "within_one_standard_error": [row.point.name for row in self.as_good()],
            "again": again(self.best.point) if self.best else None,
            "measured": self.aim.as_plain(),
            "points": [
                {
                    "name": row.point.name,
                    "values": dict(row.point.values),
                    "run": str(row.point.run),
                    "average": row.average._asdict() if row.average else None,
                    "tasks": {title: score._asdict() for title, score in row.scores.items()},
                    "loss": row.loss,
                    "summary": dict(row.summary),
                    "failure": row.failure,
                }
                for row in self.rows
            ],
        }

    def table(self) -> str:
        """The points as a Markdown table, and below it what must be known of their order."""
        figures = [title for title in self._figure_titles() if self._tells(title)]
        keys = list(dict.fromkeys(key for row in self.rows for key in row.point.values))
        head = ["", *keys, "loss", *figures, *self.aim.columns, "average"]
        body = []
        for place, row in enumerate(self.rows, 1):
            values = [_value(row.point.values[key]) for key in keys]
            held_out = [_figure(row.figures.get(title)) for title in figures]
            tasks_ = [str(row.scores.get(title, "-")) for title in self.aim.columns]
            cells = [*values, _figure(row.loss), *held_out, *tasks_, str(row.average or "-")]
            if row is self.best:
                cells = [f"**{cell}**" for cell in cells]
            body.append([str(place) if row.average else "-", *cells])
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in [head, *body]]
        lines = aligned(escaped[0], escaped[1:], left=0)
        return "\n\n".join(["\n".join(lines), *self._notes()]) + "\n"

    def _figure_titles(self) -> list[str]:
        return list(dict.fromkeys(title for row in self.rows for title in row.figures))

    def _tells(self, title: str) -> bool:
        """Whether a figure differs between points: what compressors make of the held-out text, say, does not."""
        trained = [row for row in self.rows if row.summary]
        return len(trained) == 1 or len({row.figures.get(title) for row in trained}) > 1

    def _notes(self) -> list[str]:
        notes = []
        if self.aim.how.limit is not None:
            notes.append(f"Measured on the first {self.aim.how.limit:,} examples of each task.")
        if self.best:
            point = self.best.point
            notes.append(f"Best: {point.name}, average {self.best.average}; model: {point.run / 'model'}")
        if close := self.as_good():
            error = self.best.average.error if self.best and self.best.average else None
            near = "equal to it" if error is None else f"within one standard error of it ({100 * error:.2f})"
            one = "Another is" if len(close) == 1 else f"{len(close)} others are"
            names = "; ".join(row.point.name for row in close)
            notes.append(f"{one} {near}, so that the choice among them may be chance: {names}.")
        if self.best:
            notes.append(f"The best again: `{again(self.best.point)}`")
        notes += [f"Failed: {row.point.name}: {row.failure.splitlines()[-1]}" for row in self.rows if row.failure]
        if left := sum(not (row.average or row.failure) for row in self.rows):
            notes.append(f"{left} of {len(self.rows)} points are not done.")
        return notes


def again(point: Point) -> str:
    """The command that repeats a point, in a run folder of its own."""
    return shlex.join(["openelm", *point.training])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
