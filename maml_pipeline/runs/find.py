"""Finding runs on disk, finished or not, and leaving out what cannot be reported."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking import group_wandb_logs
from maml_pipeline.meta_gradient.order import Method
from maml_pipeline.runs.read import (
    UnreadableRunError,
    read_run_folder,
    read_tradeoff,
    read_wandb_run,
)
from maml_pipeline.runs.run import Run, display_path
from maml_pipeline.text import printable

RUN_FILES = {"config.yaml", "metrics.csv", "test.json", "wandb_id.txt", "checkpoints"}
"""A folder with one of these is a run's, or a trade-off's where runs lie below it."""

PARTS_OF_A_RUN = {"checkpoints", "report", "wandb"}
"""Folders in a run's folder that hold no other run; W&B's logs in it say the same as `metrics.csv`."""

NO_RUN = (
    "it holds no run: a run has config.yaml and metrics.csv, or is one of W&B's offline-run-* "
    "folders, or a tradeoff.json"
)

MOST_LEVELS = 60


@dataclass(frozen=True)
class FoundRuns:
    """The runs below some paths.

    Args:
        runs: Sorted by experiment, inner steps, order and seed.
        skipped: What cannot be reported, a line each: the path and the reason.
    """

    runs: list[Run]
    skipped: list[str]


def find_runs(paths: Sequence[Path]) -> FoundRuns:
    """Find every run that lies in or below some paths, and read those that can be reported.

    Links are followed to runs and to folders of runs. A run that is found more than once is one run,
    also where it was copied, or where W&B's log of it lies beside its folder.

    Args:
        paths: Run folders, folders of them, W&B's offline runs, or files `tradeoff.json`.

    Raises:
        UserError: None can be reported.
    """
    search = _Search()
    for path in paths:
        search.visit(path)
    search.read_logs()
    runs = sorted(
        search.runs, key=lambda r: (r.experiment, r.inner_steps, [*Method].index(r.method), r.seed)
    )
    runs, copies = _without_copies(runs)
    skipped = [*search.skipped, *copies]
    if not runs:
        more = f" (and {len(skipped) - 1:,} more)" if len(skipped) > 1 else ""
        raise UserError(f"there is no run to report: {skipped[0]}{more}")
    return FoundRuns(runs, skipped)


class _Search:
    """One walk over some paths, in which every real folder is visited once."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.skipped: list[str] = []
        self.logs: list[Path] = []
        self.visited: set[str] = set()

    def visit(self, path: Path) -> None:
        """Look for runs at a path that a person named."""
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
        """Read the W&B logs found outside of runs' folders, once all parts of each run are known."""
        for logs in group_wandb_logs(self.logs).values():
            self._read(logs[-1].parent, partial(read_wandb_run, logs))

    def _is_first_visit(self, path: Path) -> bool:
        real = os.path.realpath(path)
        is_first = real not in self.visited
        self.visited.add(real)
        return is_first

    def _visit_folder(self, folder: Path, level: int = 0) -> bool:
        """Read the runs in and below a folder; tell whether there is one to report or to leave out."""
        if not self._is_first_visit(folder):
            return True
        if level > MOST_LEVELS:
            self._skip(folder, "it lies in more folders than any run")
            return True
        try:
            names = {name: folder / name for name in sorted(os.listdir(folder))}
        except OSError as error:
            self._skip(folder, f"it cannot be read ({error.strerror})")
            return True
        logs = [path for name, path in names.items() if name[:4] == "run-" and path.suffix == ".wandb"]
        if logs:
            self.logs += logs
            return True
        is_run = not RUN_FILES.isdisjoint(names)
        below = False
        for name, path in names.items():
            if not (is_run and name in PARTS_OF_A_RUN):
                below |= self._visit_entry(path, is_run, level)
        if is_run and ("metrics.csv" in names or not (below or "tradeoff.json" in names)):
            self._read(folder, partial(read_run_folder, folder))
        elif "tradeoff.json" in names and not below:
            self._read_tradeoff(folder / "tradeoff.json")
        return below or is_run or "tradeoff.json" in names

    def _visit_entry(self, path: Path, in_run: bool, level: int) -> bool:
        if os.path.isdir(path):
            is_followed = not path.is_symlink() or _holds_runs(path)
            return is_followed and self._visit_folder(path, level + 1)
        if path.is_symlink() and not os.path.exists(path) and not in_run:
            self._skip(path, "it is a link that leads nowhere")
            return True
        return False

    def _read_tradeoff(self, file: Path) -> None:
        try:
            for source, read in read_tradeoff(file):
                self._read(source, read)
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
    """Tell whether a link leads to a run or a folder of runs, so that no others are walked through."""
    if link.name == "latest-run":  # W&B's, beside the folder that it leads to
        return False
    try:
        names = os.listdir(link)
    except OSError:
        return False
    return not RUN_FILES.isdisjoint(names) or any(
        os.path.exists(link / name / file) for name in names for file in RUN_FILES
    )


# Runs that are there more than once -------------------------------------------------------------


def _without_copies(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Keep one of the runs that are the same training, and say of each other one whose copy it is.

    Args:
        runs: In any order.

    Returns:
        The runs in their order, and a line for each copy.
    """
    kept: list[Run] = []
    lines: list[str] = []
    for run in sorted(runs, key=_rank, reverse=True):
        original = next((other for other in kept if _is_copy(run, other)), None)
        if original is None:
            kept.append(run)
        else:
            lines.append(f"{run.folder}: it is the run of {original.folder}")
    return [run for run in runs if any(run is one for one in kept)], lines


def _rank(run: Run) -> tuple[object, ...]:
    """Return what decides which of several copies is kept: the one that says the most."""
    is_folder = (run.source / "config.yaml").is_file()
    return (run.is_finished, run.meta_steps, is_folder, not run.is_summary)


def _is_copy(run: Run, other: Run) -> bool:
    """Tell whether two runs are one training: they logged the same wherever both logged something.

    Two trainings with the same settings and seed may learn the same, but do not take the same times.
    """
    if (run.experiment, run.name) != (other.experiment, other.name):
        return False
    if run.settings != other.settings:
        return False
    own, others = (_logged(one, run.is_summary or other.is_summary) for one in (run, other))
    shared = own.keys() & others.keys()
    return bool(shared) and all(_is_same(own[key], others[key]) for key in shared)


def _logged(run: Run, without_times: bool) -> dict[tuple[int, str], float]:
    """Return every logged value by meta-step and metric; a tradeoff.json has but the median time."""
    return {
        (int(record["step"]), metric): value
        for record in run.history
        for metric, value in record.items()
        if metric != "step" and not (without_times and metric.startswith(("speed/", "memory/")))
    }


def _is_same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))
