"""`maml tradeoff`: train each order with each number of inner steps and each seed, and compare them."""

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from maml_pipeline.cli.config_files import read_config
from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.cli.report import report_runs
from maml_pipeline.cli.resolved_config import ResolvedConfig
from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.order import Method
from maml_pipeline.runs.folder import REPORT, RUNS
from maml_pipeline.text import printable
from maml_pipeline.tradeoff.cells import exec_cell, find_failures, train_cells
from maml_pipeline.tradeoff.folder import Tradeoff
from maml_pipeline.tradeoff.grid import VARIED_KEYS, Cell, make_grid


def run(arguments: Sequence[str]) -> None:
    """Train the cells that are not finished, print the comparison and write the report.

    Args:
        arguments: Those after `maml tradeoff`.

    Raises:
        UserError: An argument is invalid, the folder cannot be used, or a cell failed.
    """
    configure_logging()
    plan = Plan(arguments)
    tradeoff, cell = plan.tradeoff, plan.settings.cell
    if plan.settings.dry_run:
        _list_cells(tradeoff)
        return
    if plan.settings.report:
        failures = find_failures(tradeoff)
        tradeoff.write_summary(failures)
        _report(tradeoff, failures)
        return

    tradeoff.create(plan.shared)
    if cell is not None:
        exec_cell(tradeoff, tradeoff.cells[cell])
        return
    console = Console(markup=False, emoji=False, highlight=False)
    failures = train_cells(tradeoff, plan.shared["trainer"]["max_steps"], console)
    _report(tradeoff, failures)


class Plan:
    """A trade-off as its arguments ask for it: checked, with nothing written yet.

    Args:
        arguments: Those after `maml tradeoff`.
        elsewhere: Whether the cells will be trained on other machines.

    Raises:
        UserError: An argument is invalid, or the folder holds another trade-off.
    """

    def __init__(self, arguments: Sequence[str], elsewhere: bool = False) -> None:
        self.settings, fit_arguments = _parse(arguments)
        config = ResolvedConfig(fit_arguments, elsewhere).values
        cells = make_grid(
            self.settings.orders or [*Method],
            self.settings.inner_steps or [config["model"]["inner_steps"]],
            self.settings.seeds or [config["seed_everything"]],
        )
        if config["trainer"]["max_steps"] < 1:
            raise UserError("trainer.max_steps is -1; a trade-off needs a number of meta-steps")
        if (cell := self.settings.cell) is not None and cell not in range(len(cells)):
            raise UserError(f"cell is {cell}; the cells of this trade-off are 0 to {len(cells) - 1}")
        self.experiment: str = config["run"]["experiment"]
        self.tradeoff = Tradeoff(self.settings.out or RUNS / f"{self.experiment}-tradeoff", cells)
        exists = self.tradeoff.config.exists()
        if not self.settings.report:
            name = "the configuration of the trade-off"
            existing = read_config(self.tradeoff.config, name) if exists else None
            self.shared: dict[str, Any] = self.tradeoff.shared_config(config, existing)
        elif not exists:
            raise UserError(f"out {self.tradeoff.folder} holds no trade-off; train its cells first")


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="maml tradeoff",
        usage="maml tradeoff --config FILE [--orders first,second] [--inner_steps 1,5] [--seeds 0,1] "
        "[--out DIR] [--dry_run | --cell N | --report] [--KEY VALUE ...]",
        description="Train and test each gradient order with each number of inner steps and each seed, "
        "on the same tasks, one process per cell; then compare accuracy or loss, memory, time, FLOPs "
        "and order gap. The same command resumes a trade-off that was stopped. All other keys are those "
        "of `maml fit`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--orders", type=lambda text: text.split(","), help=f"any of {','.join(Method)} (default: all)")
    add("--inner_steps", type=_numbers, help="numbers of inner steps (default: the config's)")
    add("--seeds", type=_numbers, help="seeds (default: the config's)")
    add("--out", type=path_argument, help="output folder (default: runs/<experiment>-tradeoff)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="list the cells without training")
    mode.add_argument("--cell", type=int, metavar="N", help="train only cell N, counted from 0")
    mode.add_argument("--report", action="store_true", help="compare the cells without training")
    settings, fit_arguments = parser.parse_known_args(arguments)
    for argument in fit_arguments:
        key = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and key in VARIED_KEYS:
            raise UserError(f"--{key} is set by the trade-off for each cell; use --{VARIED_KEYS[key]}")
        if key == "ckpt_path":
            raise UserError("--ckpt_path is not used here: the same command resumes a stopped trade-off")
    return settings, fit_arguments


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number, nor several separated by commas"
        ) from None


def _list_cells(tradeoff: Tradeoff) -> None:
    for cell in tradeoff.cells:
        state = "finished" if tradeoff.is_finished(cell) else "to be trained"
        print(f"{printable(tradeoff.run_folder(cell))}: {state}")


def _report(tradeoff: Tradeoff, failures: dict[Cell, str]) -> None:
    """Print the comparison and write the report.

    Raises:
        UserError: A cell failed.
    """
    if any(map(tradeoff.is_finished, tradeoff.cells)):
        report_runs([tradeoff.folder], tradeoff.folder / REPORT)
    if failures:
        names = ", ".join(cell.name for cell in failures)
        first = next(iter(failures.values()))
        raise UserError(
            f"{len(failures)} of {len(tradeoff.cells)} cells failed ({names}); the first: {first}"
        )
