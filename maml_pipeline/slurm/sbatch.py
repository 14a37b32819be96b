"""Calling sbatch with the job scripts of the package and the settings of cluster.env."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_config_path

from maml_pipeline.environment import CLUSTER_ENV, JOB_SCRIPTS, PYTHON, child_environment
from maml_pipeline.errors import UserError
from maml_pipeline.shipped_files import SHIPPED

SCRIPTS = SHIPPED / "slurm"
TRAIN_SCRIPT = SCRIPTS / "train.sbatch"
TRADEOFF_SCRIPT = SCRIPTS / "tradeoff.sbatch"

# cluster.env may contain any shell code, so a shell reads it; what it prints is no answer.
_SBATCH = 'set -a; source "$0" >&2; exec sbatch "$@"'
_GPUS = 'set -a; source "$0" >&2; printf "%s\\n%s" "${MAML_GPUS_PER_NODE:-1}" "${MAML_GPU_TYPE-}"'


def check_sbatch(needs_cluster: bool) -> None:
    """Check that jobs can be submitted from here.

    Args:
        needs_cluster: Whether sbatch will be called.

    Raises:
        UserError: There is no sbatch, or MAML_CLUSTER_ENV names no file.
    """
    if needs_cluster and not shutil.which("sbatch"):
        raise UserError("sbatch was not found; submit on a login node of a Slurm cluster")
    cluster_env()


def cluster_env() -> Path:
    """Return the file with the settings of the cluster.

    Raises:
        UserError: MAML_CLUSTER_ENV names no file.
    """
    if (named := CLUSTER_ENV.get()) is not None:
        if not named.is_file():
            raise UserError(
                f"environment variable {CLUSTER_ENV.name} is {named}, which is not a file; it must name "
                f"a copy of {SCRIPTS / 'cluster.env'}"
            )
        return named.absolute()
    users = user_config_path("maml_pipeline") / "cluster.env"
    return users if users.is_file() else SCRIPTS / "cluster.env"


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
    print(f"source {shlex.quote(str(cluster_env()))}")
    for name, value in _for_job().items():
        print(f"export {name}={shlex.quote(value)}")
    for command in commands:
        print(shlex.join(["sbatch", *command]))
    print(f"\n# {script}\n{script.read_text()}", end="")


def _run_with_cluster_env(script: str, arguments: Sequence[str]) -> str:
    command = ["bash", "-c", script, str(cluster_env()), *arguments]
    environment = child_environment(**_for_job())
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise UserError(lines[-1] if lines else "sbatch failed with no error output")
    return done.stdout


def _for_job() -> dict[str, str]:
    """Return the variables by which a job finds its scripts, its settings and this `maml`."""
    return {
        JOB_SCRIPTS.name: str(SCRIPTS),
        CLUSTER_ENV.name: str(cluster_env()),
        PYTHON.name: sys.executable,
    }
