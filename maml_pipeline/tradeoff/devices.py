"""Sharing the devices of this machine between cells that are trained side by side."""

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch

from maml_pipeline.environment import CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS, PARALLEL_CELLS
from maml_pipeline.errors import UserError
from maml_pipeline.slurm.allocation import AUTO_DEVICES
from maml_pipeline.text import counted

Parallel = int | Literal["auto"]
"""How many cells are trained side by side; `auto`: as many as there are GPUs, or one on CPUs."""


class DeviceShares:
    """What each of the cells gets that are trained side by side: a GPU of its own, and some CPU cores.

    Args:
        parallel: How many cells.
        trainer: The `trainer` of the config that they share.

    Raises:
        UserError: There are too few devices, or each cell needs more than one.
    """

    def __init__(self, parallel: Parallel, trainer: Mapping[str, Any]) -> None:
        gpus = visible_gpus() if uses_gpus(trainer) else []
        self.number = max(1, len(gpus)) if parallel == "auto" else parallel
        self.gpus = gpus[: self.number] if self.number > 1 else []
        cores = len(os.sched_getaffinity(0))
        self.threads = cores // self.number
        if self.number == 1:
            return
        _check_one_device(self.number, trainer)
        if uses_gpus(trainer) and self.number > len(gpus):
            raise UserError(
                f"parallel is {self.number}, but there {_are(len(gpus), 'visible GPU')}, and each cell "
                f"needs one; it must be at most {len(gpus)}"
            )
        if self.number > cores:
            raise UserError(
                f"parallel is {self.number}, but there {_are(cores, 'CPU core')} for this process; it "
                f"must be at most {cores}"
            )

    @property
    def environments(self) -> list[dict[str, str]]:
        """The environment variables of each of the cells."""
        shares = [{PARALLEL_CELLS.name: str(self.number)} for _ in range(self.number)]
        if self.number > 1 and not OMP_NUM_THREADS.is_set():
            # Each process would use all cores, and the cells would slow each other down.
            for share in shares:
                share[OMP_NUM_THREADS.name] = str(self.threads)
        for share, gpu in zip(shares, self.gpus, strict=False):
            share[CUDA_VISIBLE_DEVICES.name] = gpu
        return shares

    def __str__(self) -> str:
        threads = (
            f"{OMP_NUM_THREADS.name}={OMP_NUM_THREADS.get()}"
            if OMP_NUM_THREADS.is_set()
            else counted(self.threads, "CPU thread")
        )
        gpu = "a GPU of its own and " if self.gpus else ""
        return f"{self.number} side by side, each with {gpu}{threads}"


def uses_gpus(trainer: Mapping[str, Any]) -> bool:
    """Tell whether the `trainer` of a config trains on GPUs of this machine."""
    accelerator = trainer["accelerator"]
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES selects the GPUs that this process may use."""
    there, listed = torch.cuda.device_count(), CUDA_VISIBLE_DEVICES.get()
    if listed is None:
        return [str(number) for number in range(there)]
    names = [name.strip() for name in listed.split(",")]
    # Of several MIG instances, CUDA gives a process the first only. Of other devices, it ignores the
    # first that does not exist and all that follow.
    return names if names[0].startswith("MIG-") else names[:there]


def _check_one_device(parallel: int, trainer: Mapping[str, Any]) -> None:
    if trainer["num_nodes"] != 1:
        raise UserError(
            f"parallel is {parallel}, but trainer.num_nodes is {trainer['num_nodes']}; cells that run "
            "side by side train on this machine only: use `maml submit --tradeoff`"
        )
    if str(trainer["devices"]) not in ("1", *AUTO_DEVICES):
        raise UserError(
            f"parallel is {parallel}, but trainer.devices is {trainer['devices']}; cells that run side "
            "by side have one device each: set trainer.devices to 1"
        )


def _are(number: int, noun: str) -> str:
    return f"{'is' if number == 1 else 'are'} {counted(number, noun)}"
