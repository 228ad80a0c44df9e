"""The suites of the paper: which tasks, at how many shots, by which metric; suites.yaml is the table itself."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

import yaml

from openelm.errors import UserError

ALL = "all"

# lm-eval weights the subjects of MMLU by their questions; the Open LLM Leaderboard took the mean of the 57 accuracies.
EQUAL_WEIGHT = frozenset({"mmlu"})


@dataclass(frozen=True)
class Spec:
    """One column of a table: a task, the metric that is printed, and the examples that precede each question."""

    task: str  # lm-eval's name, or one of ours
    metric: str  # as lm-eval calls it: "acc", "acc_norm", "pct_stereotype"
    shots: int
    title: str  # in the paper's tables


def names() -> tuple[str, ...]:
    """The suites, in the paper's order, and the one of all."""
    return (*_table(), ALL)


def suite(name: str) -> tuple[Spec, ...]:
    """The tasks of a suite, in the order of its table; UserError for an unknown one.

    ``all`` has each task at each number of shots once, though suites share some.
    """
    if name != ALL:
        return _specs(_entry(name))
    unique = {
        (spec.task, spec.shots): spec for other in reversed(_table().values()) for spec in reversed(_specs(other))
    }
    return tuple(reversed(unique.values()))


def averages(name: str) -> dict[str, tuple[str, ...]]:
    """The averages that a suite's table prints, each with the titles of the columns that it is the mean of."""
    if name == ALL:
        return {}
    entry = _entry(name)
    titles = [spec.title for spec in _specs(entry)]
    return {average: tuple(t for t in titles if t not in without) for average, without in entry["averages"].items()}


def known(task: str) -> Spec | None:
    """The first column of all suites that shows this task."""
    return next((spec for spec in suite(ALL) if spec.task == task), None)


@cache
def _table() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load(resources.files(__package__).joinpath("suites.yaml").read_text(encoding="utf-8")))


def _entry(name: str) -> dict[str, Any]:
    if name not in _table():
        near = get_close_matches(name, names(), n=2, cutoff=0.4) or names()
        raise UserError(
            f"there is no suite {name!r}: did you mean {' or '.join(near)}? The suites: {', '.join(names())}"
        )
    return _table()[name]


def _specs(entry: dict[str, Any]) -> tuple[Spec, ...]:
    return tuple(Spec(task, metric, shots, title) for title, task, shots, metric in entry["tasks"])
