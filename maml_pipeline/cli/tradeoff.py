"""`maml tradeoff`: train each order with each number of inner steps and each seed, and compare them."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from maml_pipeline.cli.report import report_runs
from maml_pipeline.cli.tradeoff_arguments import parse
from maml_pipeline.errors import UserError
from maml_pipeline.run_folder import REPORT
from maml_pipeline.text import counted, printable

if TYPE_CHECKING:
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
    from maml_pipeline.tradeoff.cells import exec_cell, train_cells
    from maml_pipeline.tradeoff.devices import DeviceShares
    from maml_pipeline.tradeoff.submitted import read_submitted

    configure_logging()
    if settings.submitted is not None:
        # The job script adds the devices of the job, which the config in the folder also has.
        submitted = read_submitted(settings.submitted)
        if settings.cell is None:
            _report_on_cells(submitted)
        else:
            exec_cell(submitted, submitted.cell(settings.cell))
        return
    if settings.parallel is not None and (settings.cell is not None or settings.report):
        other = "--report" if settings.report else "--cell"
        raise UserError(
            f"--parallel trains several cells, which {other} does not; leave one of them out"
        )
    # A report trains nothing, so it needs none of the devices: its job requests no GPU.
    plan = Plan(settings, fit_arguments, elsewhere=settings.report)
    tradeoff = plan.tradeoff
    for note in plan.notes:
        print(note)
    if settings.report:
        _report_on_cells(tradeoff)
        return

    shares = DeviceShares(settings.parallel or 1, plan.shared["trainer"])
    if settings.dry_run:
        _list_cells(tradeoff)
        return
    tradeoff.create(plan.shared)
    if settings.cell is not None:
        exec_cell(tradeoff, tradeoff.cell(settings.cell))
        return
    if settings.vary:
        warn_if_never_validated(plan.shared["trainer"])
    console = Console(markup=False, emoji=False, highlight=False)
    failures = train_cells(tradeoff, plan.shared["trainer"]["max_steps"], shares, console)
    _report(tradeoff)
    _raise_if_failed(tradeoff, failures)


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


def _report_on_cells(tradeoff: "Tradeoff") -> None:
    """Write the summary and the report of cells that were trained elsewhere.

    Raises:
        UserError: A cell failed, or was stopped.
    """
    from maml_pipeline.tradeoff.cells import find_failures

    failures = find_failures(tradeoff)
    tradeoff.write_summary(failures)
    _report(tradeoff)
    _print_unfinished(tradeoff, failures)
    _raise_if_failed(tradeoff, failures)


def _report(tradeoff: "Tradeoff") -> None:
    """Print the comparison of the finished cells, if any, and write the report."""
    if any(map(tradeoff.is_finished, tradeoff.cells)):
        report_runs([tradeoff.folder], tradeoff.folder / REPORT)


def _print_unfinished(tradeoff: "Tradeoff", failures: "dict[Cell, str]") -> None:
    """Tell how many cells wait, run or were never started."""
    others = [cell for cell in tradeoff.cells if cell not in failures]
    if number := sum(not tradeoff.is_finished(cell) for cell in others):
        print(f"{counted(number, 'cell')} {'is' if number == 1 else 'are'} not finished")


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
