"""What all probes share: when they measure, what they must not change, and logging."""

import contextlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.meta_gradient import InnerLoop, MetaGradient
from maml_pipeline.tasks import TaskBatch

FIRST_PROBE_STEP = 10
"""By then, caches are filled and the optimizer has its state."""

WARM_UP_STEPS = 3
"""Meta-steps that fill caches. A run does not measure its first ones; a process that resumes
a run computes as many meta-gradients and discards them."""


class Probe(Callback):
    """Measure in probe steps: the tenth meta-step, and every multiple of `every`.

    A probe does not change training: the weights with and without it are bitwise equal.

    Args:
        every: Meta-steps between two measurements.
    """

    def __init__(self, every: int = 500) -> None:
        self.every = every
        self.steps_at_start = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the meta-step at which this process starts."""
        self.steps_at_start = trainer.global_step

    def is_probe_step(self, meta_step: int) -> bool:
        """Tell whether a meta-step, counted from 0, is measured; the same in a resumed run."""
        number = meta_step + 1
        is_due = number == FIRST_PROBE_STEP or number % self.every == 0
        return is_due and meta_step >= WARM_UP_STEPS

    def missing_warm_up_steps(self, meta_step: int) -> int:
        """Return how many meta-steps this process lacks, at the given one, before it can be measured."""
        return WARM_UP_STEPS - (meta_step - self.steps_at_start)

    def warm_up(self, trainer: Trainer, learner: MetaLearner, batch: TaskBatch) -> None:
        """Compute and discard meta-gradients in a process that has just started."""
        for _ in range(self.missing_warm_up_steps(trainer.global_step)):
            discard_meta_gradient(trainer, learner, batch)

    def log_exactly(self, trainer: Trainer, figures: Mapping[str, float], meta_step: int) -> None:
        """Log figures to every logger directly; `LightningModule.log` would round bytes to float32."""
        for logger in trainer.loggers:
            logger.log_metrics(dict(figures), step=meta_step)


def discard_meta_gradient(trainer: Trainer, learner: MetaLearner, batch: TaskBatch) -> None:
    """Compute a batch's meta-gradient as the current meta-step does, without changing any state."""
    with (
        preserve_training_state(learner.network, learner.device),
        trainer.precision_plugin.forward_context(),
    ):
        learner.meta_gradient(batch)


def probe_meta_gradient(learner: MetaLearner, batch: TaskBatch, inner: InnerLoop) -> MetaGradient:
    """Compute a meta-gradient of either order with the run's engine.

    Args:
        learner: Gives the network, the loss and the engine.
        batch: T tasks.
        inner: The inner loop and gradient order.

    Raises:
        UserError: The network does not support this order.
    """
    learner.check_first_batch(batch)
    return learner.engine.meta_gradient(learner.network, learner.loss, batch, inner, learner.metric)


@contextlib.contextmanager
def preserve_training_state(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore what calling a network changes: its buffers, and the random state of all libraries."""
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
