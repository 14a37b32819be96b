"""One folder a run: what it is called, what lies in it, and how it is created."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maml_pipeline.errors import UserError

RUNS = Path("runs")
CONFIG = "config.yaml"
METRICS = "metrics.csv"
TEST = "test.json"
LOG = "log.txt"
LOCK = ".lock"
JOB = "slurm_job.txt"
CHECKPOINTS = "checkpoints"
BEST_CHECKPOINT = f"{CHECKPOINTS}/best.ckpt"
LAST_CHECKPOINT = f"{CHECKPOINTS}/last.ckpt"
LONGEST_NAME = 100


@dataclass
class RunSettings:
    """Where a run is kept and which checkpoint of it is the best.

    Args:
        experiment: What is trained, for the run's name: `<experiment>-<first|second>-s<seed>`; `null`
            for the tasks' own name.
        dir: The run's folder; by default `runs/<name>`, with -2, -3, ... where that is taken.
        checkpoint_every: Meta-steps between two savings of `last.ckpt`.
        monitor: The metric that decides which checkpoint is kept as `best.ckpt`.
        mode: Whether the best `monitor` is the smallest or the largest.
        artifacts: Attach the best checkpoint and a report to the W&B run; `null` for where it is online.
    """

    experiment: str | None = None
    dir: Path | None = None
    checkpoint_every: int = 500
    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    artifacts: bool | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise UserError(f"run.checkpoint_every is {self.checkpoint_every}; it must be 1 or more")
        if self.experiment is not None:
            check_name("run.experiment", self.experiment)


def check_name(key: str, name: str) -> None:
    """Refuse a name that cannot be a part of a folder's name.

    Args:
        key: What the user calls it, for the message.
        name: The name.

    Raises:
        UserError: It is empty, too long, or holds a path separator or a control character.
    """
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(f"{key} has {len(name)} characters; a name has at most {LONGEST_NAME}")
    if not name.strip() or name in (".", "..") or not name.isprintable() or {"/", "\\"} & {*name}:
        raise UserError(
            f"{key} is {name!r}; it names a folder in {RUNS}/, so it must be one printable word or "
            "phrase without / and \\"
        )


def checkpoint_path(folder: Path, which: str) -> Path:
    """Return the path of a run's `best` or `last` checkpoint."""
    return folder / CHECKPOINTS / f"{which}.ckpt"


def checkpoint_to_test(folder: Path) -> Path:
    """Return the checkpoint that is tested: the best, or the last where nothing was validated."""
    best = checkpoint_path(folder, "best")
    return best if best.exists() else checkpoint_path(folder, "last")


def is_run_folder(folder: Path) -> bool:
    """Tell whether a folder is a run's; a trade-off's has a config as well, but no checkpoints."""
    return (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()


def enclosing_run(file: Path) -> Path | None:
    """Return the run folder that a checkpoint or a config lies in; `None` where it is in none."""
    file = Path(file)
    if file.name == CONFIG and is_run_folder(file.parent):
        return file.parent
    # Not through links: a run may keep its checkpoints on another disk.
    folder = Path(*file.parts[:-2]) if file.parent.name == CHECKPOINTS else None
    return folder if folder is not None and is_run_folder(folder) else None


def read_slurm_job(folder: Path) -> str | None:
    """Return the id of the Slurm job that a run was last started by; `None` where it was none."""
    file = folder / JOB
    return file.read_text().strip() if file.exists() else None


def folders_named(name: str) -> list[Path]:
    """Return the folders `runs/<name>`, `runs/<name>-2`, ..., the oldest first."""
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
    """Make a folder of its own for a new run of this name.

    Raises:
        UserError: It cannot be made.
    """
    newest = max((_number(folder, name) for folder in folders_named(name)), default=0)
    while True:
        newest += 1
        folder = RUNS / (name if newest == 1 else f"{name}-{newest}")
        # Making it is the test: of two runs that start at once, one takes the next number.
        with contextlib.suppress(FileExistsError):
            make_run_folder(folder, exist_ok=False)
            return folder


def _number(folder: Path, name: str) -> int:
    return int(folder.name[len(name) + 1 :] or 1)


def make_run_folder(folder: Path, exist_ok: bool) -> None:
    """Make a run's folder with its subfolders.

    Raises:
        FileExistsError: It is there, and must not be.
        UserError: It cannot be made.
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
            f"run.dir {folder} cannot be made ({error.strerror}); name a writable folder"
        ) from error
