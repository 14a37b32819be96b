"""Random numbers of the network, such as those of dropout, as a pure function of the meta-step."""

import random
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from maml_pipeline.tasks import Split
from maml_pipeline.tasks.task import SPLITS


class SeedRandomNumbers(Callback):
    """Seed every generator for each batch and each evaluation.

    As a task is a pure function of (seed, split, index), the random numbers of a batch are one of
    (seed, split, meta-step, batch of the meta-step, rank). A resumed run draws what one that never
    stopped does, whatever was drawn between (by validations, probes, data loaders), and without states
    of generators in its checkpoints. Ranks differ, so that dropout on one device is independent of
    dropout on the others. An evaluation draws the same each time.

    Seeding takes about 10 microseconds a batch on a CPU.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed one batch of a meta-step."""
        batch_of_step = batch_idx % trainer.accumulate_grad_batches
        self._seed(trainer, "train", trainer.global_step, batch_of_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed a validation: every one alike."""
        self._seed(trainer, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the test."""
        self._seed(trainer, "test")

    def _seed(self, trainer: Trainer, split: Split, meta_step: int = 0, batch: int = 0) -> None:
        seed_generators(self.seed, SPLITS.index(split), meta_step, batch, trainer.global_rank)


def seed_generators(*key: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, on the CPU and the current GPU.

    Args:
        key: Integers from 0 to 2^64 - 1 that determine the random numbers.
    """
    # Python mixes all bits of an integer, however long; the others take 32 or 64 bits.
    random.seed(sum(part << (64 * place) for place, part in enumerate(key)))
    np.random.seed(random.getrandbits(32))
    seed = random.getrandbits(64)
    # Not torch.manual_seed, which looks for every kind of device and takes ten times as long.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
