"""`maml report`: a report comparing runs, finished or not."""

import sys
from collections.abc import Sequence
from pathlib import Path

from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.report.comparison import compare, print_comparison
from maml_pipeline.report.page import write_report
from maml_pipeline.runs.find import find_runs
from maml_pipeline.text import printable


def run(arguments: Sequence[str]) -> None:
    """Read the runs, print their comparison and write the report.

    Args:
        arguments: Those after `maml report`.

    Raises:
        UserError: The person can put it right.
    """
    parser = Parser(
        prog="maml report",
        description="Compare runs, finished or not: report.html, which needs no network, report.md and "
        "the pictures as PNG.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        metavar="RUN_DIR",
        nargs="+",
        type=path_argument,
        help="a run's folder, a folder of them, W&B's offline runs, or a tradeoff.json",
    )
    parser.add_argument(
        "--out", type=path_argument, default=Path("report"), help="where to (default: report/)"
    )
    settings = parser.parse_args(arguments)
    show_report(settings.runs, settings.out)


def show_report(paths: Sequence[Path], out: Path) -> None:
    """Print the comparison of the runs below some paths, and what is left out; write the report.

    Args:
        paths: As for `find_runs`.
        out: The report's folder.

    Raises:
        UserError: There is no run to report, or the report cannot be written.
    """
    found = find_runs(paths)
    for line in found.skipped:
        print(f"Left out: {line}", file=sys.stderr)
    for experiment, rows in compare(found.runs).items():
        print_comparison(experiment, rows)
    print(f"Report: {printable(write_report(found.runs, out, found.skipped))}")
