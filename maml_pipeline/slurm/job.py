"""Slurm, which is met here and in slurm/ alone: whose job this is, what it was given, its return."""

import logging
import os
import subprocess

from maml_pipeline.errors import UserError

logger = logging.getLogger(__name__)

ENDING = ("CANCELLED", "COMPLETING", "COMPLETED", "FAILED", "TIMEOUT")
"""States of a job that somebody, or its end, wants gone: it is not put back into the queue."""


def job_id() -> str | None:
    """Return the job's id, `<array>_<task>` for an element of an array; `None` outside of Slurm."""
    array, task = _variable("ARRAY_JOB_ID"), _variable("ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else _variable("JOB_ID")


def ids() -> dict[str, str]:
    """Return what tells the job apart, for its run's record: ids of job and array, and restarts."""
    names = ("JOB_ID", "JOB_NAME", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT")
    known = {name.lower(): _variable(name) for name in names}
    return {name: value for name, value in known.items() if value}


def is_restart() -> bool:
    """Tell whether the job was put back into the queue, and has started again."""
    return job_id() is not None and _number("RESTART_COUNT", default=0) > 0


def is_shell() -> bool:
    """Tell whether this is a job's shell, in which Lightning starts the processes and not `srun`.

    Such are the shell that `salloc` opens, whatever the job's name, one opened by `srun --pty bash`, and
    a batch script that calls the program without `srun`.
    """
    return "SLURM_NTASKS" in os.environ and not starts_processes()


def starts_processes() -> bool:
    """Tell whether `srun` started this process, one of a task each device.

    Raises:
        UserError: Only some of the variables that `srun` sets are there, or one is not a number.
    """
    if _variable("JOB_NAME") in ("bash", "interactive"):
        return False
    if _variable("NTASKS") is None or _variable("PROCID") is None:
        return False
    for name in ("NTASKS", "PROCID", "LOCALID", "NODEID"):
        _number(name)
    for name in ("NNODES", "NTASKS_PER_NODE"):
        _number(name, default=1)
    return True


def check_allocation(devices: int, nodes: int) -> None:
    """Refuse devices that are not those that the job was given.

    Args:
        devices: Devices of each node, by the configuration.
        nodes: Nodes, by the configuration.

    Raises:
        UserError: The job has another number of tasks or nodes. Processes would wait for each other
            without end.
    """
    job_tasks = _number("NTASKS")
    job_nodes = _number("NNODES", default=1)
    if (devices * nodes, nodes) != (job_tasks, job_nodes):
        raise UserError(
            f"trainer.devices is {devices} and trainer.num_nodes {nodes}, but the Slurm job has "
            f"{job_tasks} tasks on {job_nodes} nodes: ask for --nodes={nodes} "
            f"--ntasks-per-node={devices}, as `maml submit` does"
        )


def tasks_per_node() -> int:
    """Return how many tasks `srun` started on each node: one a device."""
    return _number("NTASKS") // _number("NNODES", default=1)


def _variable(name: str) -> str | None:
    """Return one of Slurm's variables; `None` where it is not set, or empty."""
    return os.environ.get(f"SLURM_{name}") or None


def _number(name: str, default: int | None = None) -> int:
    text = _variable(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit():
        raise UserError(
            f"SLURM_{name} is {'not set' if text is None else text}, where Slurm sets a whole number; "
            "start with srun or sbatch, or unset the SLURM_ variables"
        )
    return int(text)


def requeue() -> bool:
    """Put this job back into the queue, which ends it here.

    Returns:
        Whether that was done; not where there is no job, or where it is being cancelled.
    """
    job = job_id()
    if job is None or _state(job) in ENDING:
        return False
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if asked.returncode:
        logger.warning("Slurm job %s is not requeued: %s", job, asked.stderr.strip())
    return asked.returncode == 0


def _state(job: str) -> str:
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("the state of Slurm job %s is not known: %s", job, error)
        return "COMPLETED"
