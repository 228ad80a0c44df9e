"""Accuracy along a run: the paper's Fig. 1, and the evaluation's section of a run's report page."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from openelm.evaluate import suites
from openelm.evaluate.results import Evaluation, TaskResult
from openelm.evaluate.suites import Spec
from openelm.evaluate.tables import measured
from openelm.report import plots
from openelm.report.plots import Theme, short_number

AVERAGE = "Average"
# The suites that have a picture of their own, each with the title that the report gives it.
PICTURES = {
    "zero-shot": "Zero-shot tasks",
    "openllm": "OpenLLM leaderboard tasks",
    "llm360": "LLM360 tasks",
    "commonsense": "Commonsense reasoning",
}
# Accuracy in percent of who guesses, where the number of choices is the same for all questions, or nearly so.
CHANCE = {
    **dict.fromkeys(("arc_challenge", "arc_easy", "hellaswag", "sciq", "mmlu", "race"), 25.0),
    **dict.fromkeys(("boolq", "piqa", "winogrande"), 50.0),
    # In the forms of LLM-Adapters:
    **{f"commonsense_{task}": 25.0 for task in ("arc_challenge", "arc_easy", "hellaswag", "openbookqa")},
    **{f"commonsense_{task}": 50.0 for task in ("boolq", "piqa", "winogrande")},
    "commonsense_social_i_qa": 100 / 3,
}
OTHERS = "others"
# Metrics between 0 and 1 that a task of no suite is shown by, the first that it has.
SHARES = ("acc_norm", "acc", "pct_stereotype", "exact_match", "f1")
SINGLE, PANEL = (5.4, 3.1), (2.75, 2.15)  # inches
FEW = 24  # points, of which each is marked
FLAT = 2.0  # percentage points: less is noise in most tasks, and is not to look like a climb


def draw_accuracies(
    series: Mapping[str, Sequence[tuple[int, float]]],
    averaged: Mapping[str, float],
    theme: Theme,
    *,
    chance: Mapping[str, float] | None = None,
    x_label: str = "steps",
    with_average: bool = True,
) -> bytes:
    """Draw one panel a task and one of their average: PNG. Arguments as those of ``accuracy_figure``."""
    figure = accuracy_figure(series, averaged, theme, chance=chance or {}, x_label=x_label, with_average=with_average)
    buffer = io.BytesIO()
    # No software name in the file, so that the same run gives the same bytes.
    figure.savefig(buffer, format="png", facecolor=theme.card, metadata={"Software": None})
    return buffer.getvalue()


def accuracy_figure(
    series: Mapping[str, Sequence[tuple[int, float]]],
    averaged: Mapping[str, float],
    theme: Theme,
    *,
    chance: Mapping[str, float],
    x_label: str = "steps",
    with_average: bool = True,
) -> Any:
    """The figure of small panels. Values are percentages; ``series`` has (step, value) by title, one or more in order.

    ``averaged`` is the averaged checkpoint, a marker at the run's end; ``chance`` a thin line. Both by the same titles.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = {title: list(points) for title, points in series.items() if points}
    assert panels, "there is nothing to draw"
    ends, chance = dict(averaged), dict(chance)
    if with_average and len(series) > 1 and (means := mean_of(series)):
        panels[AVERAGE] = means
        for values in (ends, chance):
            if series.keys() <= values.keys():
                values[AVERAGE] = sum(values[title] for title in series) / len(series)
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    size = SINGLE if len(panels) == 1 else (PANEL[0] * columns, PANEL[1] * rows + 0.3)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, hspace=0.06)
    figure = Figure(figsize=size, dpi=plots.DOTS_PER_INCH, facecolor=theme.card, layout=layout)
    FigureCanvasAgg(figure)
    last = max(step for points in panels.values() for step, _ in points)
    guessing = False
    for number, (title, points) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, number, facecolor=theme.card)
        end = ends.get(title)
        _dress(axes, theme, title, points[-1][1] if end is None else end)
        guessing |= _draw(axes, theme, points, None if end is None else (last, end), chance.get(title))
        # One scale of steps for all; the margin is the marker's.
        axes.set_xlim(0, 1.04 * max(last, 1))
    _legend(figure, theme, bool(ends.keys() & panels.keys()), guessing)
    figure.supxlabel(x_label, color=theme.muted, fontsize=8.5)
    return figure


def mean_of(series: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over all tasks at the steps where every one of them was measured."""
    values = [dict(points) for points in series.values()]
    steps = set.intersection(*(set(points) for points in values)) if values else set()
    return [(step, sum(points[step] for points in values) / len(values)) for step in sorted(steps)]


def _columns(panels: int) -> int:
    """As many as make the rows alike, at most four: the seven tasks of Fig. 1 and their average are two rows."""
    rows = math.ceil(panels / 4)
    return math.ceil(panels / rows)


def _dress(axes: Any, theme: Theme, title: str, value: float) -> None:
    """Title at the left, the last value at the right, quiet grid, no box: as the other pictures of a report."""
    short = title if len(title) <= 26 else title[:25].rstrip(", ") + "…"
    axes.set_title(short, loc="left", fontsize=9, fontweight="bold", color=theme.ink)
    axes.set_title(f"{value:.1f}", loc="right", fontsize=9, color=theme.muted)
    axes.grid(axis="y", color=theme.line, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.line)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0, pad=4)
    axes.xaxis.get_major_locator().set_params(nbins=4, integer=True)
    axes.yaxis.get_major_locator().set_params(nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw(
    axes: Any, theme: Theme, points: Sequence[tuple[int, float]], end: tuple[int, float] | None, chance: float | None
) -> bool:
    """The curve, the marker at its end and the line of chance; whether that line is there."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "o" if len(points) <= FEW else ""
    axes.plot(steps, values, color=theme.accent, linewidth=1.6, marker=marker, markersize=2.8)
    if end is not None:
        axes.plot(*end, "o", color=theme.second, markersize=6, markeredgecolor=theme.card, zorder=3)
        values = [*values, end[1]]
    low, high = min(values), max(values)
    # Far below all that was measured, the line would only flatten the curve.
    drawn = chance is not None and low - (reach := max(high - low, FLAT)) <= chance <= high + reach
    if chance is not None and drawn:
        axes.axhline(chance, color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)))
        low, high = min(low, chance), max(high, chance)
    middle, half = (low + high) / 2, max(high - low, FLAT) / 2
    axes.set_ylim(middle - 1.24 * half, middle + 1.24 * half)
    return drawn


def _legend(figure: Any, theme: Theme, averaged: bool, chance: bool) -> None:
    """What line and marker are, once for all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=theme.accent, linewidth=1.6, label="checkpoints, accuracy in %")]
    if averaged:
        mark = Line2D([], [], color=theme.second, marker="o", markersize=6, linestyle="", label="averaged checkpoint")
        handles.append(mark)
    if chance:
        handles.append(Line2D([], [], color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)), label="chance"))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        fontsize=8.5,
        frameon=False,
        labelcolor=theme.muted,
        handlelength=1.4,
        borderaxespad=0,
    )


# From results to curves


def section(evaluations: Sequence[Evaluation], folder: Path) -> str:
    """The part of a report page on what was measured along a run, as HTML; empty where that is nothing.

    Each suite that was measured whole has a picture, all other tasks one together, which are kept in ``folder``; a
    table has the figures of the averaged checkpoint, or of the last.
    """
    pictures, rows = [], []
    final = max(evaluations, key=_lateness, default=Evaluation({}))
    for name, title, specs in _groups(evaluations):
        series, averaged = along(evaluations, specs)
        if any(len(points) > 1 for points in series.values()):
            pictures.append(_picture(folder, name, title, specs, series, averaged))
        rows += [_cells(title, spec, result) for spec in specs if (result := measured(final, spec))]
    if not pictures and not rows:
        return ""
    which = "the averaged checkpoint" if final.model.get("averaged") else "the last model measured"
    step = final.model.get("step")
    note = f"The table is of {which}{f', step {step:,}' if isinstance(step, int) else ''}. In percent."
    head = ["suite", "task", "shots", "metric", "value", "standard error", "examples"]
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) + "</tr>"
        for tag, row in [("th", head), *(("td", row) for row in rows)]
    ]
    table = '<div class="card"><div class="scroll"><table class="counts">' + "\n".join(lines) + "</table></div></div>"
    drawn = f'<div class="plots wide">{"".join(pictures)}</div>\n' if pictures else ""
    return f"<section>\n<h2>Evaluation</h2>\n<p>{note}</p>\n{drawn}{table if rows else ''}\n</section>"


def along(
    evaluations: Sequence[Evaluation], specs: Sequence[Spec]
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, float]]:
    """What ``draw_accuracies`` wants of a run: percentages by title at each step, and the averaged checkpoint's.

    The model of an evaluation has the step of its checkpoint as "step"; the averaged one has "averaged": true.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    averaged: dict[str, float] = {}
    for spec in specs:
        points: dict[int, float] = {}
        for evaluation in evaluations:
            if (result := measured(evaluation, spec)) is None:
                continue
            value, step = 100 * result.metrics[spec.metric], evaluation.model.get("step")
            if evaluation.model.get("averaged"):
                averaged[spec.title] = value
            elif isinstance(step, int):
                points[step] = value
        if points:
            series[spec.title] = sorted(points.items())
    return series, averaged


def _groups(evaluations: Sequence[Evaluation]) -> list[tuple[str, str, list[Spec]]]:
    """Name, title and tasks of each picture: the suites measured whole, and what belongs to none of these."""
    results = {(r.task, r.shots): r for evaluation in evaluations for r in evaluation.tasks.values()}
    groups = [
        (name, title, list(suites.suite(name)))
        for name, title in PICTURES.items()
        if all((spec.task, spec.shots) in results for spec in suites.suite(name))
    ]
    shown = {(spec.task, spec.shots) for _, _, specs in groups for spec in specs}
    others = [spec for key, result in results.items() if key not in shown and (spec := _spec(result))]
    return [*groups, (OTHERS, "Other tasks", others)] if others else groups


def _spec(result: TaskResult) -> Spec | None:
    """How a task that stands alone is shown; None where none of its metrics is a share."""
    known = suites.known(result.task)
    metric = known.metric if known else next((name for name in SHARES if name in result.metrics), "")
    title = (known.title if known else result.task) + (f", {result.shots} shots" if result.shots else "")
    return Spec(result.task, metric, result.shots, title) if metric else None


def _lateness(evaluation: Evaluation) -> tuple[bool, int]:
    return bool(evaluation.model.get("averaged")), evaluation.model.get("step") or 0


def _picture(
    folder: Path,
    name: str,
    title: str,
    specs: Sequence[Spec],
    series: Mapping[str, Sequence[tuple[int, float]]],
    averaged: Mapping[str, float],
) -> str:
    chance = {spec.title: CHANCE[spec.task] for spec in specs if spec.task in CHANCE}
    draw = partial(draw_accuracies, series, averaged, chance=chance, with_average=name != OTHERS)
    ends = {task: averaged.get(task, points[-1][1]) for task, points in series.items()}
    alt = f"{title}: " + ", ".join(f"{task} {value:.2f}" for task, value in ends.items()) + "."
    return plots.embed(folder, f"accuracy-{name}", draw, alt, f"{title}, accuracy in percent along the run.")


def _cells(group: str, spec: Spec, result: TaskResult) -> list[str]:
    error = result.metrics.get(f"{spec.metric}_stderr", math.nan)
    examples = f"{result.examples:,}" + ("" if result.limit is None else " (the first)")
    values = [f"{100 * result.metrics[spec.metric]:.2f}", f"{100 * error:.2f}" if math.isfinite(error) else "-"]
    return [group, spec.title, str(spec.shots), spec.metric, *values, examples]
