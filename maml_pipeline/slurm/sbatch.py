"""Calling sbatch with the job scripts of this repository and the settings of slurm/cluster.env."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from maml_pipeline.environment import child_environment
from maml_pipeline.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SCRIPTS = REPOSITORY / "slurm"
TRAIN_SCRIPT = SCRIPTS / "train.sbatch"
TRADEOFF_SCRIPT = SCRIPTS / "tradeoff.sbatch"
CLUSTER_ENV = SCRIPTS / "cluster.env"

# cluster.env may contain any shell code, so a shell reads it.
_SBATCH = 'set -a; source "$0"; exec sbatch "$@"'
_GPUS = 'set -a; source "$0"; printf "%s\\n%s" "${MAML_GPUS_PER_NODE:-1}" "${MAML_GPU_TYPE-}"'


def check_sbatch(needs_cluster: bool) -> None:
    """Check that jobs can be submitted from here.

    Args:
        needs_cluster: Whether sbatch will be called.

    Raises:
        UserError: There is no sbatch, or no job script.
    """
    if needs_cluster and not shutil.which("sbatch"):
        raise UserError("sbatch was not found; submit on a login node of a Slurm cluster")
    if not SCRIPTS.exists():
        raise UserError(f"{SCRIPTS} is missing; run maml from a checkout of its repository")


def cluster_gpus() -> tuple[str, str]:
    """Return the number of GPUs per node and their type, from cluster.env or the environment."""
    gpus_per_node, _, gpu_type = _run_with_cluster_env(_GPUS, []).partition("\n")
    return gpus_per_node, gpu_type


def submit_job(command: Sequence[str]) -> str:
    """Submit a job and return its id.

    Args:
        command: Flags of sbatch, the job script and its arguments.

    Raises:
        UserError: sbatch failed.
    """
    output = _run_with_cluster_env(_SBATCH, ["--parsable", *command])
    return output.strip().partition(";")[0]  # a federation appends the cluster's name


def print_dry_run(script: Path, *commands: Sequence[str]) -> None:
    """Print the shell commands that would be run, and the job script.

    Args:
        script: The job script.
        commands: As for `submit_job`.
    """
    print(f"source {shlex.quote(str(CLUSTER_ENV))}")
    print(f"export MAML_REPOSITORY={shlex.quote(str(REPOSITORY))}")
    for command in commands:
        print(shlex.join(["sbatch", *command]))
    print(f"\n# {script}\n{script.read_text()}", end="")


def _run_with_cluster_env(script: str, arguments: Sequence[str]) -> str:
    command = ["bash", "-c", script, str(CLUSTER_ENV), *arguments]
    environment = child_environment(MAML_REPOSITORY=str(REPOSITORY))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise UserError(lines[-1] if lines else "sbatch failed with no error output")
    return done.stdout
