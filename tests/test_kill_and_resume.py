"""A run that is killed at any point and then resumed ends exactly like an uninterrupted one."""

import csv
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maml_pipeline.learner.training_time import TrainingTime
from tests.helpers import CONFIGS, TIMINGS
from tests.killed_runs import Answer, Server

pytestmark = [pytest.mark.slow, pytest.mark.integration]

RUN = Path("run")
FIT = (
    *("fit", "--config", CONFIGS / "toy.yaml", "--run.dir", RUN, "--trainer.max_steps", 22),
    *("--trainer.val_check_interval", 8, "--trainer.log_every_n_steps", 5),
    *("--run.checkpoint_every", 6, "--probes.every", 7, "--data.val_tasks", 4, "--data.test_tasks", 4),
    *("--trainer.enable_progress_bar", "false"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """Return the folder of an uninterrupted run, and its file operations."""
    folder = tmp_path_factory.mktemp("runs")
    # Checkpoints contain the path of the best one, so that all runs use the same folder.
    answer = server.run(folder / "current", *FIT)
    assert answer["status"] == 0, answer["output"]
    (folder / "current").rename(folder / "whole")
    return folder / "whole" / RUN, answer


def test_a_kill_before_during_or_after_any_write_never_changes_the_run(
    server: Server, whole: tuple[Path, Answer]
) -> None:
    reference, answer = whole
    folder = reference.parent.with_name("current")
    operations = answer["operations"]
    written = {operation.partition(" ")[2] for operation in operations}
    assert {"run", "checkpoints", "metrics.csv"} <= written
    # After an operation means before the next one; the last one is followed by the process's end.
    kills = [(number, half) for number in range(len(operations)) for half in (False, True)]
    kills = [(number, half) for number, half in kills if not half or is_write(operations[number])]
    failures = []
    for number, half in kills:
        killed = server.run(folder, *FIT, kill_at=number, half=half)
        assert killed["status"] == -9, killed["output"]
        assert len(killed["operations"]) == number + 1, "the order of the writes has changed"
        if difference := resume_and_compare(server, folder, reference):
            failures.append(f"{operations[number]} ({number}{', half' if half else ''}): {difference}")
        shutil.rmtree(folder)
    print(f"{len(kills) - len(failures)} of {len(kills)} kills at writes end like the uninterrupted run")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(("mode", "kills"), [("disabled", 30), ("offline", 5)])
def test_a_kill_at_a_random_time_never_changes_the_run(
    server: Server, whole: tuple[Path, Answer], mode: str, kills: int
) -> None:
    reference, _ = whole
    folder = reference.parent.with_name("current")
    # Each process adds files of W&B, which tests/test_tracking_resume.py compares.
    ends_after = server.run(folder, *FIT, wandb_mode=mode)["seconds"]
    shutil.rmtree(folder)
    generator = random.Random(kills)
    failures, killed = [], 0
    for _ in range(3 * kills):
        # A run may be faster than the one that was timed, and end before it is killed.
        seconds = generator.uniform(0.05, ends_after)
        killed += server.run(folder, *FIT, seconds=seconds, wandb_mode=mode)["status"] == -9
        if difference := resume_and_compare(server, folder, reference, mode):
            failures.append(f"after {seconds:.3f} s: {difference}")
        shutil.rmtree(folder)
        if killed == kills:
            break
    print(f"{killed - len(failures)} of {killed} kills at random times ({mode}) end like it")
    assert killed == kills and not failures, "\n".join(failures)


def is_write(operation: str) -> bool:
    return operation.startswith("write ")


def resume_and_compare(server: Server, folder: Path, whole: Path, mode: str = "disabled") -> str | None:
    """Resume, and return the first difference from the uninterrupted run, if any."""
    has_state = (folder / RUN / "checkpoints" / "last.ckpt").exists()
    resume = ("--ckpt_path", "last") if has_state else ()
    resumed = server.run(folder, *FIT, *resume, wandb_mode=mode)
    if resumed["status"]:
        return f"resuming ends with status {resumed['status']}: {resumed['output'][-500:]}"
    run = folder / RUN
    if files(run) != files(whole):
        return f"files {sorted(files(run) ^ files(whole))} are only in one of the folders"
    for file, read in READERS.items():
        if not is_same(read(run / file), read(whole / file)):
            return f"{file} differs"
    return None


def files(folder: Path) -> set[str]:
    """Return the files and folders in a run's folder, without W&B's."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith("wandb")}


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows without timings."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: "" if key in TIMINGS and value else value for key, value in row.items()} for row in rows
    ]


def read_config(path: Path) -> str:
    """Read the settings without `ckpt_path`."""
    return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("ckpt_path"))


def read_checkpoint(path: Path) -> Any:
    """Read the whole state without the measured time: weights, optimizer, loops, callbacks."""
    state = torch.load(path, weights_only=True)
    state["callbacks"].pop(TrainingTime.__qualname__)
    return state


READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": read_config,
    "metrics.csv": read_table,
    "test.json": Path.read_text,
    "checkpoints/last.ckpt": read_checkpoint,
    "checkpoints/best.ckpt": read_checkpoint,
}


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)
