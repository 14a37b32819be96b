"""One folder a run: what it is called, what lies in it, and how a run is found again."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

from maml_pipeline.errors import UserError
from maml_pipeline.learner.slurm import JOB_FILE


@dataclass
class RunSettings:
    """Where a run is kept and which checkpoint of it is the best.

    Args:
        experiment: What is trained, for the run's name: `<experiment>-<first|second>-s<seed>`.
        dir: The run's folder; by default `runs/<name>`, with -2, -3, ... where that is taken.
        checkpoint_every: Meta-steps between two savings of `last.ckpt`.
        monitor: The metric that decides which checkpoint is kept as `best.ckpt`.
        mode: Whether the best `monitor` is the smallest or the largest.
        artifacts: Attach the best checkpoint and a report to the W&B run; `null` for where it is online.
    """

    experiment: str = "run"
    dir: Path | None = None
    checkpoint_every: int = 500
    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    artifacts: bool | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise UserError(f"run.checkpoint_every is {self.checkpoint_every}; it must be 1 or more")


def checkpoint(folder: Path, which: str) -> Path:
    """Return the path of a run's `best` or `last` checkpoint."""
    return folder / "checkpoints" / f"{which}.ckpt"


def create(explicit: Path | None, name: str) -> Path:
    """Make the folder of a new run, never one that another run uses.

    Raises:
        UserError: The explicit folder holds a run already, or the folder cannot be made.
    """
    if explicit is not None:
        if checkpoint(explicit, "last").exists() or (explicit / JOB_FILE).exists():
            raise UserError(
                f"run.dir {explicit} already holds a run; "
                "add --ckpt_path last to go on with it, or name another folder"
            )
        return _make(explicit, exist_ok=True)
    folders = _numbered(name)
    while True:
        # Making it is the test: of two runs that start at once, one goes on to the next number.
        with contextlib.suppress(FileExistsError):
            return _make(next(folders), exist_ok=False)


def find(explicit: Path | None, name: str, which: str) -> Path:
    """Return the folder of a run that has the checkpoint asked for; of several, the newest.

    Raises:
        UserError: There is none.
    """
    existing = takewhile(Path.exists, _numbered(name))
    folders = [*existing] if explicit is None else [explicit]
    for folder in reversed(folders):
        if checkpoint(folder, which).exists():
            return folder
    tried = checkpoint(explicit or Path("runs") / name, which)
    raise UserError(f"ckpt_path is {which}, but there is no {tried}; name the run with --run.dir")


def find_of_job(explicit: Path | None, name: str, job: str) -> Path | None:
    """Return the folder that a Slurm job made before it was put back into the queue.

    A job never goes on with another one's run, not even where both name the same folder. Of several
    folders, from a time when Slurm had counted to the same number, the newest is meant.
    """
    folders = [*takewhile(Path.exists, _numbered(name))] if explicit is None else [explicit]
    for folder in reversed(folders):
        file = folder / JOB_FILE
        if file.exists() and file.read_text().strip() == job:
            return folder
    return None


def _numbered(name: str) -> Iterator[Path]:
    yield Path("runs") / name
    for number in count(2):
        yield Path("runs") / f"{name}-{number}"


def _make(folder: Path, exist_ok: bool) -> Path:
    try:
        checkpoint(folder, "last").parent.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(
            f"run.dir {folder} cannot be made ({error.strerror}); name a writable folder"
        ) from error
    return folder
