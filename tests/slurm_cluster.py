"""The local Slurm of scripts/local_slurm.sh, and jobs on it."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import CONFIGS

REPOSITORY = CONFIGS.parent
SCRIPT = REPOSITORY / "scripts" / "local_slurm.sh"


class Cluster:
    """A local Slurm cluster with two nodes.

    Args:
        state: A folder for its files, which must not exist yet.
        port: The first of three free ports.
    """

    def __init__(self, state: Path, port: int) -> None:
        self.state = state
        # Without the variables of a job that may run these tests.
        outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        self.environment = {
            **outside,
            "MAML_LOCAL_SLURM": str(state),
            "MAML_LOCAL_SLURM_PORT": str(port),
            "MAML_JOB_SCRIPTS": str(REPOSITORY / "slurm"),
            "MAML_PYTHON": sys.executable,
            "SLURM_CONF": str(state / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }

    def up(self) -> None:
        """Start it, or skip the tests with the reason."""
        done = self._script("up")
        if done.returncode:
            pytest.skip((done.stderr.strip().splitlines() or ["Slurm did not start"])[-1])

    def down(self) -> None:
        done = self._script("down")
        assert not done.returncode, done.stderr
        assert not self.state.exists()

    def _script(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), command], env=self.environment, capture_output=True, text=True
        )

    def run(self, folder: Path, *command: object, **variables: str) -> str:
        """Run a Slurm command in a folder and return its output."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=folder,
            env={**self.environment, "WANDB_MODE": "disabled", **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not done.returncode, done.stderr
        return done.stdout.strip()

    def train(self, folder: Path, flags: list[str], *arguments: object, **variables: str) -> str:
        """Submit slurm/train.sbatch from a folder, and return the job's id."""
        script = REPOSITORY / "slurm" / "train.sbatch"
        flags = ["--gpus-per-node=0", "--cpus-per-task=1", *flags]
        return self.run(folder, "sbatch", "--parsable", *flags, script, *arguments, **variables)

    def show(self, job: str) -> dict[str, str]:
        """Return Slurm's record of a job; for an array, of its first element."""
        words = self.run(self.state, "scontrol", "--oneliner", "show", "job", job).split("\n")[0]
        return dict(re.findall(r"(\w+)=(\S*)", words))

    def wait(self, *jobs: str, seconds: float = 150) -> dict[str, str]:
        """Wait until jobs have left the queue, and return the record of the last one."""
        wait_for(lambda: not self._queued(jobs), f"jobs {jobs} to end", seconds)
        return self.show(jobs[-1])

    def _queued(self, jobs: tuple[str, ...]) -> str:
        return self.run(self.state, "squeue", "--noheader", f"--jobs={','.join(jobs)}")

    def processes(self, job: str, node: str) -> list[int]:
        """Return the pids of a job's Python processes on a node."""
        table = self.run(self.state, "scontrol", "listpids", f"{job}.0", node)
        pids = [int(line.split()[0]) for line in table.splitlines()[1:]]
        return [pid for pid in pids if b"maml_pipeline" in command_line(pid)[1:4]]


def command_line(pid: int) -> list[bytes]:
    """Return the words of a process's command; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Poll until a condition holds, or fail after a time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports."""
    for first in range(17000, 30000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")
