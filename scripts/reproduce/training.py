"""What the scripts of this folder train: trade-offs of `maml`, with their origin."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from maml_pipeline import run_folder
from maml_pipeline.files import write_atomically
from maml_pipeline.learner.tracking.description import device_name, git_state

INNER_LR = "model.inner_lr"

ORIGIN = "origin.json"
"""In the folder of a trade-off: when, where and from which commit it was trained."""


@dataclass(frozen=True)
class Training:
    """A trade-off whose rows stand in a table, perhaps with a search before it.

    Args:
        name: Of its folder.
        task: In the first column.
        methods: Label of each order that is trained.
        flags: Of `maml tradeoff`, without orders and folder.
        search: Further flags of a shorter trade-off that chooses the values of the keys that it varies,
            for each order; without any there is no search.
        final: Further flags of the trade-off itself.
        tiny: Further flags of both that make them as short as possible.
        published: Results in print of each label, by number of inner steps.
        threads: PyTorch's threads in each process, except for the search: two cells at a time share
            two cores there.
    """

    name: str
    task: str
    methods: Mapping[str, str]
    flags: Sequence[str]
    search: Sequence[str] = ()
    final: Sequence[str] = ()
    tiny: Sequence[str] = ()
    published: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    threads: int = 1

    def search_command(self, runs: Path, tiny: bool = False) -> list[str]:
        """Return the command of the search after `maml`; empty if there is none."""
        # The test results of the search are not used.
        short = ("--seeds=0", "--parallel=2", "--data.test_tasks=10")
        flags = (*self.search, *short, f"--out={self.search_folder(runs)}")
        return self._command(flags, tiny) if self.search else []

    def command(self, runs: Path, tiny: bool = False) -> list[str]:
        """Return the command of the trade-off itself after `maml`."""
        best = (f"--best_of={self.search_folder(runs)}",) if self.search else ()
        return self._command((*best, *self.final, f"--out={runs / self.name}"), tiny)

    def search_folder(self, runs: Path) -> Path:
        """Return the folder of the search."""
        return runs / f"{self.name}-search"

    def _command(self, flags: Sequence[str], tiny: bool) -> list[str]:
        orders = f"--orders={','.join(self.methods)}"
        return ["tradeoff", *self.flags, orders, *flags, *(self.tiny if tiny else ())]

    def train(self, runs: Path, tiny: bool = False) -> None:
        """Train what is not finished; what was stopped resumes."""
        # A run may diverge; the table tells how many seeds did.
        if search := self.search_command(runs, tiny):
            run_maml(search, threads=1, check=False)
        status = run_maml(self.command(runs, tiny), self.threads, check=False)
        if status and not (runs / self.name / run_folder.TRADEOFF).exists():
            sys.exit(status)
        write_origin(runs / self.name, self.threads)

    def is_finished(self, runs: Path) -> bool:
        """Tell whether there are results."""
        return (runs / self.name / ORIGIN).exists()


def run_maml(arguments: Sequence[str], threads: int, check: bool = True) -> int:
    """Run `maml` in a process of its own, and show the command.

    Args:
        arguments: After `maml`.
        threads: PyTorch's threads.
        check: Exit with its status if it fails.

    Returns:
        Its exit status.
    """
    print("maml", *arguments, flush=True)
    command = [sys.executable, "-m", "maml_pipeline", *arguments]
    status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if check and status:
        sys.exit(status)
    return status


def write_origin(folder: Path, threads: int) -> None:
    """Write down where a trade-off was trained, unless that is known from when it was first finished."""
    if not (folder / ORIGIN).exists():
        found = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "cores": len(os.sched_getaffinity(0)),
            "threads": threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": (git_state(Path(__file__).parent) or {}).get("commit"),
        }
        write_atomically(folder / ORIGIN, json.dumps(found, indent=1) + "\n")


def read_origin(folder: Path) -> dict[str, Any]:
    """Return what `write_origin` wrote."""
    return dict(json.loads((folder / ORIGIN).read_text()))
