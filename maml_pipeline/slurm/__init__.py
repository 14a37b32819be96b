"""Slurm: the current job, and the allocation that a new job requests."""

from maml_pipeline.slurm.job import (
    check_allocation,
    ids,
    is_restart,
    is_shell,
    job_id,
    requeue,
    starts_processes,
    tasks_per_node,
)

__all__ = [
    "check_allocation",
    "ids",
    "is_restart",
    "is_shell",
    "job_id",
    "requeue",
    "starts_processes",
    "tasks_per_node",
]
