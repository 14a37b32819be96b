"""The current Slurm job: its ids, its allocation, and requeueing it."""

import logging
import re
import signal
import subprocess

from maml_pipeline.environment import (
    SLURM_ARRAY_JOB_ID,
    SLURM_ARRAY_TASK_ID,
    SLURM_JOB_ID,
    SLURM_JOB_NAME,
    SLURM_LOCALID,
    SLURM_NNODES,
    SLURM_NODEID,
    SLURM_NTASKS,
    SLURM_NTASKS_PER_NODE,
    SLURM_PROCID,
    SLURM_RESTART_COUNT,
)
from maml_pipeline.errors import UserError
from maml_pipeline.signals import Stopped

logger = logging.getLogger(__name__)

ENDING = ("CANCELLED", "COMPLETING", "COMPLETED", "FAILED", "TIMEOUT")
"""States of a job that was cancelled or is ending, and must not be requeued.

slurm/launch.sh requeues the job of a killed process only if it is RUNNING: the process may have been
killed because the job is ending. `requeue` follows a signal that asks to save, which comes before that.
"""


def job_id() -> str | None:
    """Return the job's id, `<array>_<task>` for an element of a job array; `None` outside Slurm."""
    array, task = SLURM_ARRAY_JOB_ID.get(), SLURM_ARRAY_TASK_ID.get()
    return f"{array}_{task}" if array and task else SLURM_JOB_ID.get()


def ids() -> dict[str, str]:
    """Return the ids, name and restart count of the job, for the record of its run."""
    known = {
        "job_id": SLURM_JOB_ID.get(),
        "job_name": SLURM_JOB_NAME.get(),
        "array_job_id": SLURM_ARRAY_JOB_ID.get(),
        "array_task_id": SLURM_ARRAY_TASK_ID.get(),
        "restart_count": str(SLURM_RESTART_COUNT.get()) if SLURM_RESTART_COUNT.is_set() else None,
    }
    return {name: value for name, value in known.items() if value}


def is_restart() -> bool:
    """Tell whether this is a job that was requeued."""
    return job_id() is not None and SLURM_RESTART_COUNT.get() > 0


def is_shell() -> bool:
    """Tell whether this process runs in a job but was not started by `srun`.

    Lightning then starts the ranks. This is the case in the shell of `salloc`, in a shell opened by
    `srun --pty bash`, and in a batch script that calls the program without `srun`.
    """
    return SLURM_NTASKS.is_set() and not starts_processes()


def starts_processes() -> bool:
    """Tell whether `srun` started this process, as one task per device.

    Raises:
        UserError: Only some of the variables that `srun` sets are set, or one is not a number.
    """
    if SLURM_JOB_NAME.get() in ("bash", "interactive"):
        return False
    if not (SLURM_NTASKS.is_set() and SLURM_PROCID.is_set()):
        return False
    for variable in (SLURM_NTASKS, SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID):
        variable.require()
    for variable in (SLURM_NNODES, SLURM_NTASKS_PER_NODE):
        variable.get()
    return True


def check_allocation(devices: int, nodes: int) -> None:
    """Check that the configuration uses exactly the devices of the job.

    Otherwise the ranks would wait for each other forever.

    Args:
        devices: Devices per node in the configuration.
        nodes: Nodes in the configuration.

    Raises:
        UserError: The job has another number of tasks or nodes.
    """
    job_tasks, job_nodes = SLURM_NTASKS.require(), SLURM_NNODES.get()
    if (devices * nodes, nodes) != (job_tasks, job_nodes):
        raise UserError(
            f"trainer.devices is {devices} and trainer.num_nodes {nodes}, but the Slurm job has "
            f"{job_tasks} tasks on {job_nodes} nodes: request --nodes={nodes} "
            f"--ntasks-per-node={devices}, as `maml submit` does"
        )


def tasks_per_node() -> int:
    """Return the number of tasks that `srun` started on each node: one per device."""
    return SLURM_NTASKS.require() // SLURM_NNODES.get()


def requeue(stop: Stopped) -> bool:
    """Requeue this job, which ends it; learner/preemption.py describes the whole sequence.

    Args:
        stop: Why the process stops.

    Returns:
        Whether the job was requeued; `False` outside Slurm, for a job that is ending, if its state is
        unknown, and if another rank has failed, which would fail again.
    """
    job = job_id()
    state = None if job is None else _state(job)
    if job is None or state is None or state in ENDING or _another_rank_failed(job, stop):
        return False
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        logger.warning("Slurm job %s was not requeued: %s", job, error)
        return False
    if asked.returncode:
        logger.warning("Slurm job %s was not requeued: %s", job, asked.stderr.strip())
    return asked.returncode == 0


def _another_rank_failed(job: str, stop: Stopped) -> bool:
    """Tell whether `srun` ended this rank because another one had failed.

    It does so by SIGTERM, as does preemption. The ranks cannot agree to stop then.
    """
    if stop.signum != signal.SIGTERM or stop.by_all or SLURM_NTASKS.get() == 1:
        return False
    record = _ask(["scontrol", "--oneliner", "show", "job", job], job)
    return record is not None and re.search(r" PreemptTime=\d", record) is None


def _state(job: str) -> str | None:
    # squeue prints nothing for a job that it no longer knows.
    return _ask(["squeue", "--noheader", "--jobs", job, "--format", "%T"], job) or None


def _ask(command: list[str], job: str) -> str | None:
    """Return what a command of Slurm prints about a job."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("the state of Slurm job %s is unknown: %s", job, error)
        return None
