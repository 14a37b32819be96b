"""Running the cells of a grid, each in its own process, and resuming those that were stopped."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from maml_pipeline import run_folder, signals
from maml_pipeline.environment import child_environment
from maml_pipeline.metrics_table import read_last_row
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.runs.slurm_jobs import jobs_of
from maml_pipeline.runs.state import RunState, folder_situation
from maml_pipeline.signals import Response, Stopped
from maml_pipeline.text import counted, printable
from maml_pipeline.tradeoff.devices import DeviceShares
from maml_pipeline.tradeoff.folder import Tradeoff
from maml_pipeline.tradeoff.grid import Cell
from maml_pipeline.tradeoff.processes import SECONDS_TO_STOP, LoggedProcess, stop_all
from maml_pipeline.tradeoff.progress_bar import GridProgress

POLL_SECONDS = 0.2
MOST_NAMES = 3
"""Names of cells in a message; if there are more, they are counted."""


def train_cells(
    tradeoff: Tradeoff, max_steps: int, shares: DeviceShares, console: Console
) -> dict[Cell, str]:
    """Train and test the unfinished cells, as many side by side as there are shares of the devices.

    Args:
        tradeoff: A trade-off whose folder exists.
        max_steps: Number of meta-steps of each cell.
        shares: What each of the cells gets that are trained side by side.
        console: Where to show the progress.

    Returns:
        The failed cells, each with the reason.

    Raises:
        UserError: Another process has locked the folder.
        Stopped: This process was asked to stop; the current cells have saved their state.
    """
    with tradeoff.locked() as descriptors:
        unfinished = [cell for cell in tradeoff.cells if not tradeoff.is_finished(cell)]
        finished = len(tradeoff.cells) - len(unfinished)
        console.print(
            f"Trade-off in {printable(tradeoff.folder)}: "
            f"{counted(len(tradeoff.cells), 'cell')}, {finished} finished"
            + (f"; {shares}" if shares.number > 1 else ""),
            soft_wrap=True,
        )
        if not unfinished:
            tradeoff.write_summary({})
            return {}
        if shares.number > 1:
            unfinished = longest_first(unfinished)
        progress = GridProgress(unfinished, max_steps, console, shares.number)
        with progress.bars:
            training = _Training(tradeoff, unfinished, shares, descriptors, progress)
            return training.run()


def longest_first(cells: Sequence[Cell]) -> list[Cell]:
    """Order the cells of each seed by their cost, so that none that takes long is left for the end."""
    seeds = [*dict.fromkeys(cell.seed for cell in cells)]
    return sorted(cells, key=lambda cell: (seeds.index(cell.seed), -cell.relative_cost))


def exec_cell(tradeoff: Tradeoff, cell: Cell) -> None:
    """Replace this process by the run of one cell, while other jobs may run other cells.

    `srun` starts this process once per device. A requeued job starts it again, and the run resumes from
    its last checkpoint. Returns only if the cell is finished.

    Raises:
        UserError: Another process has locked the folder.
    """
    if tradeoff.is_finished(cell):
        print(f"{cell.name} is finished")
        return
    folder = tradeoff.folder_of(cell)
    folder.mkdir(exist_ok=True)
    log_file = folder / run_folder.LOG
    if is_rank_zero():
        tradeoff.lock_for_cell()  # the run locks the cell's own folder
        print(f"{cell.name}: output in {printable(log_file)}", flush=True)
    with log_file.open("a") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    os.execv(sys.executable, fit_command(tradeoff, cell))


def fit_command(tradeoff: Tradeoff, cell: Cell) -> list[str]:
    """Return the command that trains a cell, or resumes it."""
    folder = tradeoff.folder_of(cell)
    command = [sys.executable, "-P", "-m", "maml_pipeline", "fit", "--config", str(tradeoff.config)]
    for key, value in {**cell.settings, "run.dir": folder}.items():
        plain = value is None or isinstance(value, bool)
        command += [f"--{key}", json.dumps(value) if plain else str(value)]
    if (folder / run_folder.LAST_CHECKPOINT).exists():
        command += ["--ckpt_path", "last"]
    return command


def meta_steps_done(folder: Path) -> int:
    """Return the number of meta-steps in a run's metrics table; 0 if there is none."""
    row = read_last_row(folder / run_folder.METRICS)
    return 0 if row is None else int(row["step"]) + 1


def find_failures(tradeoff: Tradeoff) -> dict[Cell, str]:
    """Return the cells that failed or were stopped, each with the reason in its last attempt.

    Other cells without a result wait, run, or were never started.
    """
    unfinished = {
        tradeoff.folder_of(cell): cell for cell in tradeoff.cells if not tradeoff.is_finished(cell)
    }
    jobs = jobs_of(unfinished)
    failures = {}
    for folder, cell in unfinished.items():
        found = folder_situation(folder, jobs.get(folder))
        # A run that has no config yet was not stopped: it is just starting, or was never started.
        was_stopped = found.state is RunState.STOPPED and (folder / run_folder.CONFIG).exists()
        if found.state is RunState.FAILED or was_stopped:
            log = folder / run_folder.LOG
            failures[cell] = f"{found.reason or 'it was stopped'} ({log if log.exists() else folder})"
    return failures


class _Training:
    """The cells that wait, run and have failed.

    Args:
        tradeoff: The trade-off of the cells.
        cells: What to train, in this order.
        shares: What each of the cells gets that are trained side by side.
        descriptors: File descriptors that hold the lock of the folder; the processes inherit them.
        progress: Where to report.
    """

    def __init__(
        self,
        tradeoff: Tradeoff,
        cells: Sequence[Cell],
        shares: DeviceShares,
        descriptors: Sequence[int],
        progress: GridProgress,
    ) -> None:
        self.tradeoff = tradeoff
        self.descriptors = descriptors
        self.progress = progress
        self.waiting = [*cells]
        self.free = shares.environments
        self.running: dict[Cell, tuple[LoggedProcess, dict[str, str]]] = {}
        self.failures: dict[Cell, str] = {}

    def run(self) -> dict[Cell, str]:
        """Train all cells; return the failed ones.

        Raises:
            Stopped: This process was asked to stop; the current cells have saved their state.
        """
        # If a signal raised `Stopped` while a process starts, the process would keep running.
        signals.respond(Response.NOTE, announces=True)
        try:
            while self.waiting or self.running:
                while self.waiting and self.free:
                    self._start(self.waiting.pop(0), self.free.pop(0))
                time.sleep(POLL_SECONDS)
                self._watch()
        except BaseException as error:
            killed = stop_all([process for process, _ in self.running.values()])
            if isinstance(error, Stopped):
                raise Stopped(error.signum, remark=self._where_to_resume(killed)) from None
            raise
        finally:
            signals.respond(Response.RAISE)
        return self.failures

    def _start(self, cell: Cell, share: dict[str, str]) -> None:
        folder = self.tradeoff.folder_of(cell)
        folder.mkdir(exist_ok=True)
        # A W&B id in the environment is meant for this process; each cell is a separate W&B run.
        environment = child_environment(**share, WANDB_RUN_ID=None)
        command, log = fit_command(self.tradeoff, cell), folder / run_folder.LOG
        self.progress.start(cell, meta_steps_done(folder))
        self.running[cell] = LoggedProcess(command, log, environment, self.descriptors), share

    def _watch(self) -> None:
        """Show the progress of the running cells, and take note of those that have ended."""
        for cell, (process, share) in [*self.running.items()]:
            status = process.exit_status
            # Ctrl-C also reaches the cell: one that has stopped for it has not failed.
            signals.raise_if_requested()
            if status is None:
                self.progress.update(cell, meta_steps_done(self.tradeoff.folder_of(cell)))
                continue
            del self.running[cell]
            self.free.append(share)
            is_finished = status == 0 and self.tradeoff.is_finished(cell)
            failure = None if is_finished else process.reason()
            self.progress.end(cell, failure)
            if failure is not None:
                self.failures[cell] = failure
            self.tradeoff.write_summary(self.failures)
            signals.raise_if_requested()

    def _where_to_resume(self, killed: Sequence[LoggedProcess]) -> str:
        if not self.running:
            return "between two cells: the same command resumes from there"
        remark = f"in {_named([*self.running])}: the same command resumes from there"
        if killed:
            lost = [cell for cell, (process, _) in self.running.items() if process in killed]
            remark += (
                f", but from an earlier state in {_named(lost)}, killed after {SECONDS_TO_STOP} seconds"
            )
        return remark


def _named(cells: Sequence[Cell]) -> str:
    """Return the names of cells, or their number if there are many."""
    names = [cell.name for cell in cells]
    return ", ".join(names) if len(names) <= MOST_NAMES else counted(len(names), "cell")
