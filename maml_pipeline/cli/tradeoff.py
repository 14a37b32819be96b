"""`maml tradeoff`: train each order with each number of inner steps and each seed, and compare them."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.cli.report import report_runs
from maml_pipeline.errors import UserError
from maml_pipeline.run_folder import REPORT
from maml_pipeline.text import counted, printable

if TYPE_CHECKING:
    from maml_pipeline.tradeoff.devices import Parallel
    from maml_pipeline.tradeoff.folder import Tradeoff
    from maml_pipeline.tradeoff.grid import Cell

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> None:
    """Train the cells that are not finished, print the comparison and write the report.

    Args:
        arguments: Those after `maml tradeoff`.

    Raises:
        UserError: An argument is invalid, the folder cannot be used, or a cell failed.
    """
    settings, fit_arguments = parse(arguments)
    # Imported late: Lightning takes seconds to import, which help must not.
    from maml_pipeline.cli.terminal import configure_logging
    from maml_pipeline.cli.tradeoff_plan import Plan
    from maml_pipeline.tradeoff.cells import exec_cell, find_failures, train_cells
    from maml_pipeline.tradeoff.devices import DeviceShares

    configure_logging()
    if settings.parallel is not None and (settings.cell is not None or settings.report):
        other = "--report" if settings.report else "--cell"
        raise UserError(
            f"--parallel trains several cells, which {other} does not; leave one of them out"
        )
    plan = Plan(settings, fit_arguments)
    tradeoff = plan.tradeoff
    if settings.report:
        failures = find_failures(tradeoff)
        tradeoff.write_summary(failures)
        _report(tradeoff)
        _raise_if_failed(tradeoff, failures)
        return

    shares = DeviceShares(settings.parallel or 1, plan.shared["trainer"])
    if settings.dry_run:
        _list_cells(tradeoff)
        return
    tradeoff.create(plan.shared)
    if settings.cell is not None:
        exec_cell(tradeoff, tradeoff.cells[settings.cell])
        return
    if settings.vary:
        warn_if_never_validated(plan.shared["trainer"])
    console = Console(markup=False, emoji=False, highlight=False)
    failures = train_cells(tradeoff, plan.shared["trainer"]["max_steps"], shares, console)
    _report(tradeoff)
    _raise_if_failed(tradeoff, failures)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the settings of a trade-off, and the remaining arguments, which are those of `maml fit`."""
    parser = Parser(
        prog="maml tradeoff",
        usage="maml tradeoff --config FILE [--orders first,second] [--inner_steps 1,5] [--seeds 0,1] "
        "[--vary KEY=VALUE,...] [--out DIR] [--parallel N] [--dry_run | --cell N | --report] "
        "[--KEY VALUE ...]",
        description="Train and test each gradient order with each number of inner steps, each seed and "
        "each value of further keys, on the same tasks; then compare accuracy or loss, memory, time, "
        "FLOPs and order gap. Each combination is a cell: a run in its own process and folder. The same "
        "command resumes a trade-off that was stopped. All other keys are those of `maml fit`.",
        examples=(
            "maml tradeoff --config toy --inner_steps 1,5 --seeds 0,1",
            "maml tradeoff --config toy --dry_run",
            "maml tradeoff --config toy --vary model.inner_lr=0.05,0.1,0.2",
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--orders",
        type=lambda text: text.split(","),
        metavar="ORDER,...",
        help="any of first, truncated-N (only the last N inner steps are differentiated), second, "
        "checkpointed, hessian-free, truncated-N-checkpointed, truncated-N-hessian-free (default: "
        "first,second,checkpointed)",
    )
    add(
        "--inner_steps",
        type=_numbers,
        metavar="K,...",
        help="numbers of inner steps (default: the config's)",
    )
    add("--seeds", type=_numbers, metavar="N,...", help="seeds (default: the config's)")
    add(
        "--vary",
        action="append",
        default=[],
        type=_vary,
        metavar="KEY=VALUE,...",
        help="another key of `maml fit` and its values; may be repeated. The report shows each order "
        "with the values that validated best",
    )
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="output folder (default: runs/<experiment>-tradeoff)",
    )
    add(
        "--parallel",
        type=_parallel,
        metavar="N",
        help="cells to train side by side, each on a GPU of its own or with its share of the CPU cores; "
        "auto: one per GPU (default: 1)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="list the cells without training")
    mode.add_argument("--cell", type=int, metavar="N", help="train only cell N, counted from 0")
    mode.add_argument("--report", action="store_true", help="compare the cells without training")
    return parser.parse_known_args(arguments)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a whole number or a comma-separated list of whole numbers"
        ) from None


def _parallel(text: str) -> "Parallel":
    if text == "auto":
        return "auto"
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1, or auto")
    return number


def _vary(text: str) -> tuple[str, list[str]]:
    """Split `KEY=VALUE,...` into the key and its values."""
    key, equals, values = text.partition("=")
    key = key.strip().removeprefix("--")
    if not key or not equals:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be KEY=VALUE,VALUE, as in model.inner_lr=0.1,0.4"
        )
    found = [value.strip() for value in _split(values)]
    if "" in found:
        raise argparse.ArgumentTypeError(f"{key} has an empty value; write {key}=VALUE,VALUE")
    return key, found


def _split(text: str) -> Iterator[str]:
    """Split at commas, but not inside of brackets or quotes."""
    start, depth, quote = 0, 0, ""
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in ")}]":
            depth -= 1
        elif char == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def warn_if_never_validated(trainer: dict[str, Any]) -> None:
    """Warn if no value of `--vary` can be chosen, before hours of training."""
    if trainer["val_check_interval"] > trainer["max_steps"]:
        logger.warning(
            "trainer.max_steps is %s and trainer.val_check_interval %s: no cell is validated, so "
            "no value of --vary can be chosen; lower trainer.val_check_interval",
            *(trainer["max_steps"], trainer["val_check_interval"]),
        )


def _list_cells(tradeoff: "Tradeoff") -> None:
    from maml_pipeline.tradeoff.cells import meta_steps_done

    for cell in tradeoff.cells:
        state = "to be trained"
        if tradeoff.is_finished(cell):
            state = "finished"
        elif done := meta_steps_done(tradeoff.folder_of(cell)):
            state = f"resumes after about {done:,} meta-steps"  # the last logged one
        print(f"{printable(tradeoff.folder_of(cell))}: {state}")


def _report(tradeoff: "Tradeoff") -> None:
    """Print the comparison of the finished cells, if any, and write the report."""
    if any(map(tradeoff.is_finished, tradeoff.cells)):
        report_runs([tradeoff.folder], tradeoff.folder / REPORT)


def _raise_if_failed(tradeoff: "Tradeoff", failures: "dict[Cell, str]") -> None:
    """Raise an error that names the failed cells.

    Raises:
        UserError: A cell failed.
    """
    if failures:
        names = ", ".join(cell.name for cell in failures)
        first = next(iter(failures.values()))
        raise UserError(
            f"{len(failures)} of {counted(len(tradeoff.cells), 'cell')} failed ({names}); "
            f"the first: {first}"
        )
