"""Training every cell of a grid, each in a process of its own, and going on where one was stopped."""

import contextlib
import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import IO

from maml_pipeline import signals
from maml_pipeline.environment import child_environment
from maml_pipeline.errors import UserError
from maml_pipeline.files import remove_unfinished, write_atomically
from maml_pipeline.learner.metrics_csv import read_last_row
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.report.comparison import compare
from maml_pipeline.runs import folder as run_folder
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.run import Run
from maml_pipeline.signals import Response
from maml_pipeline.text import printable
from maml_pipeline.tradeoff.grid import Cell

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_END = 100
"""A meta-step, and what W&B may take to end; `sbatch --signal=SIGUSR1@120` gives no more."""


@dataclass(frozen=True)
class Tradeoff:
    """A folder with one run a cell, `config.yaml` that all share, and `tradeoff.json`.

    Args:
        folder: It exists.
        cells: What to train.
    """

    folder: Path
    cells: Sequence[Cell]

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def run_folder(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def is_finished(self, cell: Cell) -> bool:
        """Tell whether a cell was trained and tested; it is not run again."""
        return (self.run_folder(cell) / run_folder.TEST).exists()

    def command(self, cell: Cell) -> list[str]:
        """Return the command that trains a cell, or goes on with it."""
        folder = self.run_folder(cell)
        settings = {**cell.settings, "run.dir": folder}
        command = [sys.executable, "-m", "maml_pipeline", "fit", "--config", str(self.config)]
        for key, value in settings.items():
            command += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        if run_folder.checkpoint_path(folder, "last").exists():
            command += ["--ckpt_path", "last"]
        return command

    @contextmanager
    def locked(self) -> Iterator[IO[str]]:
        """Hold the folder for this process and the trainings that it starts, which may outlive it.

        Raises:
            UserError: Another one holds it.
        """
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.folder} is in use: another trade-off, or a training that a killed one left "
                    "behind, still runs in it; wait for it, or name another folder with --out"
                ) from None
            remove_unfinished(self.folder)
            yield lock

    def become(self, cell: Cell) -> None:
        """Turn this process into the training of one cell, beside those of other cells.

        Started by `srun` for every device. A job that is put back into its queue comes here again and
        goes on from its own last checkpoint. It returns only where the cell is finished.

        Raises:
            UserError: Another one trains it.
        """
        if self.is_finished(cell):
            print(f"{cell.name} is finished")
            return
        folder = self.run_folder(cell)
        folder.mkdir(exist_ok=True)
        if is_rank_zero():
            self._claim()
            print(f"{cell.name}: its output goes to {printable(folder / run_folder.LOG)}", flush=True)
        with (folder / run_folder.LOG).open("a") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        os.execv(sys.executable, self.command(cell))

    def _claim(self) -> None:
        """Lock the folder against a whole trade-off; the training locks the cell's own."""
        # Never closed: the lock ends with the training.
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        os.set_inheritable(descriptor, True)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder} is in use: another trade-off runs in it; wait for it, or name another "
                "folder with --out"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning(
                "%s cannot be locked (%s): make sure that one job uses it", self.folder, error
            )

    def failures(self) -> dict[Cell, str]:
        """Return the cells that are not finished, with what the training of each said last."""
        return {cell: self._reason(cell) for cell in self.cells if not self.is_finished(cell)}

    def _reason(self, cell: Cell) -> str:
        log = self.run_folder(cell) / run_folder.LOG
        if not log.exists():
            return "it was never started"
        return f"{_last_words(log.read_text(errors='replace'))} ({log})"

    def train(self, cell: Cell, lock: IO[str], watch: Callable[[int], None]) -> str | None:
        """Train and test a cell in a process of its own.

        Args:
            cell: Its output goes to `log.txt` in its folder.
            lock: That of `locked`.
            watch: Called twice a second with the meta-steps done.

        Returns:
            What went wrong, or `None`.

        Raises:
            Stopped: This process was asked to stop; the training has stopped in order.
        """
        folder = self.run_folder(cell)
        folder.mkdir(exist_ok=True)
        with (folder / run_folder.LOG).open("a+", errors="replace") as log:
            earlier_attempts = log.seek(0, SEEK_END)
            # Raised while the process starts, a stop would leave it behind.
            signals.respond(Response.NOTE, announces=True)
            # A W&B id that is given to this process is not that of each of its trainings.
            environment = child_environment(WANDB_RUN_ID=None)
            process = subprocess.Popen(
                self.command(cell),
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
            )
            try:
                while (status := _wait(process)) is None:
                    signals.raise_if_requested()
                    watch(meta_steps_done(folder))
                signals.raise_if_requested()
            except BaseException:
                _end(process)
                raise
            finally:
                signals.respond(Response.RAISE)
            if status == 0 and self.is_finished(cell):
                return None
            log.seek(earlier_attempts)
            return f"{_last_words(log.read())} (exit status {status}; {log.name})"

    def write_summary(self, failures: dict[Cell, str]) -> None:
        """Write `tradeoff.json`: every run with its figures, their comparison, and what failed."""
        runs: list[Run] = []
        if any(map(self.is_finished, self.cells)):
            # Damaged cells do not end the trainings of others; the report names them.
            with contextlib.suppress(UserError):
                runs = find_runs([self.folder]).runs
        summary = {
            "comparison": [row.to_json() for rows in compare(runs).values() for row in rows],
            "cells": [{"folder": run.source.name, **run.to_json()} for run in runs],
            "failed": [{"folder": cell.name, "reason": reason} for cell, reason in failures.items()],
        }
        write_atomically(self.folder / "tradeoff.json", json.dumps(summary, indent=1) + "\n")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(SECONDS_BETWEEN_LOOKS)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a training stop after its current meta-step; a second Ctrl-C, or a long wait, kills it."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _last_words(output: str) -> str:
    """Return what a training said last: its own error where there is one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("maml: error: ") for line in lines if line.startswith("maml: error: ")]
    return [*lines[-1:], *errors[-1:]][-1] if lines else "it ended without a word"


def meta_steps_done(folder: Path) -> int:
    """Read how far a run is from the last row of its metrics; 0 where there is none."""
    row = read_last_row(folder / run_folder.METRICS)
    return 0 if row is None else int(row["step"]) + 1
