"""The speed probe: the time and the FLOPs of a meta-step."""

import statistics
import time
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

from maml_pipeline.environment import PARALLEL_CELLS
from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.learner.probes.probe import (
    WARM_UP_STEPS,
    Probe,
    discard_meta_gradient,
    preserve_training_state,
)
from maml_pipeline.tasks import TaskBatch

Instant = float | torch.cuda.Event


class SpeedProbe(Probe):
    """Log the median time of the meta-steps since the last probe step, and their FLOPs.

    A meta-step is timed from its first batch, which is already drawn, to the optimizer's update: with
    the clock on the CPU, and with CUDA events on a GPU, which need no synchronisation until they are
    read. If the gradient order changes, only meta-steps of the new one count. If no meta-step was timed,
    because the process has just resumed the run or every meta-step is a probe step, meta-gradients of
    the batch are timed instead, without the update. FLOPs are those of matrix products and convolutions,
    counted once per gradient order.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear all measurements."""
        super().on_train_start(trainer, pl_module)
        self._spans: list[tuple[Instant, Instant]] = []
        self._flops: dict[bool, int] = {}
        self._started: tuple[int, Instant] | None = None
        self._times_first_order = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TaskBatch, batch_idx: int
    ) -> None:
        """Log in a probe step; start the clock in any other."""
        assert isinstance(pl_module, MetaLearner)
        step = trainer.global_step
        if self._started is not None and self._started[0] == step:
            return  # a later batch of the same meta-step
        if (order := pl_module.takes_first_order()) is not self._times_first_order:
            # The FLOPs of a meta-step are those of its order, and so must its time be.
            self._spans.clear()
            self._times_first_order = order
        if self.is_probe_step(step):
            # Not timed: probes slow it down.
            self._started = None
            if not self._spans:
                self._spans = self._time_meta_gradients(trainer, pl_module, batch)
            self._log_speed(trainer, pl_module, batch)
        elif self.missing_warm_up_steps(step) <= 0:
            self._started = step, _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Stop the clock after the optimizer's update."""
        if self._started is not None and trainer.global_step > self._started[0]:
            self._spans.append((self._started[1], _now(pl_module.device)))
            self._started = None

    def _time_meta_gradients(
        self, trainer: Trainer, learner: MetaLearner, batch: TaskBatch
    ) -> list[tuple[Instant, Instant]]:
        self.warm_up(trainer, learner, batch)
        spans = []
        for _ in range(WARM_UP_STEPS):
            started = _now(learner.device)
            for _ in range(trainer.accumulate_grad_batches):
                discard_meta_gradient(trainer, learner, batch)
            spans.append((started, _now(learner.device)))
        return spans

    def _log_speed(self, trainer: Trainer, learner: MetaLearner, batch: TaskBatch) -> None:
        seconds = statistics.median(_seconds(start, end) for start, end in self._spans)
        self._spans.clear()
        order = learner.takes_first_order()
        batches = trainer.accumulate_grad_batches * trainer.world_size
        if order not in self._flops:
            self._flops[order] = _count_flops(trainer, learner, batch) * batches
        figures = {
            "speed/meta_step_ms": seconds * 1e3,
            "speed/tasks_per_second": len(batch.support_x) * batches / seconds,
            "speed/meta_step_flops": self._flops[order],
            "speed/flops_per_second": self._flops[order] / seconds,
        }
        if (cells := PARALLEL_CELLS.get() or 1) > 1:
            figures["speed/parallel_cells"] = cells
        self.log_exactly(trainer, figures, trainer.global_step)


def _now(device: torch.device) -> Instant:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(start: Instant, end: Instant) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    assert not isinstance(end, torch.cuda.Event)
    return end - start


def _count_flops(trainer: Trainer, learner: MetaLearner, batch: TaskBatch) -> int:
    with preserve_training_state(learner.network, learner.device):
        return learner.engine.flops(learner.network, learner.loss, batch, learner.inner_loop())
