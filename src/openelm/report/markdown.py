"""Tables in Markdown that can be read in a terminal too."""

from collections.abc import Sequence


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a table whose columns stand under each other: the first ``left`` to the left, figures to the right.

    Cells are taken as they are: who has a "|" in one escapes it.
    """
    widths = [max(2, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return [line(cells) for cells in (head, rule, *rows)]
