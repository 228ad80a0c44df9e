"""openelm report: a run as one web page."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Draw the report of a run: RUN/report/index.html."
EXAMPLE = "openelm report runs/demo --open"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm report``."""
    parser.add_argument("run", metavar="RUN", help="run folder, finished or not")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")


def write_page(run: Path) -> Path:
    """The report of a run, with what was evaluated of it."""
    from openelm.commands.info import tuning_of
    from openelm.evaluate.curves import section
    from openelm.evaluate.results import of_run
    from openelm.report.page import write_report

    adapter = tuning_of(run).get("adapter")
    trained = adapter["parameters"] if adapter else 0
    return write_report(run, lambda folder: section(of_run(run), folder), trained)


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    page = write_page(Path(args.run))
    print(page)
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0
