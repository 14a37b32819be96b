"""Running the cells of a grid, each in its own process, and resuming those that were stopped."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from maml_pipeline import run_folder, signals
from maml_pipeline.environment import child_environment
from maml_pipeline.metrics_table import read_last_row
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.signals import Response, Stopped
from maml_pipeline.text import counted, printable
from maml_pipeline.tradeoff.folder import Tradeoff
from maml_pipeline.tradeoff.grid import Cell
from maml_pipeline.tradeoff.progress_bar import GridProgress

POLL_SECONDS = 0.5
SECONDS_TO_STOP = 100
"""Time for the current meta-step and for W&B to finish, within `sbatch --signal=SIGUSR1@120`."""


def train_cells(tradeoff: Tradeoff, max_steps: int, console: Console) -> dict[Cell, str]:
    """Train and test the unfinished cells, one after another.

    Args:
        tradeoff: A trade-off whose folder exists.
        max_steps: Number of meta-steps of each cell.
        console: Where to show the progress.

    Returns:
        The failed cells, each with the reason.

    Raises:
        UserError: Another process has locked the folder.
        Stopped: This process was asked to stop; the current cell has saved its state.
    """
    with tradeoff.locked() as descriptors:
        unfinished = [cell for cell in tradeoff.cells if not tradeoff.is_finished(cell)]
        finished = len(tradeoff.cells) - len(unfinished)
        console.print(
            f"Trade-off in {printable(tradeoff.folder)}: "
            f"{counted(len(tradeoff.cells), 'cell')}, {finished} finished",
            soft_wrap=True,
        )
        failures: dict[Cell, str] = {}
        if not unfinished:
            tradeoff.write_summary(failures)
            return failures
        progress = GridProgress(unfinished, max_steps, console)
        try:
            with progress.bars:
                for cell in unfinished:
                    progress.start(meta_steps_done(tradeoff.folder_of(cell)))
                    failure = _train_cell(tradeoff, cell, descriptors, progress.update)
                    progress.end(failure)
                    if failure:
                        failures[cell] = failure
                    tradeoff.write_summary(failures)
        except Stopped as stop:
            remark = f"in {progress.cell.name}: the same command resumes from there"
            raise Stopped(stop.signum, remark=remark) from None
        return failures


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
        command += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    if (folder / run_folder.LAST_CHECKPOINT).exists():
        command += ["--ckpt_path", "last"]
    return command


def meta_steps_done(folder: Path) -> int:
    """Return the number of meta-steps in a run's metrics table; 0 if there is none."""
    row = read_last_row(folder / run_folder.METRICS)
    return 0 if row is None else int(row["step"]) + 1


def find_failures(tradeoff: Tradeoff) -> dict[Cell, str]:
    """Return the cells that are not finished, each with the reason in its log."""
    return {
        cell: _logged_reason(tradeoff.folder_of(cell) / run_folder.LOG)
        for cell in tradeoff.cells
        if not tradeoff.is_finished(cell)
    }


def _train_cell(
    tradeoff: Tradeoff, cell: Cell, descriptors: Sequence[int], watch: Callable[[int], None]
) -> str | None:
    """Train and test a cell in its own process, with its output in the cell's log.

    Args:
        tradeoff: The trade-off of the cell.
        cell: What to train.
        descriptors: File descriptors that hold the lock of the folder; the process inherits them.
        watch: Called every half second with the number of meta-steps done.

    Returns:
        The reason for a failure, or `None`.

    Raises:
        Stopped: This process was asked to stop; the cell has saved its state.
    """
    folder = tradeoff.folder_of(cell)
    folder.mkdir(exist_ok=True)
    with (folder / run_folder.LOG).open("a+", errors="replace") as log:
        earlier_attempts = log.seek(0, os.SEEK_END)
        # If a signal raised `Stopped` while the process starts, the process would keep running.
        signals.respond(Response.NOTE, announces=True)
        # A W&B id in the environment is meant for this process; each cell is a separate W&B run.
        environment = child_environment(WANDB_RUN_ID=None)
        process = subprocess.Popen(
            fit_command(tradeoff, cell),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
        )
        try:
            while (status := _wait(process)) is None:
                signals.raise_if_requested()
                watch(meta_steps_done(folder))
            signals.raise_if_requested()
        except BaseException:
            _stop(process)
            raise
        finally:
            signals.respond(Response.RAISE)
        if status == 0 and tradeoff.is_finished(cell):
            return None
        log.seek(earlier_attempts)
        return f"{_error_message(log.read())} (exit status {status}; {log.name})"


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a run after its current meta-step; kill it on a second Ctrl-C or after a timeout."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _logged_reason(log: Path) -> str:
    if not log.exists():
        return "it was never started"
    return f"{_error_message(log.read_text(errors='replace'))} ({log})"


def _error_message(output: str) -> str:
    """Return the last error message of a run, or else its last line of output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("maml: error: ") for line in lines if line.startswith("maml: error: ")]
    return [*lines[-1:], *errors[-1:]][-1] if lines else "it failed with no error output"
