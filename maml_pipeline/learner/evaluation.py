"""Validation and test: adapt to each task and average its query measures over tasks and devices."""

from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from maml_pipeline.learner.adaptation import adapted_network
from maml_pipeline.learner.lightning_internals import CURRENT_HOOK, skip_empty_hooks
from maml_pipeline.learner.measures import measure_name
from maml_pipeline.learner.outer_optimizer import step_plateau_schedulers
from maml_pipeline.limits import check_whole
from maml_pipeline.meta_gradient import Engine, InnerLoop, Loss
from maml_pipeline.meta_gradient.inner_loop import check_finite
from maml_pipeline.tasks import TaskBatch


class EvaluatedByAdaptation(LightningModule):
    """A LightningModule that validates and tests a network by adapting it to each task.

    Logs, for every measure m and split s, the mean over tasks after the last inner step as `s/m`, after
    inner step k as `s/m_step_k`, and the half-width of its 95 % confidence interval as `..._ci95`.

    Args:
        network: Maps inputs `(S, ...)` to predictions `(S, ...)`.
        loss: (prediction, target) -> scalar, minimised by the inner loop.
        metric: A second measure, reported beside the loss.
    """

    engine: Engine
    """Computes the curves of the measures."""
    eval_inner: InnerLoop
    """Inner steps and inner learning rate of an evaluation."""
    transductive: bool
    """Whether a query set is predicted as one batch."""

    def __init__(self, network: nn.Module, loss: Loss, metric: Loss | None) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.metric = metric
        self.measures: dict[str, Loss] = {"loss": loss}
        if metric is not None:
            self.measures[measure_name(metric)] = metric
        self._curves: dict[str, list[Tensor]] = {}
        self._evaluated: dict[str, float] = {}
        skip_empty_hooks([self])

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; at once if it is Lightning's note of the current hook.

        PyTorch first finds out whether a value is a parameter, a buffer or a module, which for this one
        would take a noticeable part of a short meta-step.
        """
        if name == CURRENT_HOOK:
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    # One task ------------------------------------------------------------------------------------

    def adapt(
        self,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int | None = None,
        inner_lr: float | None = None,
    ) -> nn.Module:
        """Adapt to the support set of one task; the learner is left unchanged.

        On a CPU, the adapted network predicts a query set bit for bit as `maml test` does after the last
        inner step, except where PyTorch has another kernel for calls without gradients (attention).
        Works under `torch.no_grad` and `torch.inference_mode`.

        Args:
            support_x: Inputs `(S, ...)` of the S support points; moved to the learner's device.
            support_y: Targets `(S, ...)`; moved as well.
            steps: Inner steps; `None` for `eval_inner_steps`.
            inner_lr: Inner learning rate of all parameters and steps; `None` for the learner's own, or
                its learned ones.

        Returns:
            A copy of the network with the adapted parameters, in evaluation mode and on the learner's
            device, which maps query inputs `(Q, ...)` to predictions `(Q, ...)`. With
            `transductive=False`, a `NonTransductive` module that holds it and the support set.

        Raises:
            UserError: The support set does not fit the network or the loss, or the loss diverges.

        References:
            Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
            2017, section 2.2.
        """
        if steps is not None:
            check_whole("steps", steps, 0)
        inner = self.evaluation_loop()
        if steps is not None:
            inner = replace(inner, steps=steps)
        if inner_lr is not None:
            inner = replace(inner, lr=inner_lr, rates=None)
        return adapted_network(
            self.network, self.engine, self.loss, support_x, support_y, inner, self.transductive
        )

    def evaluation_loop(self) -> InnerLoop:
        """Return the inner loop of an evaluation."""
        return self.eval_inner

    # Lightning's hooks ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Discard the curves of an earlier evaluation."""
        self._clear_curves()

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt to each task and keep its query measures after every inner step."""
        self._evaluate(batch, "validation after")

    def on_validation_epoch_end(self) -> None:
        """Log the mean and confidence interval of every measure, and step ReduceLROnPlateau."""
        self._log_curves("val")
        step_plateau_schedulers(self.trainer, self._evaluated)

    def on_test_epoch_start(self) -> None:
        """Discard the curves of an earlier evaluation."""
        self._clear_curves()

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt to each task and keep its query measures after every inner step."""
        self._evaluate(batch, "test after")

    def on_test_epoch_end(self) -> None:
        """Log the mean and confidence interval of every measure."""
        self._log_curves("test")

    # What is logged ------------------------------------------------------------------------------

    def evaluation_names(self, split: str) -> list[str]:
        """Return the names that an evaluation of `split` logs."""
        steps = [f"_step_{step}" for step in range(self.eval_inner.steps + 1)]
        measures = [f"{split}/{name}{step}" for name in self.measures for step in ("", *steps)]
        return [f"{measure}{suffix}" for measure in measures for suffix in ("", "_ci95")]

    # How -----------------------------------------------------------------------------------------

    def check_first_batch(self, batch: TaskBatch) -> None:
        """Do nothing; `MetaLearner` overrides this to check network and measures on the first batch."""

    def _clear_curves(self) -> None:
        # A dtype that all devices choose alike, including devices without a task.
        dtype = torch.promote_types(torch.float32, next(self.network.parameters()).dtype)
        no_task = torch.empty(0, self.eval_inner.steps + 1, dtype=dtype, device=self.device)
        self._curves = {name: [no_task] for name in self.measures}

    def _evaluate(self, batch: TaskBatch, when: str) -> None:
        if len(batch.support_x) == 0:
            return  # fewer tasks than devices, and none for this one
        self.check_first_batch(batch)
        curves = self.engine.adaptation_curves(
            self.network, self.measures, self.loss, batch, self.evaluation_loop(), self.transductive
        )
        self._reset_metric()
        check_finite(curves["loss"], self.eval_inner.lr, f"the {when} meta-step {self.global_step}")
        for name, curve in curves.items():
            self._curves[name].append(curve.to(self._curves[name][0].dtype))

    def _reset_metric(self) -> None:
        """Clear the state that a torchmetrics metric accumulates; the mean over tasks is taken here."""
        if isinstance(self.metric, Metric):
            self.metric.reset()

    def _log_curves(self, split: str) -> None:
        for name, batches in self._curves.items():
            curves = _gather_tasks(torch.cat(batches))  # (T, k + 1)
            mean = curves.mean(dim=0)
            # Normal approximation; a single task has no spread.
            ci95 = 1.96 * curves.std(dim=0) / len(curves) ** 0.5 if len(curves) > 1 else mean * 0
            for step in range(len(mean)):
                self._log_equal(f"{split}/{name}_step_{step}", mean[step])
                self._log_equal(f"{split}/{name}_step_{step}_ci95", ci95[step])
            self._log_equal(f"{split}/{name}", mean[-1], prog_bar=split == "val")
            self._log_equal(f"{split}/{name}_ci95", ci95[-1])

    def _log_equal(self, name: str, value: Tensor, prog_bar: bool = False) -> None:
        """Log a value that is already equal on every device; the maximum of equal values is exact."""
        self._evaluated[name] = value.item()
        self.log(name, value, prog_bar=prog_bar, reduce_fx="max", sync_dist=True)


def _gather_tasks(curves: Tensor) -> Tensor:
    """Concatenate the curves of all devices, which may have measured different numbers of tasks."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.cat(gather_all_tensors(curves)) if is_distributed else curves
