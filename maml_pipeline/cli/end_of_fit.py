"""What `maml fit` prints after its test: how long it took, where the run is, and what to type next."""

import json
import shlex
from pathlib import Path

from maml_pipeline import slurm
from maml_pipeline.cli import elapsed
from maml_pipeline.learner.training_time import TrainingTime
from maml_pipeline.text import duration, printable


def print_end(folder: Path, time: TrainingTime) -> None:
    """Print the times and the folder of a run, and outside Slurm what to type next.

    Args:
        folder: The run's folder.
        time: Its time of training.
    """
    total, trained = duration(elapsed.seconds()), duration(time.seconds)
    if not time.has_trained:
        took = f"Nothing was left to train; this start took {total}"
    elif not time.is_complete:
        took = f"This training took {trained}, {total} with start and test"
    elif time.starts == 1:
        took = f"Training took {trained}, {total} with start and test"
    else:
        took = f"Training took {trained} in {time.starts} starts, this one {total} in all"
    print(f"{took}; results are in {printable(folder)}")
    if slurm.job_id() is None:
        for line in next_commands(folder):
            print(line)


def next_commands(folder: Path) -> list[str]:
    """Return what can be done with a trained run, ready to be typed."""
    # A name that begins with a dash would be taken for an option.
    path = f"./{folder}" if str(folder).startswith("-") else str(folder)
    commands = (["maml", "report", path], ["maml", "export", path, "net.safetensors"])
    report, export = (printable(shlex.join(command)) for command in commands)
    python = f"MetaLearner.from_run({json.dumps(path, ensure_ascii=False)})"
    return [f"Next: {report}", f"      {export}", f"      {printable(python)}  # in Python"]
