"""The order-gap probe: how much the first-order meta-gradient differs from the second-order one."""

import logging
import math

import torch
from pytorch_lightning import LightningModule, Trainer

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import Method
from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.learner.probes.probe import Probe, preserve_training_state, probe_meta_gradient
from maml_pipeline.meta_gradient.inner_loop import Parameters
from maml_pipeline.meta_gradient.order_gap import OrderGap, order_gaps
from maml_pipeline.tasks import TaskBatch

logger = logging.getLogger(__name__)


class OrderGapProbe(Probe):
    """Log the cosine, norm ratio and relative error of first order against second order.

    With the method `hessian_free`, log those of its meta-gradient as well, as `hessian_free_gap`.

    Both meta-gradients are computed with the parameters and tasks of the probe step, so that
    they differ only in their order; second order checkpoints inner steps to save memory. With several
    devices, the mean meta-gradients are compared. If second order is not possible, because of the
    network or for lack of memory, the probe warns once and stays off.
    """

    def __init__(self, every: int = 500) -> None:
        super().__init__(every)
        self._probed_step = -1
        self._is_off = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TaskBatch, batch_idx: int
    ) -> None:
        """Compare on the first batch of a probe step."""
        assert isinstance(pl_module, MetaLearner)
        step = trainer.global_step
        if self._is_off or step == self._probed_step or not self.is_probe_step(step):
            return
        self._probed_step = step  # its later batches are not compared
        gradients, reason = _both_or_why_not(trainer, pl_module, batch)
        # One device may lack memory where the others do not: either all compare, or none.
        if trainer.strategy.reduce_boolean_decision(gradients is None, all=False) or gradients is None:
            self._is_off = True
            logger.warning("order_gap is not measured: %s", reason or "it failed on another device")
            return
        first, second, free = gradients
        second = _mean(trainer, second)
        figures = _figures("order_gap", order_gaps(_mean(trainer, first), second))
        if free is not None:
            figures |= _figures("hessian_free_gap", {"": order_gaps(_mean(trainer, free), second)[""]})
        self.log_exactly(trainer, figures, step)


def _both_or_why_not(
    trainer: Trainer, learner: MetaLearner, batch: TaskBatch
) -> tuple[tuple[Parameters, Parameters, Parameters | None] | None, str]:
    try:
        with (
            preserve_training_state(learner.network, learner.device),
            trainer.precision_plugin.forward_context(),
        ):
            return (*both_orders(learner, batch), _hessian_free(learner, batch)), ""
    except (UserError, torch.OutOfMemoryError) as error:
        return None, str(error).splitlines()[0]


def both_orders(learner: MetaLearner, batch: TaskBatch) -> tuple[Parameters, Parameters]:
    """Compute the first- and the second-order meta-gradient of a batch."""
    inner = learner.inner_loop()
    return (
        probe_meta_gradient(learner, batch, inner.in_first_order()).gradient,
        probe_meta_gradient(learner, batch, inner.in_second_order(Method.CHECKPOINTED)).gradient,
    )


def _hessian_free(learner: MetaLearner, batch: TaskBatch) -> Parameters | None:
    """Compute the Hessian-free meta-gradient of all inner steps in a run with this method."""
    inner = learner.inner_loop()
    if inner.is_first_order or inner.method is not Method.HESSIAN_FREE:
        return None
    all_steps = inner.in_second_order(Method.HESSIAN_FREE)
    return probe_meta_gradient(learner, batch, all_steps).gradient


def _mean(trainer: Trainer, gradient: Parameters) -> Parameters:
    """Return the mean over devices, each of which has an equal share of the tasks."""
    reduced = {name: trainer.strategy.reduce(g, reduce_op="mean") for name, g in gradient.items()}
    return {name: g for name, g in reduced.items() if isinstance(g, torch.Tensor)}


def _figures(prefix: str, gaps: dict[str, OrderGap]) -> dict[str, float]:
    return {
        f"{prefix}/{measure}" + (f"/{layer}" if layer else ""): value
        for layer, gap in gaps.items()
        for measure, value in gap._asdict().items()
        if math.isfinite(value)
    }
