"""`maml report`: a page with pictures of finished or still running runs."""

from collections.abc import Sequence
from pathlib import Path

from maml_pipeline.cli.flags import FlagParser, path_argument
from maml_pipeline.tools.comparison import compare, print_comparison
from maml_pipeline.tools.report import write_report
from maml_pipeline.tools.runs import load_runs


def run(arguments: Sequence[str]) -> None:
    """Read the runs, print their comparison and write the report.

    Args:
        arguments: Those after `maml report`.

    Raises:
        UserError: The person can put it right.
    """
    parser = FlagParser(
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
    runs = load_runs(settings.runs)
    for experiment, rows in compare(runs).items():
        print_comparison(experiment, rows)
    print(f"Report: {write_report(runs, settings.out)}")
