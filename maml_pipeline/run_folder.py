"""The folder of a run: its name, the name of every file in it, and how it is created.

No other module spells one of these file names (`tests/test_run_folder.py`).
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from maml_pipeline.config_file import read_config
from maml_pipeline.errors import UserError
from maml_pipeline.files import write_atomically
from maml_pipeline.limits import check_at_least

RUNS = Path("runs")
"""Where new runs are created, relative to the working directory."""

CONFIG = "config.yaml"
METRICS = "metrics.csv"
TEST = "test.json"
VALIDATION = "val.json"
LOG = "log.txt"
LOCK = ".lock"
JOB = "slurm_job.txt"
WANDB_ID = "wandb_id.txt"
WANDB_LOGS = "wandb"
WANDB_LOG = "run-*.wandb"
"""A run's logs are `wandb/offline-run-<time>-<id>/run-<id>.wandb`; W&B documents only the folder."""
REPORT = "report"
CHECKPOINTS = "checkpoints"
BEST_CHECKPOINT = f"{CHECKPOINTS}/best.ckpt"
LAST_CHECKPOINT = f"{CHECKPOINTS}/last.ckpt"
TRADEOFF = "tradeoff.json"
"""The summary in the folder of a trade-off, whose runs are in folders below it."""
SUBMITTED_CELLS = "cells-{digest}.json"
"""Beside that summary: the cells as they were submitted to Slurm, one file for each grid."""

MAX_NAME_BYTES = 100


@dataclass
class RunSettings:
    """Where a run is saved, and which of its checkpoints is the best.

    Args:
        experiment: Prefix of the run's name `<experiment>-<first|truncated-n|second>-s<seed>`; `null`
            for the name of the tasks.
        dir: The run's folder; by default `runs/<name>`, or `runs/<name>-2`, `-3`, ... if it exists.
        checkpoint_every: Meta-steps between two saves of `last.ckpt`.
        monitor: The metric that selects the checkpoint saved as `best.ckpt`.
        mode: Whether the smallest or the largest value of `monitor` is the best.
        artifacts: Upload the best checkpoint and a report to W&B; `null`: only if the run is online.
        varied: Keys, such as `model.inner_lr`, in which runs of one comparison differ: a report shows
            the value that validated best. `maml tradeoff --vary` sets it.
    """

    experiment: str | None = None
    dir: Path | None = None
    checkpoint_every: int = 500
    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    artifacts: bool | None = None
    varied: list[str] | None = None

    def __post_init__(self) -> None:
        check_at_least("run.checkpoint_every", self.checkpoint_every, 1)
        if self.experiment is not None:
            check_name("run.experiment", self.experiment)


def check_name(key: str, name: str) -> None:
    """Check that a name can be part of a folder's name.

    Args:
        key: The setting that holds the name, for the message.
        name: The name.

    Raises:
        UserError: The name is empty, too long, or has a path separator or a control character.
    """
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(f"{key} has {len(name.encode())} bytes; it must have at most {MAX_NAME_BYTES}")
    if not name.strip() or name in (".", "..") or not name.isprintable() or {"/", "\\"} & {*name}:
        raise UserError(
            f"{key} is {name!r}; it names a folder in {RUNS}/, so it must be printable text without "
            "/ and \\"
        )


def checkpoint_path(folder: Path, which: str) -> Path:
    """Return the path of a run's `best` or `last` checkpoint."""
    return folder / {"best": BEST_CHECKPOINT, "last": LAST_CHECKPOINT}[which]


def checkpoint_to_test(folder: Path) -> Path:
    """Return the checkpoint to test: the best one, or the last one if nothing was validated."""
    best = checkpoint_path(folder, "best")
    return best if best.exists() else checkpoint_path(folder, "last")


def is_run_folder(folder: Path) -> bool:
    """Tell whether a folder is a run's. A trade-off's has a config too, but no checkpoints."""
    return (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()


def files_of_a_run(folder: Path) -> list[str]:
    """Return the files in a folder that are named like those which a run replaces or removes."""
    return [name for name in (METRICS, TEST, VALIDATION, BEST_CHECKPOINT) if (folder / name).exists()]


def enclosing_run(file: Path) -> Path | None:
    """Return the folder of the run that a checkpoint or config belongs to; `None` if there is none."""
    file = Path(file)
    if file.name == CONFIG and is_run_folder(file.parent):
        return file.parent
    # The path as written: a run's folder of checkpoints may be a link to another disk.
    folder = Path(*file.parts[:-2]) if file.parent.name == CHECKPOINTS else None
    return folder if folder is not None and is_run_folder(folder) else None


def read_run_config(folder: Path) -> dict[str, Any]:
    """Read a run's config.

    Raises:
        UserError: It is missing or cannot be read.
    """
    file = folder / CONFIG
    if not file.exists():
        raise UserError(f"{folder} has no {file.name}, so it is not a run folder; name another")
    return read_config(file, "the run's config")


def read_slurm_job(folder: Path) -> str | None:
    """Return the id of the Slurm job that last started a run, or will start it; `None` without one."""
    lines = _read_lines(folder / JOB)
    return lines[0].strip() if lines else None


def read_slurm_output(folder: Path) -> Path | None:
    """Return the output file of a run's Slurm job; `None` if it is not recorded."""
    lines = _read_lines(folder / JOB)
    return Path(lines[1]) if len(lines) > 1 else None


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:  # also without a file
        return []


def record_slurm_job(folder: Path, job: str | None, output: Path | None = None) -> None:
    """Record the Slurm job of a run; `None` if it is trained outside Slurm.

    A job that was submitted with `maml submit` is recorded then, and keeps its record when it starts.
    """
    if job is None:
        (folder / JOB).unlink(missing_ok=True)
    elif output is not None or read_slurm_job(folder) != job:
        lines = [job] if output is None else [job, str(output)]
        write_atomically(folder / JOB, "".join(f"{line}\n" for line in lines))


def folders_named(name: str) -> list[Path]:
    """Return the folders `runs/<name>`, `runs/<name>-2`, ..., oldest first."""
    if not RUNS.is_dir():
        return []
    numbered = re.compile(re.escape(name) + r"(?:-([1-9]\d*))?")
    found = {
        folder: int(match[1] or 1)
        for folder in RUNS.iterdir()
        if (match := numbered.fullmatch(folder.name)) and folder.is_dir()
    }
    return sorted(found, key=lambda folder: found[folder])


def create_numbered(name: str) -> Path:
    """Create the next of the folders `runs/<name>`, `runs/<name>-2`, ... for a new run.

    Raises:
        UserError: The folder cannot be created.
    """
    newest = max((_number(folder, name) for folder in folders_named(name)), default=0)
    while True:
        newest += 1
        folder = RUNS / (name if newest == 1 else f"{name}-{newest}")
        # mkdir is atomic: if two runs start at once, the slower one takes the next number.
        with contextlib.suppress(FileExistsError):
            make_run_folder(folder, exist_ok=False)
            return folder


def _number(folder: Path, name: str) -> int:
    return int(folder.name[len(name) + 1 :] or 1)


def make_run_folder(folder: Path, exist_ok: bool) -> None:
    """Create a run's folder and its subfolders.

    Raises:
        FileExistsError: The folder exists and `exist_ok` is false.
        UserError: The folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        (folder / CHECKPOINTS).mkdir(exist_ok=exist_ok)
    except FileExistsError:
        if exist_ok:
            raise UserError(f"run.dir {folder} is a file; name a folder") from None
        raise
    except OSError as error:
        raise UserError(
            f"run.dir {folder} cannot be created ({error.strerror}); name a writable folder"
        ) from error
