"""Finding runs on disk, finished or not, and skipping those that cannot be read."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from maml_pipeline.errors import UserError
from maml_pipeline.run_folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    REPORT,
    TEST,
    TRADEOFF,
    WANDB_ID,
    WANDB_LOG,
    WANDB_LOGS,
)
from maml_pipeline.runs.duplicates import remove_duplicates
from maml_pipeline.runs.read import read_run_folder, read_tradeoff, read_wandb_run
from maml_pipeline.runs.run import Run, display_path
from maml_pipeline.runs.validation import UnreadableRunError
from maml_pipeline.text import printable

RUN_FILES = {CONFIG, METRICS, TEST, WANDB_ID, CHECKPOINTS}
"""A folder with one of these is a run's, or a trade-off's if there are runs below it."""

RUN_SUBFOLDERS = {CHECKPOINTS, REPORT, WANDB_LOGS}
"""Folders in a run's folder that are not searched. W&B's logs there repeat the metrics table."""

NO_RUN = (
    f"it holds no run: a run has {CONFIG} and {METRICS}, or is one of W&B's offline-run-* "
    f"folders, or a {TRADEOFF}"
)

MAX_DEPTH = 60


@dataclass(frozen=True)
class FoundRuns:
    """The runs below some paths.

    Args:
        runs: Sorted by experiment, inner steps, order and seed.
        skipped: One line for each run or file that cannot be read: its path and the reason.
    """

    runs: list[Run]
    skipped: list[str]


def find_runs(paths: Sequence[Path], unlogged: bool = False) -> FoundRuns:
    """Find all runs in or below some paths, and read those that can be read.

    Links to runs and to folders of runs are followed. Each run is returned once, even if it was
    copied, or is found as a folder and as a W&B log.

    Args:
        paths: Run folders, folders that contain them, W&B's offline runs, or trade-off summaries.
        unlogged: Include runs that have logged nothing yet; otherwise they are skipped.

    Raises:
        UserError: There is no run that can be read.
    """
    search = _Search(unlogged)
    for path in paths:
        search.visit(path)
    search.read_logs()
    runs = sorted(search.runs, key=lambda r: (r.experiment, r.inner_steps, r.order.rank, r.seed))
    runs, duplicates = remove_duplicates(runs)
    skipped = [*search.skipped, *duplicates]
    if not runs:
        more = f" (and {len(skipped) - 1:,} more)" if len(skipped) > 1 else ""
        raise UserError(f"there is no run to show: {skipped[0]}{more}")
    return FoundRuns(runs, skipped)


class _Search:
    """One search through some paths, which visits every real folder once."""

    def __init__(self, unlogged: bool) -> None:
        self.unlogged = unlogged
        self.runs: list[Run] = []
        self.skipped: list[str] = []
        self.logs: list[Path] = []
        self.visited: set[str] = set()

    def visit(self, path: Path) -> None:
        """Search a path that the user named."""
        if os.path.isdir(path):
            if not self._visit_folder(path):
                self._skip(path, NO_RUN)
        elif not os.path.exists(path):
            self._skip(path, "it does not exist, or cannot be reached")
        elif self._is_first_visit(path):
            self._visit_file(path)

    def _visit_file(self, path: Path) -> None:
        if path.suffix == ".wandb":
            self.logs.append(path)
        else:
            self._read_tradeoff(path)

    def read_logs(self) -> None:
        """Read the W&B logs found outside run folders, once all logs of each run are known."""
        if not self.logs:
            return
        # Imported late: it imports PyTorch, which takes seconds.
        from maml_pipeline.learner.tracking import group_wandb_logs

        for logs in group_wandb_logs(self.logs).values():
            self._read(logs[-1].parent, partial(read_wandb_run, logs))

    def _is_first_visit(self, path: Path) -> bool:
        real = os.path.realpath(path)
        is_first = real not in self.visited
        self.visited.add(real)
        return is_first

    def _visit_folder(self, folder: Path, level: int = 0) -> bool:
        """Read the runs in and below a folder; tell whether any was found, reported or skipped."""
        if not self._is_first_visit(folder):
            return True
        if level > MAX_DEPTH:
            self._skip(folder, "it is nested too deeply")
            return True
        try:
            names = {name: folder / name for name in sorted(os.listdir(folder))}
        except OSError as error:
            self._skip(folder, f"it cannot be read ({error.strerror})")
            return True
        logs = [path for name, path in names.items() if fnmatch(name, WANDB_LOG)]
        if logs:
            self.logs += logs
            return True
        is_run = not RUN_FILES.isdisjoint(names)
        below = False
        for name, path in names.items():
            if not (is_run and name in RUN_SUBFOLDERS):
                below |= self._visit_entry(path, is_run, level)
        if is_run and (METRICS in names or not (below or TRADEOFF in names)):
            self._read(folder, partial(read_run_folder, folder, self.unlogged))
        elif TRADEOFF in names and not below:
            self._read_tradeoff(folder / TRADEOFF)
        return below or is_run or TRADEOFF in names

    def _visit_entry(self, path: Path, in_run: bool, level: int) -> bool:
        if os.path.isdir(path):
            is_followed = not path.is_symlink() or _holds_runs(path)
            return is_followed and self._visit_folder(path, level + 1)
        if path.is_symlink() and not os.path.exists(path) and not in_run:
            self._skip(path, "it is a broken link")
            return True
        return False

    def _read_tradeoff(self, file: Path) -> None:
        try:
            cells = [*read_tradeoff(file)]
            for source, read in cells:
                self._read(source, read)
            if not cells:
                self._skip(file, "no cell of it is finished")
        except UnreadableRunError as error:
            self._skip(file, str(error))

    def _read(self, source: Path, read: Callable[[], Run]) -> None:
        try:
            self.runs.append(read())
        except UnreadableRunError as error:
            self._skip(source, str(error))

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append(f"{display_path(path)}: {printable(reason)}")


def _holds_runs(link: Path) -> bool:
    """Tell whether a link leads to a run or to a folder of runs; other links are not followed."""
    if link.name == "latest-run":  # W&B's own link to a folder beside it
        return False
    try:
        names = os.listdir(link)
    except OSError:
        return False
    return not RUN_FILES.isdisjoint(names) or any(
        os.path.exists(link / name / file) for name in names for file in RUN_FILES
    )
