"""End a stopped command: requeue its Slurm job, or print how to resume and exit as the signal asks."""

import sys
from typing import NoReturn

import torch

from maml_pipeline import slurm
from maml_pipeline.environment import PARALLEL_CELLS, WANDB_SWEEP_ID
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.signals import Stopped


def leave_process_group() -> None:
    """Destroy the process group; otherwise gloo's threads abort the process on exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_stopped(stop: Stopped) -> NoReturn:
    """Requeue the Slurm job, or print how to resume; exit with the signal's status."""
    is_saved = stop.meta_steps is not None
    if not is_rank_zero():
        # Rank 0 reports for all ranks that agreed to stop: their parent would take another status for a
        # failure and kill rank 0. A rank that stops alone exits with the signal's status, so that its
        # parent ends the others.
        sys.exit(0 if stop.by_all else stop.exit_status)
    if is_saved:
        print(f"Stopped after meta-step {stop.meta_steps:,}; its state is saved", flush=True)
    else:
        name = "a signal" if stop.signum is None else stop.signum.name
        print(f"maml: stopped by {name}{stop.remark and ' '}{stop.remark}", file=sys.stderr)
    if _owns_job() and slurm.requeue(stop):
        then = "resumes from there" if is_saved else "starts again"
        print(f"Slurm job {slurm.job_id()} is requeued, and {then}", flush=True)
        sys.exit()
    if is_saved and stop.resume_command is not None:
        print(f"To resume: {stop.resume_command}")
    sys.exit(stop.exit_status)


def _owns_job() -> bool:
    """Tell whether the job must be requeued to resume this run.

    The job of a cell is requeued by its trade-off, once all cells have saved their state. That of a
    sweep's trial belongs to the sweep's agent, which goes on with another trial.
    """
    return not (PARALLEL_CELLS.is_set() or WANDB_SWEEP_ID.is_set())
