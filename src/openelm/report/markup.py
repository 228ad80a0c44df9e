"""The pieces of HTML that the pages are made of."""

from __future__ import annotations

import html
import re


def escape(text: object) -> str:
    """Escape for HTML; control characters, which models do write, become visible."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(text)))


def part(title: str, note: str, body: str) -> str:
    """A section of the page."""
    lead = f"<p>{escape(note)}</p>" if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{lead}\n{body}\n</section>"


def plot_grid(figures: list[str], kind: str = "") -> str:
    """Pictures side by side."""
    return f'<div class="plots {kind}">{"".join(figures)}</div>'


def card(body: str) -> str:
    """A framed block."""
    return f'<div class="card">{body}</div>'


def table(rows: list[list[str]], head: list[str] | None = None, kind: str = "") -> str:
    """Write a table of texts; `kind` is its class in the style sheet."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in row) + "</tr>"
        for tag, some in (("th", [head] if head else []), ("td", rows))
        for row in some
    ]
    return f'<div class="scroll"><table class="{kind}">' + "\n".join(lines) + "</table></div>"


def fates(unit: str, counts: dict[str, int], total: int) -> str:
    """What became of all the ``unit``, which are ``total`` or as many as there are counts: a bar and a table."""
    total = max(total, sum(counts.values()), 1)
    shares = [value / total for value in counts.values()]
    # Bar and table are coloured alike, by position, in the style sheet.
    spans = [f'<span style="flex-grow: {share:.6f}"></span>' if share else "<span hidden></span>" for share in shares]
    rows = [
        [name.replace("_", " "), f"{value:,}", f"{share:.2%}"]
        for (name, value), share in zip(counts.items(), shares, strict=True)
    ]
    bar = f'<div class="stack" aria-hidden="true">{"".join(spans)}</div>'
    return card(bar + table(rows, [unit, "count", "share"], "counts parts"))


def shown(value: object) -> str:
    """A value as a table has it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
