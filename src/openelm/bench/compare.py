"""Two results of the same benchmark: what changed beyond the noise."""

from __future__ import annotations

from typing import Any

from openelm.bench.results import BUSY, Result, Row, Summary
from openelm.bench.tables import rate
from openelm.errors import UserError
from openelm.report.markdown import aligned

SAME, HIGHER, LOWER = "within the noise", "faster", "slower"


def compare(before: Result, after: Result) -> list[str]:
    """Lines of Markdown. Two rates differ where their repetitions' ranges do not meet. UserError: nothing in common."""
    if before.kind != after.kind:
        raise UserError(
            f"one is a result of bench {before.kind}, the other of bench {after.kind}: compare two of the same kind"
        )
    first = {(row.name, row.case): row for row in before.rows}
    second = {(row.name, row.case): row for row in after.rows}
    common = [key for key in first if key in second]
    if not common:
        raise UserError(
            f"no row is in both: one has {_names(before.rows)}, the other {_names(after.rows)}; measure the same again"
        )
    table = [line for key in common for line in _lines(first[key], second[key])]
    lines = aligned(["What", "Rate", "Before", "After", "Ratio", "Change"], table) if table else []
    lines += [f"\n{why}" for key in common if (why := _failure(first[key], second[key]))]
    for what, rows in (
        ("before", [k for k in first if k not in second]),
        ("after", [k for k in second if k not in first]),
    ):
        lines += [f"\nOnly {what}: {', '.join(' '.join(key).strip() for key in rows)}"] if rows else []
    lines += [f"\n{line}" for line in differences(before, after)]
    return lines


def verdict(before: Summary, after: Summary) -> str:
    """One of SAME, HIGHER, LOWER; lone values have no range, and are told from noise by nothing."""
    if before.count < 2 or after.count < 2:
        return "one repetition: unknown"
    if after.least > before.most:
        return HIGHER
    return LOWER if after.most < before.least else SAME


def _lines(before: Row, after: Row) -> list[list[str]]:
    name = f"{before.name} {before.case}".strip()
    if before.problem or after.problem:
        return []
    lines = []
    rates = after.speeds()
    for metric, was in before.speeds().items():
        if metric in rates:
            now = rates[metric]
            ratio = f"{now.median / was.median:.3f}" if was.median else ""
            lines.append([name, metric.replace("_", " "), rate(was), rate(now), ratio, verdict(was, now)])
    return lines


def _failure(before: Row, after: Row) -> str:
    """Of a row that was not measured in both; "" for others."""
    which = "before" if before.problem else "after"
    problem = before.problem or after.problem
    return f"{before.name} {before.case}".strip() + f" failed {which}: {problem}" if problem else ""


def as_plain(before: Result, after: Result) -> list[dict[str, Any]]:
    """The same as data: an object for each rate that both have."""
    second = {(row.name, row.case): row.speeds() for row in after.rows if not row.problem}
    return [
        {"name": row.name, "case": row.case, "rate": metric, "before": was.median, "after": now.median}
        | {"ratio": now.median / was.median, "change": verdict(was, now)}
        for row in before.rows
        if not row.problem
        for metric, was in row.speeds().items()
        if (now := second.get((row.name, row.case), {}).get(metric)) is not None and was.median
    ]


def differences(before: Result, after: Result) -> list[str]:
    """What else is different: hardware, versions, threads, the roof. Ratios of rates alone then say little."""
    found = []
    pairs = [("CPU", *(result.environment["hardware"]["cpu"] for result in (before, after)))]
    pairs += [("Python", *(result.environment["python"] for result in (before, after)))]
    pairs += [
        (name, *(result.environment["packages"].get(name) for result in (before, after))) for name in ("torch", "numpy")
    ]
    pairs += [(key, before.settings.get(key), after.settings.get(key)) for key in ("threads", "device", "dtype")]
    found += [f"{name} differs: {was}, then {now}." for name, was, now in pairs if was != now]
    for name, unit in (("bytes_per_s", "GB/s read"), ("flops_per_s", "GFLOP/s")):
        was, now = before.best_roof(name), after.best_roof(name)
        if was and now:
            drift = " The machine itself has changed: so may rates." if abs(now / was - 1) > BUSY else ""
            found.append(f"Roof: {was / 1e9:,.1f} {unit}, then {now / 1e9:,.1f} ({now / was:.3f}).{drift}")
    return found


def _names(rows: list[Row]) -> str:
    return ", ".join(f"{row.name} {row.case}".strip() for row in rows) or "none"
