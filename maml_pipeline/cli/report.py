"""`maml report`: write a report comparing runs, finished or not."""

import sys
from collections.abc import Sequence
from pathlib import Path

from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.text import printable


def run(arguments: Sequence[str]) -> None:
    """Print a comparison of runs and write a report of it.

    Args:
        arguments: Those after `maml report`.

    Raises:
        UserError: There is no run to report, or the report cannot be written.
    """
    parser = Parser(
        prog="maml report",
        description="Write a report comparing runs, finished or not: report.html, which needs no "
        "network, report.md, and the plots as PNG. Print the same tables.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        metavar="RUN_DIR",
        nargs="+",
        type=path_argument,
        help="folder of a run or of several runs, W&B offline run, or tradeoff.json",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("report"),
        metavar="DIR",
        help="output folder (default: report/)",
    )
    settings = parser.parse_args(arguments)
    report_runs(settings.runs, settings.out)


def report_runs(paths: Sequence[Path], out: Path) -> None:
    """Print a comparison of the runs below some paths, and what is left out; write the report.

    Args:
        paths: As for `find_runs`.
        out: The report's folder.

    Raises:
        UserError: There is no run to report, or the report cannot be written.
    """
    # Imported late: Lightning takes seconds to import, which help must not.
    from maml_pipeline.report.comparison import compare
    from maml_pipeline.report.page import write_report
    from maml_pipeline.report.printed_table import print_table
    from maml_pipeline.runs.find import find_runs

    found = find_runs(paths)
    for line in found.skipped:
        print(f"Left out: {line}", file=sys.stderr)
    experiments = compare(found.runs)
    for title, rows in experiments.items():
        print_table(title, rows)
    print(f"Report: {printable(write_report(experiments, out, found.skipped))}")
