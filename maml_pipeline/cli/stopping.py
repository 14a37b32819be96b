"""How a stopped run ends: requeued by Slurm, or with a hint and the signal's exit status."""

import signal
import sys
from typing import NoReturn

import torch

from maml_pipeline.cli.terminal import is_rank_zero
from maml_pipeline.learner import slurm
from maml_pipeline.learner.preemption import Stopped


def leave_process_group() -> None:
    """Leave the other ranks in order; gloo's threads abort a process that ends without."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_stopped(stop: Stopped) -> NoReturn:
    """Put a job of Slurm back into its queue; elsewhere say how to go on, and exit as signals do."""
    if is_rank_zero():
        print(f"Stopped after meta-step {stop.meta_steps:,}; its state is saved", flush=True)
    if is_rank_zero() and slurm.requeue():
        print(f"Slurm job {slurm.job_id()} is requeued, and will go on from there", flush=True)
        sys.exit()
    if slurm.job_id() is not None:
        sys.exit()
    if is_rank_zero() and stop.resume_command is not None:
        print(f"To resume: {stop.resume_command}")
    sys.exit(128 + (stop.signum or signal.SIGTERM))
