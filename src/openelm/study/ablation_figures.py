"""The runs of an ablation in figures: intervals over seeds, differences seed by seed, tokens to reach a loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openelm.report.run_files import number

# Of Student's t, two-sided, 95 %, by degrees of freedom from 1: NIST/SEMATECH e-Handbook of Statistical Methods,
# 1.3.6.7.2. For more, the last of them is a little wide.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
BETTER, WORSE, SAME, ONE_SEED = "better", "worse", "not told apart", "one seed"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half of its 95 % interval, by Student's t; None of a lone value."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """None without values."""
        if not values:
            return None
        count, half = len(values), None
        if count > 1:
            half = T_95[min(count - 1, len(T_95)) - 1] * statistics.stdev(values) / math.sqrt(count)
        return cls(math.fsum(values) / count, half, count)

    @property
    def verdict(self) -> str:
        """Of a difference in bits per byte, of which less is better."""
        if self.half is None:
            return ONE_SEED
        if abs(self.mean) <= self.half:
            return SAME
        return BETTER if self.mean < 0 else WORSE

    def ends(self, sign: str = "") -> str:
        """The interval in words."""
        half = self.half or 0.0
        return f"{self.mean - half:{sign}.4f} to {self.mean + half:{sign}.4f}"


@dataclass(frozen=True)
class Reach:
    """Where a kind first is as good as the reference ends, as shares of the reference's tokens, seed by seed."""

    shares: tuple[float, ...]
    missed: int  # seeds where it never is

    def __str__(self) -> str:
        if not self.shares:
            return f"not reached ({self.missed})"
        text = f"{statistics.fmean(self.shares):.1%}"
        if len(self.shares) > 1:
            text += f" ({min(self.shares):.1%} to {max(self.shares):.1%})"
        return text + (f", not reached: {self.missed} of {self.missed + len(self.shares)}" if self.missed else "")


@dataclass(frozen=True)
class Figures:
    """What is known of a kind at a size. ``difference`` is paired by seed, to the kind ``against``."""

    bits_per_byte: Interval | None
    against: str
    difference: Interval | None
    reach: Reach | None


def figures(results: Record) -> dict[str, dict[str, Figures]]:
    """By size and kind. A kind whose entry says ``like`` is compared with that one instead of the reference."""
    return {
        size: {kind: _figures(kind, kinds, results["reference"]) for kind in kinds}
        for size, kinds in by_size(results).items()
    }


def _figures(kind: str, kinds: Mapping[str, Record], reference: str) -> Figures:
    against = kinds[kind].get("like") or reference
    own, other = _values(kinds[kind]), _values(kinds.get(against, {}))
    pairs = [own[seed] - other[seed] for seed in own if seed in other] if kind != against else []
    reach = None
    if kind != reference and not kinds[kind].get("data"):
        reach = _reach(done(kinds[kind]), done(kinds.get(reference, {})))
    return Figures(Interval.of(list(own.values())), against, Interval.of(pairs), reach)


def by_size(results: Record) -> dict[str, dict[str, Record]]:
    """The kinds of each size, as results.json has them."""
    return {size: entry.get("kinds") or {} for size, entry in results["sizes"].items()}


def done(entry: Record) -> dict[int, Record]:
    """Runs by seed that came to their end."""
    runs = entry.get("runs") or []
    return {run["seed"]: run for run in runs if number(run.get("bits_per_byte")) is not None}


def _values(entry: Record) -> dict[int, float]:
    return {seed: run["bits_per_byte"] for seed, run in done(entry).items()}


def _reach(own: Mapping[int, Record], reference: Mapping[int, Record]) -> Reach | None:
    """Seeds that both have; None where no curves are known."""
    shares, missed = [], 0
    for seed in own.keys() & reference.keys():
        curve, other = curve_of(own[seed]), curve_of(reference[seed])
        if not curve or not other:
            continue
        tokens, level = other[-1]
        found = _first_at(curve, level)
        if found is None:
            missed += 1
        else:
            shares.append(found / tokens)
    return Reach(tuple(shares), missed) if shares or missed else None


def curve_of(run: Record) -> list[tuple[float, float]]:
    """(tokens, bits per byte) of the validations, in order."""
    points = [tuple(point) for point in run.get("curve") or []]
    return sorted((tokens, value) for tokens, value in points if number(value) is not None)


def _first_at(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """Tokens where a curve is first at ``level`` or below, straight between its points."""
    before = None
    for tokens, value in curve:
        if value <= level:
            if before is None:
                return tokens
            share = (before[1] - level) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = tokens, value
    return None
