"""How a stopped command ends: requeued by Slurm, or with a hint and the signal's exit status."""

import sys
from typing import NoReturn

import torch

from maml_pipeline import slurm
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.signals import Stopped


def leave_process_group() -> None:
    """Leave the other ranks in order; gloo's threads abort a process that ends without."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_stopped(stop: Stopped) -> NoReturn:
    """Put a job of Slurm back into its queue; elsewhere say how to resume, and exit as signals do."""
    is_saved = stop.meta_steps is not None
    if not is_rank_zero():
        # Rank 0 speaks for all that have agreed to stop; the others' parent would take another status
        # for a failure, and kill rank 0. A rank that stops alone ends the others that way.
        sys.exit(0 if stop.by_all else stop.exit_status)
    if is_saved:
        print(f"Stopped after meta-step {stop.meta_steps:,}; its state is saved", flush=True)
    else:
        name = "a signal" if stop.signum is None else stop.signum.name
        print(f"maml: stopped by {name}{stop.remark and ' '}{stop.remark}", file=sys.stderr)
    if slurm.requeue():
        print(f"Slurm job {slurm.job_id()} is requeued, and will resume from there", flush=True)
        sys.exit()
    if is_saved and slurm.job_id() is None and stop.resume_command is not None:
        print(f"To resume: {stop.resume_command}")
    sys.exit(stop.exit_status)
