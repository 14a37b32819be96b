"""`maml tradeoff`: every gradient order, number of inner steps and seed trained alike and compared."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from maml_pipeline.cli.config_files import read_config
from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.cli.report import show_report
from maml_pipeline.cli.resolved_config import ResolvedConfig
from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.errors import UserError
from maml_pipeline.files import make_folder, write_atomically
from maml_pipeline.meta_gradient.order import Method
from maml_pipeline.runs.compatibility import config_differences
from maml_pipeline.signals import Stopped
from maml_pipeline.text import printable
from maml_pipeline.tradeoff.cells import Tradeoff, meta_steps_done
from maml_pipeline.tradeoff.grid import Cell, make_grid
from maml_pipeline.tradeoff.progress import GridProgress

VARIED = {
    "model.first_order": "orders",
    "model.checkpoint_inner_steps": "orders",
    "model.inner_steps": "inner_steps",
    "seed_everything": "seeds",
    "run.dir": "out",
}
"""Keys that the grid sets, and the flag that says how."""


def run(arguments: Sequence[str]) -> None:
    """Train what is missing of a grid, then print the comparison and write the report.

    Args:
        arguments: Those after `maml tradeoff`.

    Raises:
        UserError: The person can put it right, or a cell failed.
    """
    configure_logging()
    plan = Plan(arguments)
    tradeoff, cell = plan.tradeoff, plan.settings.cell
    if plan.settings.dry_run:
        _list(tradeoff)
        return
    if plan.settings.report:
        failures = tradeoff.failures()
        tradeoff.write_summary(failures)
        _show(tradeoff, failures)
        return

    plan.open_folder()
    if cell is not None:
        tradeoff.become(tradeoff.cells[cell])
        return
    with tradeoff.locked() as lock:
        failures = _train(tradeoff, lock, plan.shared["trainer"]["max_steps"])
    _show(tradeoff, failures)


class Plan:
    """What a trade-off's arguments ask for, checked, and with nothing done yet.

    Args:
        arguments: Those after `maml tradeoff`.
        elsewhere: Whether its cells will be trained on other machines.

    Raises:
        UserError: The person can put it right.
    """

    def __init__(self, arguments: Sequence[str], elsewhere: bool = False) -> None:
        self.settings, self.fit_arguments = _parse(arguments)
        values = ResolvedConfig(self.fit_arguments, elsewhere).values
        cells = make_grid(
            self.settings.orders or [*Method],
            self.settings.inner_steps or [values["model"]["inner_steps"]],
            self.settings.seeds or [values["seed_everything"]],
        )
        if values["trainer"]["max_steps"] < 1:
            raise UserError(
                "trainer.max_steps is -1; a trade-off ends its trainings after so many meta-steps"
            )
        if (cell := self.settings.cell) is not None and cell not in range(len(cells)):
            raise UserError(f"cell is {cell}; the cells of this trade-off are 0 to {len(cells) - 1}")
        folder = self.settings.out or Path("runs") / f"{values['run']['experiment']}-tradeoff"
        self.experiment: str = values["run"]["experiment"]
        self.tradeoff = Tradeoff(folder, cells)
        if self.settings.report:
            if not self.tradeoff.config.exists():
                raise UserError(f"out {folder} holds no trade-off; train its cells first")
        else:
            self.shared = _shared_config(self.tradeoff, values, cells)

    def open_folder(self) -> None:
        """Make the folder, and keep in it the configuration that all cells share.

        Cells that start at once may each write it: the same, and whole at every moment.
        """
        folder, config = self.tradeoff.folder, self.tradeoff.config
        make_folder(folder, "out")
        if not config.exists():
            write_atomically(config, yaml.safe_dump(self.shared, sort_keys=False))


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="maml tradeoff",
        usage="maml tradeoff --config FILE [--orders first,second] [--inner_steps 1,5] [--seeds 0,1] "
        "[--out DIR] [--dry_run | --cell N | --report] [--KEY VALUE ...]",
        description="Train and test every gradient order with every number of inner steps and every "
        "seed, on the same tasks and each in a process of its own; then compare them: "
        "accuracy or loss, memory, time, FLOPs and order gap. The same command goes on after it was "
        "stopped. All further keys are those of `maml fit`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--orders", type=lambda text: text.split(","), help=f"of {','.join(Method)} (default: all)")
    add("--inner_steps", type=_numbers, help="numbers of inner steps (default: the config's)")
    add("--seeds", type=_numbers, help="seeds (default: the config's)")
    add("--out", type=path_argument, help="folder of the whole (default: runs/<experiment>-tradeoff)")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--dry_run", action="store_true", help="list the cells, and run nothing")
    alone.add_argument(
        "--cell", type=int, help="train this one of the cells, counted from 0, and no other"
    )
    alone.add_argument("--report", action="store_true", help="compare what is there, and train nothing")
    settings, fit_arguments = parser.parse_known_args(arguments)
    for argument in fit_arguments:
        key = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and key in VARIED:
            raise UserError(f"--{key} is what a trade-off sets for each cell; use --{VARIED[key]}")
        if key == "ckpt_path":
            raise UserError("--ckpt_path has no place here: the same command goes on where it stopped")
    return settings, fit_arguments


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number, nor numbers with commas between"
        ) from None


def _shared_config(tradeoff: Tradeoff, values: dict[str, Any], cells: list[Cell]) -> dict[str, Any]:
    """Return what all cells have in common: that of the folder, which must not be another.

    All are tested with the same inner steps: `eval_inner_steps`, and at least the most of the grid.
    """
    model = values["model"]
    if model["eval_inner_steps"] is None:
        model["eval_inner_steps"] = model["inner_steps"]
    asked, most = model["eval_inner_steps"], max(cell.inner_steps for cell in cells)
    model["eval_inner_steps"] = max(asked, most)
    if not tradeoff.config.exists():
        return values
    shared: dict[str, Any] = read_config(tradeoff.config, "the configuration of the trade-off")
    try:
        kept = int(shared["model"]["eval_inner_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{tradeoff.config} is damaged: it has no model.eval_inner_steps; name another folder with "
            "--out"
        ) from error
    if asked <= kept >= most:
        model["eval_inner_steps"] = kept
    for key, here, there in config_differences(values, shared, ignored=()):
        if key not in VARIED:
            raise UserError(
                f"{tradeoff.folder} holds a trade-off in which {key} is {str(there)[:80]}, not "
                f"{str(here)[:80]}; name another folder with --out"
            )
    return shared


def _list(tradeoff: Tradeoff) -> None:
    for cell in tradeoff.cells:
        state = "finished" if tradeoff.is_finished(cell) else "to be trained"
        print(f"{printable(tradeoff.run_folder(cell))}: {state}")


def _train(tradeoff: Tradeoff, lock: Any, max_steps: int) -> dict[Cell, str]:
    """Train the cells that are not finished, and return the reasons of those that failed."""
    console = Console(markup=False, emoji=False, highlight=False)  # a folder's name is no markup
    missing = [cell for cell in tradeoff.cells if not tradeoff.is_finished(cell)]
    finished = len(tradeoff.cells) - len(missing)
    console.print(
        f"Trade-off in {printable(tradeoff.folder)}: {len(tradeoff.cells)} cells, {finished} finished"
    )
    failures: dict[Cell, str] = {}
    if not missing:
        tradeoff.write_summary(failures)
        return failures
    progress = GridProgress(missing, max_steps, console)
    try:
        with progress.bars:
            for cell in missing:
                progress.start(meta_steps_done(tradeoff.run_folder(cell)))
                failure = tradeoff.train(cell, lock, progress.watch)
                progress.end(failure)
                if failure:
                    failures[cell] = failure
                tradeoff.write_summary(failures)
    except Stopped as stop:
        remark = f"in {progress.cell.name}: the same command resumes from there"
        raise Stopped(stop.signum, remark=remark) from None
    return failures


def _show(tradeoff: Tradeoff, failures: dict[Cell, str]) -> None:
    """Print the comparison, write the report and, where cells failed, end with an error."""
    if any(map(tradeoff.is_finished, tradeoff.cells)):
        show_report([tradeoff.folder], tradeoff.folder / "report")
    if failures:
        names = ", ".join(cell.name for cell in failures)
        first = next(iter(failures.values()))
        raise UserError(
            f"{len(failures)} of {len(tradeoff.cells)} cells failed ({names}); the first: {first}"
        )
