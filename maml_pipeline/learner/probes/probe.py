"""What all probes share: when they measure, and where the figures go."""

import contextlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.tasks import TaskBatch

FIRST_PROBE_STEP = 10
"""By then compilers have compiled, caches are full and the optimiser has its state."""

WARM_UP_STEPS = 3
"""So many meta-steps fill caches and compile: in a run the first are not measured, in a process that
resumes it as many meta-gradients are computed and thrown away."""


class Probe(Callback):
    """Measures on probe steps: the tenth meta-step, and every multiple of `every`.

    A probe changes nothing that is trained: with it or without, the weights are the same to the bit.

    Args:
        every: Meta-steps between two measurements.
    """

    def __init__(self, every: int = 500) -> None:
        self.every = every
        self.steps_at_start = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where this process begins."""
        self.steps_at_start = trainer.global_step

    def is_probe_step(self, trainer: Trainer) -> bool:
        """Tell whether the current meta-step is measured, whichever process computes it."""
        number = trainer.global_step + 1
        is_due = number == FIRST_PROBE_STEP or number % self.every == 0
        return is_due and trainer.global_step >= WARM_UP_STEPS

    def is_warm(self, trainer: Trainer) -> bool:
        """Tell whether this process has computed enough meta-steps to be judged."""
        return self.missing_warm_up_steps(trainer) <= 0

    def missing_warm_up_steps(self, trainer: Trainer) -> int:
        """Return how many meta-steps this process lacks to be warm."""
        return WARM_UP_STEPS - (trainer.global_step - self.steps_at_start)

    def warm_up(self, trainer: Trainer, learner: MetaLearner, batch: TaskBatch) -> None:
        """Compute, in a process that has just begun, meta-gradients that change nothing."""
        for _ in range(self.missing_warm_up_steps(trainer)):
            throw_away_meta_gradient(trainer, learner, batch)

    def log_exactly(self, trainer: Trainer, figures: Mapping[str, float], meta_step: int) -> None:
        """Hand figures to every logger as they are: Lightning's own way rounds bytes to float32."""
        for logger in trainer.loggers:
            logger.log_metrics(dict(figures), step=meta_step)


def throw_away_meta_gradient(trainer: Trainer, learner: MetaLearner, batch: TaskBatch) -> None:
    """Compute the meta-gradient of a batch as the current meta-step does, and change nothing."""
    with (
        preserve_state(learner.network, learner.device),
        trainer.precision_plugin.forward_context(),
    ):
        learner.meta_gradient(batch)


@contextlib.contextmanager
def preserve_state(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what calling a network changes: its buffers, and the random state of every library."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    python, numpy = random.getstate(), np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(buffers[name])
