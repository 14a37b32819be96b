"""The memory probe: the peak memory of a meta-step, to the byte."""

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.profilers import PyTorchProfiler
from torch import Tensor

from maml_pipeline.errors import UserError
from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.learner.probes.probe import Probe
from maml_pipeline.meta_gradient.memory import PeakMeter
from maml_pipeline.tasks import TaskBatch


class MemoryProbe(Probe):
    """Log the memory held before a meta-step, and the peak of what the meta-step adds.

    The allocator's own figures, from the meta-step's first batch to the optimizer's update: exact and
    reproducible. With several devices, the largest figure is logged.

    Raises:
        UserError: Lightning's PyTorch profiler would run at the same time, on the CPU.
    """

    def __init__(self, every: int = 500) -> None:
        super().__init__(every)
        self._meter: PeakMeter | None = None
        self._last_logged: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reject a profiler that would run at the same time."""
        if isinstance(trainer.profiler, PyTorchProfiler) and pl_module.device.type == "cpu":  # type: ignore[attr-defined]
            raise UserError(
                "trainer.profiler is pytorch, which prevents measuring memory on the CPU: "
                "set probes.memory to false"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TaskBatch, batch_idx: int
    ) -> None:
        """Start measuring at the first batch of a probe step."""
        assert isinstance(pl_module, MetaLearner)
        if self._meter is None and self.is_probe_step(trainer.global_step):
            self.warm_up(trainer, pl_module, batch)
            self._measured_step = trainer.global_step
            self._meter = PeakMeter(pl_module.device)
            self._before = {
                "memory/parameters_bytes": _bytes(pl_module.state_dict().values()),
                # From the previous meta-step; none in a process that has just resumed the run.
                "memory/gradients_bytes": _bytes(p for p in pl_module.parameters() if p.requires_grad),
                "memory/optimizer_bytes": _bytes(
                    value
                    for optimizer in trainer.optimizers
                    for state in optimizer.state.values()
                    for value in state.values()
                    if isinstance(value, Tensor)
                ),
            }
            # Nothing older may be freed during the measurement: the CPU's allocator would not know its
            # size. So free the previous gradients now, and keep the values that Lightning replaces.
            pl_module.zero_grad()
            self._last_logged = dict(trainer.callback_metrics)
            pl_module.engine.forget_captures()
            self._meter.start()
        elif self._meter is not None:
            pl_module.engine.forget_captures()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop measuring after the optimizer's update."""
        if self._meter is None or trainer.global_step == self._measured_step:
            return
        peak, device = self._meter.stop(), self._meter.device
        self._last_logged = {}
        figures = self._before | {"memory/meta_step_peak_bytes": peak.requested}
        if device.type == "cuda":
            figures["memory/meta_step_peak_active_bytes"] = peak.active
        self._meter = None
        largest = trainer.strategy.reduce(
            torch.tensor([*figures.values()], device=device), reduce_op="max"
        )
        assert isinstance(largest, Tensor)
        self.log_exactly(trainer, dict(zip(figures, largest.tolist(), strict=True)), self._measured_step)

    def on_exception(self, trainer: Trainer, *args: Any) -> None:
        """Stop measuring; otherwise PyTorch's profiler would keep running."""
        if self._meter is not None:
            self._meter.stop()
            self._meter = None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
