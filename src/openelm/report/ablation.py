"""The pictures of an ablation: held-out curves, differences to the reference, the layers of each kind.

All is handed in as plain numbers; what they mean is decided in study/ablation_report.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openelm.report.plots import Theme, as_png, blank, panel, short_number

# Of the kinds besides the reference: apart from each other in hue and in lightness.
COLOURS = ("#1f6a8c", "#b5562a", "#5b8f3f", "#7d5aa6", "#c2912c", "#3fa0a0", "#b0456f", "#8a6a4f", "#5f7fd0")
CURVES, DIFFERENCES, LAYERS = (6.6, 3.6), (3.2, 0.3), (6.6, 1.25)  # inches: whole; of a panel and a row; of a row
EARLY = 1 / 3  # of a run: where all kinds fall steeply, and nothing can be told apart
LABEL = 0.066  # of the height of the curves: what the name of one takes


@dataclass(frozen=True)
class Band:
    """Held-out bits per byte of a kind along its runs: the mean over seeds, the least and the most."""

    label: str
    colour: str
    tokens: Sequence[float]
    means: Sequence[float]
    least: Sequence[float]
    most: Sequence[float]


@dataclass(frozen=True)
class Dot:
    """A difference to the reference; ``half`` is half of its interval, None where it has none."""

    value: float
    half: float | None
    differs: bool = False  # whether the interval leaves out 0


@dataclass(frozen=True)
class Layers:
    """What is uneven in a model, a value a layer, input side first."""

    label: str
    query_heads: Sequence[int]
    kv_heads: Sequence[int] = field(default_factory=list)
    ffn_dims: Sequence[int] = field(default_factory=list)


def colours(kinds: Sequence[str], reference: str, theme: Theme) -> dict[str, str]:
    """The same colour for a kind in all pictures; the reference is grey."""
    others = [kind for kind in kinds if kind != reference]
    return {reference: theme.muted} | {kind: COLOURS[place % len(COLOURS)] for place, kind in enumerate(others)}


def draw_curves(
    title: str,
    bands: Sequence[Band],
    gaps: Sequence[Band],
    reference: str,
    flops_per_token: float | None,
    theme: Theme,
) -> bytes:
    """A line a kind with its band, named at its end, from a third of the run on; FLOPs along the top where known.

    ``gaps``, drawn below, are the differences to the reference of the same seed at the same tokens.
    """
    figure = blank((CURVES[0], CURVES[1] * (1.7 if gaps else 1.0)), theme)
    upper = panel(figure, theme, title, (2 if gaps else 1, 1, 1))
    _draw_bands(upper, bands, theme)
    if flops_per_token:
        top = upper.secondary_xaxis("top", functions=_scales(flops_per_token))
        top.set_xlabel("training FLOPs", color=theme.muted, fontsize=8.5)
        top.xaxis.set_major_formatter(lambda value, _: short_number(value))
        top.tick_params(colors=theme.muted, labelsize=8.5, length=0)
        top.spines["top"].set_visible(False)
    axes = upper
    if gaps:
        axes = panel(figure, theme, f"Difference to {reference}, bits per byte; below 0 is better", (2, 1, 2))
        axes.axhline(0, color=theme.muted, linewidth=1.1)
        _draw_bands(axes, gaps, theme, [0.0])
        axes.set_xlim(upper.get_xlim())
    axes.set_xlabel("tokens seen; line: mean over seeds, band: least to most", color=theme.muted)
    return as_png(figure, theme)


def _scales(factor: float) -> tuple[Any, Any]:
    return (lambda value: value * factor), (lambda value: value / factor)


def _draw_bands(axes: Any, bands: Sequence[Band], theme: Theme, shown: Sequence[float] = ()) -> None:
    """As high as the later two thirds are, and as the values that are to be ``shown`` too."""
    last = max(band.tokens[-1] for band in bands)
    late = list(shown)
    for band in bands:
        axes.fill_between(band.tokens, band.least, band.most, color=band.colour, alpha=0.13, linewidth=0)
        marker = "o" if len(band.tokens) == 1 else ""
        axes.plot(band.tokens, band.means, color=band.colour, linewidth=1.5, marker=marker, markersize=3.5)
        for tokens, *ends in zip(band.tokens, band.least, band.most, strict=True):
            late += ends if tokens >= EARLY * last else []
    low, high = min(late), max(late)
    room = 0.06 * (high - low) or 0.01
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(EARLY * last, 1.005 * last or 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    _name_ends(axes, bands, theme)


def _name_ends(axes: Any, bands: Sequence[Band], theme: Theme) -> None:
    """The kinds beside the ends of their lines, pushed apart where they would cover each other."""
    low, high = axes.get_ylim()
    ends = sorted((((band.means[-1] - low) / (high - low), band) for band in bands), key=lambda end: end[0])
    for (end, band), height in zip(ends, _apart([end for end, _ in ends], LABEL), strict=True):
        axes.annotate(
            band.label,
            (1.0, end),
            xycoords="axes fraction",
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=band.colour,
            arrowprops={"arrowstyle": "-", "color": band.colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2},
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in rising order moved as little as makes them ``gap`` apart, from 0 on."""
    groups: list[list[float]] = []  # each one's heights as they were; as placed they stand gap by gap
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) < _bottom(groups[-2], gap) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, gap) + gap * place for group in groups for place in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    """Where the lowest of a group stands that keeps its middle."""
    return max(0.0, statistics.fmean(group) - gap * (len(group) - 1) / 2)


def draw_differences(panels: Mapping[str, Mapping[str, Dot]], reference: str, theme: Theme) -> bytes:
    """A panel a size, a row a kind; intervals that leave out 0 are in colour, lone seeds are hollow.

    Intervals far wider than the others run out of the picture, so that they do not press all others onto the line.
    """
    rows = list(dict.fromkeys(kind for dots in panels.values() for kind in dots))
    figure = blank((1.4 + DIFFERENCES[0] * len(panels), 1.1 + DIFFERENCES[1] * len(rows)), theme)
    first = None
    for number, (size, dots) in enumerate(panels.items(), 1):
        axes = panel(figure, theme, f"{size}, against {reference}", (1, len(panels), number), share_y=first)
        first = first or axes
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=theme.line, linewidth=0.8)
        axes.axvline(0, color=theme.muted, linewidth=1.1)
        for kind, dot in dots.items():
            _draw_dot(axes, rows.index(kind), dot, theme)
        reach = _reach(list(dots.values()))
        axes.set_xlim(-reach, reach)
        axes.xaxis.get_major_locator().set_params(nbins=5)
        axes.set_xlabel("bits per byte, 95 % intervals; left is better", color=theme.muted)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=theme.ink, labelleft=number == 1)
    if first is not None:
        first.set_yticks(range(len(rows)), rows)
        first.set_ylim(len(rows) - 0.4, -0.6)
    return as_png(figure, theme)


def _draw_dot(axes: Any, row: int, dot: Dot, theme: Theme) -> None:
    shade = theme.muted if not dot.differs else theme.accent if dot.value < 0 else theme.second
    if dot.half is not None:
        axes.plot([dot.value - dot.half, dot.value + dot.half], [row, row], color=shade, linewidth=1.8)
    face = theme.card if dot.half is None else shade
    axes.plot([dot.value], [row], "o", color=shade, markersize=6, markerfacecolor=face)


def _reach(dots: Sequence[Dot]) -> float:
    """How far a panel goes to both sides."""
    halves = [dot.half for dot in dots if dot.half is not None]
    widest = 3 * statistics.median(halves) if halves else 0.0
    ends = [abs(dot.value) + min(dot.half or 0.0, widest) for dot in dots]
    return 1.12 * max(ends, default=0.0) or 0.01


def draw_layers(title: str, models: Sequence[Layers], reference: Layers | None, theme: Theme) -> bytes:
    """A row a model: heads of its layers, key/value heads in front, and FFN widths; the reference's as an outline."""
    figure = blank((LAYERS[0], 0.9 + LAYERS[1] * len(models)), theme)
    heads = widths = None  # of the row above, whose scale is shared
    for row, model in enumerate(models):
        heads = panel(figure, theme, model.label, (len(models), 2, 2 * row + 1), share_y=heads)
        widths = panel(figure, theme, "", (len(models), 2, 2 * row + 2), share_y=widths)
        outlines = (reference.query_heads, reference.ffn_dims) if reference else ((), ())
        _bars(heads, {theme.soft: model.query_heads, theme.accent: model.kv_heads}, outlines[0], theme)
        _bars(widths, {theme.accent: model.ffn_dims}, outlines[1], theme)
        for axes, label in ((heads, "heads"), (widths, "FFN width")):
            axes.set_ylabel(label, color=theme.muted, fontsize=8)
            if row == len(models) - 1:
                axes.set_xlabel("layer, input to output", color=theme.muted)
    _legend(figure, title, reference, theme)
    return as_png(figure, theme)


def _bars(axes: Any, parts: Mapping[str, Sequence[int]], outline: Sequence[int], theme: Theme) -> None:
    """Bars by colour, each in front of those before it."""
    for colour, values in parts.items():
        axes.bar(range(1, len(values) + 1), values, width=0.78, color=colour)
    if outline:
        edges = [edge + 0.5 for edge in range(len(outline) + 1)]
        axes.stairs(outline, edges, color=theme.second, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0.4, max(map(len, parts.values())) + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)
    axes.title.set_fontsize(9)


def _legend(figure: Any, title: str, reference: Layers | None, theme: Theme) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = [Patch(color=theme.soft, label="query heads")]
    marks.append(Patch(color=theme.accent, label="key/value heads; FFN width"))
    if reference:
        dashes = (0, (4, 3))
        marks.append(Line2D([], [], color=theme.second, linewidth=1.2, linestyle=dashes, label=reference.label))
    legend = figure.legend(
        handles=marks, loc="outside upper left", ncols=len(marks), fontsize=8.5, frameon=False, title=title,
        labelcolor=theme.muted, handlelength=1.4, borderaxespad=0.2, alignment="left",
    )  # fmt: skip
    legend.get_title().set(color=theme.ink, fontsize=10, fontweight="bold")
