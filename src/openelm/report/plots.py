"""The pictures of a report: drawn as PNG in the colours of the light or the dark page, kept and embedded."""

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openelm.errors import UserError
from openelm.files import write_bytes

DOTS_PER_INCH = 160
WIDE, SMALL = (5.4, 3.1), (3.6, 2.2)  # inches, width and height


@dataclass(frozen=True)
class Theme:
    """Colours that the page's style sheet and its pictures share."""

    page: str
    card: str
    ink: str
    muted: str
    line: str
    accent: str
    second: str
    soft: str

    def css(self) -> str:
        return " ".join(f"--{name}: {colour};" for name, colour in asdict(self).items())


LIGHT = Theme("#f6f6f3", "#ffffff", "#1d2126", "#656c75", "#e2e3e0", "#1f6a8c", "#b5562a", "#c3dbe6")
DARK = Theme("#121417", "#1b1e22", "#e6e7e3", "#9aa1a9", "#30353b", "#6cb6d6", "#e2945f", "#2d5062")


@dataclass(frozen=True)
class Curve:
    """One quantity along the run; `references` are horizontal lines, label -> value."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    x_label: str = "tokens seen"
    references: Mapping[str, float] = field(default_factory=dict)
    smooth: bool = False
    markers: bool = False
    from_zero: bool = False
    size: tuple[float, float] = WIDE


@dataclass(frozen=True)
class Line:
    """One of several curves in one picture; `errors` are standard errors, drawn as bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] = ()
    smooth: bool = False


def require_matplotlib() -> None:
    """Refuse early, and with the remedy, when the optional plotting library is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "a report is drawn with matplotlib, which is not installed: pip install 'openelm-framework[plot]'"
        ) from error


def draw_curve(curve: Curve, theme: Theme) -> bytes:
    """Draw a line along the run; where the values scatter, pale under their running mean."""
    figure, axes = _axes(curve.size, theme, curve.title)
    _draw_line(axes, curve.x, curve.y, theme.accent, smooth=curve.smooth, markers=curve.markers)
    if curve.from_zero:
        axes.set_ylim(bottom=0)
    _draw_references(axes, curve.references, theme)
    _label_along(axes, curve.x_label, theme)
    return as_png(figure, theme)


def draw_lines(title: str, lines: Sequence[Line], x_label: str, theme: Theme, level: float | None = None) -> bytes:
    """Draw up to three curves in one picture, named at its top right; `level` is a dashed line to compare with."""
    figure, axes = _axes(WIDE, theme, title)
    for line, colour in zip(lines, (theme.accent, theme.second, theme.muted), strict=False):
        if len(line.errors):
            axes.errorbar(line.x, line.y, line.errors, color=colour, fmt="none", elinewidth=1.2, capsize=2)
        _draw_line(axes, line.x, line.y, colour, smooth=line.smooth, markers=not line.smooth, label=line.label)
    if level is not None:
        axes.axhline(level, color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)))
    _label_along(axes, x_label, theme)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.01, 1.0), ncols=len(lines), fontsize=8.5, frameon=False,
        labelcolor=theme.muted, handlelength=1.2, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip
    return as_png(figure, theme)


def _draw_line(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    colour: str,
    *,
    smooth: bool = False,
    markers: bool = False,
    label: str | None = None,
) -> None:
    if smooth and len(y) >= 8:
        axes.plot(x, y, color=colour, alpha=0.28, linewidth=0.9)
        axes.plot(x, running_mean(y), color=colour, linewidth=1.8, label=label)
    else:
        # A lone value makes no line: it is seen as a dot.
        marker = "o" if markers or len(y) == 1 else ""
        axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=label)
    axes.margins(x=0.02, y=0.10)
    axes.set_xlim(left=0)  # one origin for all curves of a run


def _label_along(axes: Any, x_label: str, theme: Theme) -> None:
    """Few ticks with short numbers, and what the run is measured by."""
    axes.set_xlabel(x_label, color=theme.muted)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.yaxis.get_major_locator().set_params(nbins=5)


def _draw_references(axes: Any, references: Mapping[str, float], theme: Theme) -> None:
    """Dashed lines with their label and value, set where a falling curve is not."""
    if not references:
        return
    low, high = axes.get_ylim()
    low, high = min(low, *references.values()), max(high, *references.values())
    room = 0.10 * (high - low)
    axes.set_ylim(low - room, high + room)
    for label, value in references.items():
        axes.axhline(value, color=theme.second, linewidth=1.1, linestyle=(0, (4, 3)))
        lower = value < (low + high) / 2  # the curve comes down from the left to end near this line
        axes.annotate(
            f"{label}  {value:.2f}",
            (0 if lower else 1, value),
            xycoords=("axes fraction", "data"),
            xytext=(3, -4) if lower else (-3, 4),
            textcoords="offset points",
            ha="left" if lower else "right",
            va="top" if lower else "bottom",
            color=theme.second,
            fontsize=8,
        )


def draw_bars(title: str, values: Mapping[str, float], own: Sequence[str], theme: Theme) -> bytes:
    """Draw a horizontal bar per value, first on top; the bars named in `own` are the run's."""
    figure, axes = _axes((5.4, 0.75 + 0.36 * len(values)), theme, title)
    labels = list(values)
    colours = [theme.accent if label in own else theme.muted for label in labels]
    bars = axes.barh(labels, [values[label] for label in labels], color=colours, height=0.62)
    axes.bar_label(bars, fmt="%.2f", padding=5, color=theme.ink, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", labelcolor=theme.ink)
    return as_png(figure, theme)


def draw_layers(
    title: str, widths: Sequence[float], inner: Sequence[float], labels: tuple[str, str], theme: Theme
) -> bytes:
    """Draw a bar per layer, input side first, and the uniform model's constant as a dashed outline.

    `inner` is a part of each bar, drawn dark in front of it, or empty; `labels` name the whole and the part.
    """
    figure, axes = _axes(WIDE, theme, title)
    layers = range(1, len(widths) + 1)
    uniform = mean(widths)
    axes.bar(layers, widths, width=0.78, color=theme.soft if inner else theme.accent, label=labels[0] or None)
    if inner:
        axes.bar(layers, inner, width=0.78, color=theme.accent, label=labels[1])
    axes.stairs(
        [uniform] * len(widths),
        [edge + 0.5 for edge in range(len(widths) + 1)],
        color=theme.second,
        linewidth=1.4,
        linestyle=(0, (4, 3)),
        label=f"uniform, {short_number(uniform)}",
    )
    axes.legend(loc="upper left", fontsize=8, frameon=False, labelcolor=theme.ink, handlelength=1.4)
    axes.set_ylim(0, 1.42 * max(widths))  # room for the legend above the input's low bars
    axes.set_xlim(0.4, len(widths) + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("layer, input to output", color=theme.muted)
    return as_png(figure, theme)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the points around each, a thirtieth of all; values that are no number are left out."""
    reach = max(1, len(values) // 60)
    means = []
    for index in range(len(values)):
        # Alike on both sides, so that the mean of a falling curve does not lag behind it; level at the end, where a
        # shrinking window would only follow the noise of the last points.
        centre = max(0, min(index, len(values) - 1 - reach))
        near = min(reach, centre)
        window = [value for value in values[centre - near : centre + near + 1] if math.isfinite(value)]
        means.append(mean(window) if window else math.nan)
    return means


def short_number(value: float) -> str:
    """At most three significant digits and a letter: 4.93M, 812k, 0.0012."""
    # The half below each limit keeps 999,600 from becoming 1e+03k.
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def duration(elapsed_s: float) -> str:
    """Two units at most: 2 h 05 min, 4 min 10 s, 12 s."""
    minutes, second = divmod(round(elapsed_s), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02d} min"
    return f"{minute} min {second:02d} s" if minute else f"{second} s"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def embed(folder: Path, name: str, draw: Callable[[Theme], bytes], alt: str, caption: str = "") -> str:
    """Draw for both pages, keep the light one as folder/name.png, and return both within a <figure>."""
    light, dark = draw(LIGHT), draw(DARK)
    write_bytes(folder / f"{name}.png", light)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" alt="{html.escape(alt)}"></picture>'
        # No line break before an option's dash, as in "xz -9".
        f"<figcaption>{html.escape(caption or alt).replace(' -', '&nbsp;-')}</figcaption></figure>"
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _axes(size: tuple[float, float], theme: Theme, title: str) -> tuple[Any, Any]:
    """Return a figure and its only panel."""
    figure = blank(size, theme)
    return figure, panel(figure, theme, title)


def blank(size: tuple[float, float], theme: Theme) -> Any:
    """A figure without panels, so many inches wide and high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, facecolor=theme.card, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel(
    figure: Any, theme: Theme, title: str, place: tuple[int, int, int] = (1, 1, 1), share_y: Any | None = None
) -> Any:
    """Axes at a place (rows, columns, which from 1) of a figure: title at the left, quiet grid, no box."""
    axes = figure.add_subplot(*place, facecolor=theme.card, sharey=share_y)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=theme.ink, pad=9)
    axes.grid(axis="y", color=theme.line, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.line)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0, pad=5)
    axes.xaxis.label.set_fontsize(8.5)
    return axes


def as_png(figure: Any, theme: Theme) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    # No software name in the file, so that the same run gives the same bytes.
    figure.savefig(buffer, format="png", facecolor=theme.card, metadata={"Software": None})
    return buffer.getvalue()
