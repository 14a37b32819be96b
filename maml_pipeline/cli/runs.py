"""`maml runs`: list runs with their settings, progress, state and result."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence

from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.run_folder import RUNS
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.list_table import print_runs
from maml_pipeline.runs.listing import ALIASES, FIELDS, ListedRun
from maml_pipeline.runs.selection import Filter, describe_no_match, filtered, sorted_by
from maml_pipeline.runs.slurm_jobs import jobs_of
from maml_pipeline.text import printable


def run(arguments: Sequence[str]) -> None:
    """Print a table of the runs below some paths, or a JSON array with `--json`.

    Args:
        arguments: Those after `maml runs`.

    Raises:
        UserError: There is no run, or no run has the key of a filter or of the order.
    """
    settings = _parser().parse_args(arguments)
    found = find_runs(settings.paths or [RUNS], unlogged=True)
    for line in found.skipped:
        print(f"Left out: {line}", file=sys.stderr)
    jobs = jobs_of(run.source for run in found.runs)
    runs = [ListedRun.of(run, jobs.get(run.source)) for run in found.runs]
    chosen = filtered(sorted_by(runs, settings.sort, settings.reverse), settings.filters)
    if settings.json:
        print(json.dumps([run.fields for run in chosen], indent=2, allow_nan=False))
    elif chosen:
        # A pipe or a file gets whole lines.
        print_runs(chosen, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    if not chosen:
        print(printable(describe_no_match(runs, settings.filters)), file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(
        prog="maml runs",
        description="List the runs in and below some folders: experiment, gradient order, inner steps "
        "k, seed, inner learning rate alpha, meta-steps done, state, and result: the mean over the test "
        "tasks, or before the test over the validation tasks, with its 95 % confidence interval.",
        examples=(
            "maml runs",
            "maml runs --filter state=finished --filter model.inner_lr=0.1 --sort result",
            "maml runs runs/toy-tradeoff --json",
        ),
        epilog="KEY is one of " + ", ".join(FIELDS) + ", or any key of a run's config, such as "
        "model.engine. " + " and ".join(f"{short} is {name}" for short, name in ALIASES.items()) + ".",
    )
    add = parser.add_argument
    add(
        "paths",
        metavar="PATH",
        nargs="*",
        type=path_argument,
        help="folder of a run or of several runs, W&B offline run, or tradeoff.json (default: runs)",
    )
    add(
        "--filter",
        dest="filters",
        metavar="KEY=VALUE",
        action="append",
        type=_filter_argument,
        default=[],
        help="list only the runs with this value, in which * and ? match any text; may be repeated",
    )
    add(
        "--sort",
        metavar="KEY[,KEY]",
        type=_keys_argument,
        default=[],
        help="sort by these keys; result: best first (default: experiment,k,order,seed)",
    )
    add("--reverse", action="store_true", help="reverse the order")
    add("--json", action="store_true", help="print a JSON array with all fields instead of a table")
    return parser


def _filter_argument(text: str) -> Filter:
    try:
        return Filter.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"it is {text or 'empty'}; it must be KEY=VALUE, such as k=5"
        ) from None


def _keys_argument(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",")]
    if not all(keys):
        raise argparse.ArgumentTypeError(
            f"it is {text or 'empty'}; it must be KEY or KEY,KEY, such as state,result"
        )
    return keys
