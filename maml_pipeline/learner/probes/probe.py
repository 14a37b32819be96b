"""What all probes share: when they measure, and where the figures go."""

import contextlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

FIRST_PROBE_STEP = 10
"""By then compilers have compiled, caches are full and the optimiser has its state."""

WARM_UP_STEPS = 3
"""A resumed run compiles once more: so many meta-steps of a process are not measured."""


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
        """Tell whether the meta-step at hand is measured."""
        number = trainer.global_step + 1
        return self.is_warm(trainer) and (number == FIRST_PROBE_STEP or number % self.every == 0)

    def is_warm(self, trainer: Trainer) -> bool:
        """Tell whether this process has computed enough meta-steps to be judged."""
        return trainer.global_step - self.steps_at_start >= WARM_UP_STEPS

    def log_exactly(self, trainer: Trainer, figures: Mapping[str, float], meta_step: int) -> None:
        """Hand figures to every logger as they are: Lightning's own way rounds bytes to float32."""
        for logger in trainer.loggers:
            logger.log_metrics(dict(figures), step=meta_step)


@contextlib.contextmanager
def left_as_it_is(network: nn.Module, device: torch.device) -> Iterator[None]:
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
