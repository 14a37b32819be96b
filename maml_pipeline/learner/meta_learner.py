"""MetaLearner: MAML with either gradient order as a LightningModule."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from maml_pipeline.errors import UserError
from maml_pipeline.learner.compatibility import check_compatibility, check_measures, measure_name
from maml_pipeline.learner.loss_with_gradient import LossWithGradient
from maml_pipeline.meta_gradient import (
    Engine,
    InnerLoop,
    Loss,
    MetaGradient,
    build_engine,
    initialise_lazy,
)
from maml_pipeline.meta_gradient.inner_loop import check_finite, trainable_parameters
from maml_pipeline.meta_gradient.torch_internals import is_missing_derivative_error
from maml_pipeline.tasks import Task, TaskBatch
from maml_pipeline.tasks.task import check_at_least


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the share of right answers: logits `(S, ways)`, labels `(S,)` -> scalar in [0, 1]."""
    return (logits.argmax(dim=-1) == labels).float().mean()


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Build Adam with the paper's outer learning rate, 1e-3, as one kernel."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


class MetaLearner(LightningModule):
    """Meta-learn the initial parameters of any network with first- or second-order MAML.

    Args:
        network: Maps inputs `(S, ...)` to predictions `(S, ...)`; its parameters are meta-learned.
        loss: (prediction, target) -> scalar, on support and query sets alike: a function such as
            `torch.nn.functional.mse_loss`, or an instance of a class such as `torch.nn.HuberLoss`, by
            `class_path` and `init_args`.
        inner_lr: Inner learning rate alpha.
        inner_steps: Inner steps k while training.
        eval_inner_steps: Inner steps while validating and testing; `None` for `inner_steps`.
        transductive: Validate and test with query sets that are predicted as one batch, in which batch
            normalisation lets their points see each other, as in the MAML paper; `False` predicts
            each query point by itself, normalised together with the support set. Training is
            transductive in any case.
        first_order: `True` for first-order meta-gradients (FOMAML), `False` for second-order (MAML).
        first_order_steps: Take first-order meta-gradients in the first so many meta-steps, whatever
            `first_order` says of those after them (derivative-order annealing).
        engine: `"learn2learn"` adapts one task after another; `"vectorized"` adapts them all at once,
            which gains most for small networks, and runs fewer modules. Both give the same
            meta-gradient, and refuse what they cannot run exactly.
        tasks_per_chunk: For `"vectorized"`: how many tasks to adapt at once, which bounds memory;
            `"auto"` for as many as fit, `None` for all.
        checkpoint_inner_steps: Second order in little memory: recompute inner steps instead of
            keeping their graphs. First order keeps none in any case.
        compile: For `"vectorized"`: compile the meta-gradient with `torch.compile`, which takes up
            to minutes before the first meta-step.
        metric: A second measure beside the loss, given like it and logged under its name, such as
            `maml_pipeline.learner.accuracy`.
        optimizer: Builds the outer optimiser from the parameters; Adam with 1e-3 by default.
        lr_scheduler: Builds a schedule of the outer learning rate, stepped once per meta-step;
            ReduceLROnPlateau once per validation, whose `monitor` is by default `val/loss`.

    Raises:
        UserError: A setting is out of its range, or is not one of this engine's.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, algorithm 1; Antoniou, Edwards, Storkey, "How to train your MAML", 2019, section 4
        (derivative-order annealing); Nichol, Achiam, Schulman, "On First-Order Meta-Learning
        Algorithms", 2018, section 6.1 (transduction).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: Callable[..., Any],
        inner_lr: float,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        transductive: bool = True,
        first_order: bool = False,
        first_order_steps: NonNegativeInt = 0,
        engine: Literal["learn2learn", "vectorized"] = "learn2learn",
        tasks_per_chunk: PositiveInt | Literal["auto"] | None = None,
        checkpoint_inner_steps: bool = False,
        compile: bool = False,
        metric: Callable[..., Any] | None = None,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if not trainable_parameters(network):
            raise UserError(
                f"network {type(network).__name__} has no parameter that requires a gradient"
            )
        check_measures(loss, metric)
        self.network = network
        self.loss = loss
        self.metric = metric
        check_at_least("first_order_steps", first_order_steps, 0)
        self.first_order_steps = first_order_steps
        self.inner = InnerLoop(inner_lr, inner_steps, first_order, checkpoint_inner_steps)
        self.engine = build_engine(engine, tasks_per_chunk, compile)
        self._uncompiled_engine = build_engine(engine, tasks_per_chunk) if compile else self.engine
        if eval_inner_steps is not None and eval_inner_steps < 0:
            raise UserError(f"eval_inner_steps is {eval_inner_steps}; it must be 0 or more")
        self.eval_inner = InnerLoop(
            inner_lr, inner_steps if eval_inner_steps is None else eval_inner_steps
        )
        self.transductive = transductive
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.loaded_meta_step = 0
        self.measures: dict[str, Loss] = {"loss": loss}
        if metric is not None:
            self.measures[measure_name(metric)] = metric
        self._curves: dict[str, list[Tensor]] = {}
        self._is_checked = False
        self._evaluated: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Predict with the initial parameters: `(S, ...)` -> `(S, ...)`."""
        prediction: Tensor = self.network(x)
        return prediction

    def meta_gradient(self, batch: TaskBatch) -> dict[str, Tensor]:
        """Compute the gradient of the mean query loss after adaptation, as training does.

        Args:
            batch: T tasks.

        Returns:
            By name of the network's parameter, in its shape. Nothing is left in `.grad`.

        Raises:
            UserError: A loss is not finite.
        """
        result = self._meta_gradient(self.engine, batch, self.inner_loop())
        self._check_finite(result)
        return result.gradient

    def uncompiled_meta_gradient(self, batch: TaskBatch, inner: InnerLoop) -> MetaGradient:
        """Compute a meta-gradient of any order on the run's engine, without compiling anything.

        Args:
            batch: T tasks.
            inner: How to adapt, and the gradient order.

        Raises:
            UserError: This order cannot be taken for this network.
        """
        return self._meta_gradient(self._uncompiled_engine, batch, inner)

    def inner_loop(self) -> InnerLoop:
        """Return how the meta-step at hand adapts, and the gradient order that it takes."""
        return replace(self.inner, first_order=self.takes_first_order())

    def _meta_gradient(self, engine: Engine, batch: TaskBatch, inner: InnerLoop) -> MetaGradient:
        self._check_first(batch)
        try:
            return engine.meta_gradient(self.network, self.loss, batch, inner, self.metric)
        except RuntimeError as error:
            if not is_missing_derivative_error(str(error)):
                raise
            raise UserError(
                f"PyTorch cannot differentiate network {type(self.network).__name__} with first_order "
                f"{str(inner.first_order).lower()}: {str(error).splitlines()[0]}; replace that layer"
                + ("" if inner.first_order else ", or set first_order to true")
            ) from error

    def _reset_metric(self) -> None:
        """Forget what a metric of torchmetrics keeps of every task, whose mean is taken here."""
        if isinstance(self.metric, Metric):
            self.metric.reset()

    def _check_finite(self, result: MetaGradient) -> None:
        check_finite(result.inner_losses, self.inner.lr, f"meta-step {self.global_step}")

    def takes_first_order(self) -> bool:
        """Say whether the meta-step at hand takes the first-order meta-gradient."""
        return self.inner.first_order or self.global_step < self.first_order_steps

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Return the mean query loss of T tasks; its backward deposits the meta-gradient."""
        result = self._meta_gradient(self.engine, batch, self.inner_loop())
        self._reset_metric()
        is_logged = self._is_logged()
        if is_logged or result.loss.is_cpu:
            # To look at a value is to wait for the GPU. What is not finite stays so until then.
            self._check_finite(result)
        if is_logged:
            measures = {"loss": result.loss}
            if self.metric is not None and result.metric is not None:
                measures[measure_name(self.metric)] = result.metric.mean()
            for name, value in measures.items():
                tasks = len(batch.support_x)
                self.log(f"train/{name}", value, prog_bar=True, batch_size=tasks, sync_dist=True)
            if self.first_order_steps:
                self.log("train/first_order", float(self.takes_first_order()))
        parameters = trainable_parameters(self.network)  # in the order of the gradient
        loss: Tensor = LossWithGradient.apply(
            result.loss, *result.gradient.values(), *parameters.values()
        )
        return loss

    def _is_logged(self) -> bool:
        """Choose the meta-steps that a logger asks for, and the first ten, for the progress bar.

        Logging costs a tenth of a millisecond a value, which is much to a sine wave's meta-step.
        """
        every = int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return self.global_step < 10 or (every > 0 and (self.global_step + 1) % every == 0)

    def on_validation_epoch_start(self) -> None:
        """Begin with no task measured."""
        self._forget_curves()

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt to each task and keep its query measures after every inner step."""
        self._evaluate(batch, "validation after")

    def on_validation_epoch_end(self) -> None:
        """Log every measure's mean and 95 % confidence interval over the validation tasks."""
        self._log_curves("val")
        self._step_plateau()

    def on_test_epoch_start(self) -> None:
        """Begin with no task measured."""
        self._forget_curves()

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt to each task and keep its query measures after every inner step."""
        self._evaluate(batch, "test after")

    def on_test_epoch_end(self) -> None:
        """Log every measure's mean and 95 % confidence interval over the test tasks."""
        self._log_curves("test")

    def _forget_curves(self) -> None:
        # A type that all devices choose alike, also those without a task.
        dtype = torch.promote_types(torch.float32, next(self.network.parameters()).dtype)
        no_task = torch.empty(0, self.eval_inner.steps + 1, dtype=dtype, device=self.device)
        self._curves = {name: [no_task] for name in self.measures}

    def _evaluate(self, batch: TaskBatch, when: str) -> None:
        if len(batch.support_x) == 0:
            return  # fewer tasks than devices, and none for this one
        self._check_first(batch)
        curves = self.engine.adaptation_curves(
            self.network, self.measures, self.loss, batch, self.eval_inner, self.transductive
        )
        self._reset_metric()
        check_finite(curves["loss"], self.eval_inner.lr, f"the {when} meta-step {self.global_step}")
        for name, curve in curves.items():
            self._curves[name].append(curve.to(self._curves[name][0].dtype))

    def evaluation_names(self, split: str) -> list[str]:
        """Return the names under which an evaluation of `split` logs its results."""
        steps = [f"_step_{step}" for step in range(self.eval_inner.steps + 1)]
        measures = [f"{split}/{name}{step}" for name in self.measures for step in ("", *steps)]
        return [f"{measure}{suffix}" for measure in measures for suffix in ("", "_ci95")]

    def _log_curves(self, split: str) -> None:
        for name, batches in self._curves.items():
            curves = _gathered(torch.cat(batches))
            mean = curves.mean(dim=0)
            # Normal approximation; with one task alone there is no spread to speak of.
            ci95 = 1.96 * curves.std(dim=0) / len(curves) ** 0.5 if len(curves) > 1 else mean * 0
            for step in range(len(mean)):
                self._log_equal(f"{split}/{name}_step_{step}", mean[step])
                self._log_equal(f"{split}/{name}_step_{step}_ci95", ci95[step])
            self._log_equal(f"{split}/{name}", mean[-1], prog_bar=split == "val")
            self._log_equal(f"{split}/{name}_ci95", ci95[-1])

    def _log_equal(self, name: str, value: Tensor, prog_bar: bool = False) -> None:
        """Log what is equal on every device already; the largest of equals is exact."""
        self._evaluated[name] = value.item()
        self.log(name, value, prog_bar=prog_bar, reduce_fx="max", sync_dist=True)

    def configure_model(self) -> None:
        """Take the trainer's precision on before a checkpoint is loaded.

        Lightning does only afterwards, so that float64 parameters would pass through float32.
        """
        self.trainer.precision_plugin.convert_module(self)

    def configure_optimizers(self) -> Any:
        """Build the outer optimiser and, where asked for, its schedule."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            # Stepped by each validation, before the state is saved: Lightning would step it after.
            settings |= {"monitor": getattr(scheduler, "monitor", "val/loss"), "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _step_plateau(self) -> None:
        """Let schedules that watch a validation's result see this one."""
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if config.reduce_on_plateau and config.monitor is not None:
                scheduler.step(self._evaluated[config.monitor])

    def check_task(self, task: Task) -> None:
        """Try the network, the loss and the metric on one task, and hold the engine to plain autograd.

        Lazy layers take their shapes from the task.

        Raises:
            UserError: They do not fit the task, with its shapes, or the engine would not be exact.
        """
        initialise_lazy(self.network, task)
        check_compatibility(self.network, self.loss, self.metric, task)
        batch = TaskBatch.stack([task])
        for first_order in {
            self.inner.first_order,
            self.inner.first_order or self.first_order_steps > 0,
        }:
            inner = replace(self.inner, first_order=first_order)
            self.engine.check(self.network, self.loss, batch, inner)
        self.engine.check_evaluation(self.network, self.loss, batch, self.eval_inner)
        self._is_checked = True

    def _check_first(self, batch: TaskBatch) -> None:
        """Try the first batch that a process meets, where no task was tried before it."""
        if not self._is_checked:
            self.check_task(next(iter(batch.tasks())))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to keep parameters that are not finite."""
        if not all(p.isfinite().all() for p in self.network.parameters()):
            raise UserError(
                f"the parameters are not finite at meta-step {self.global_step}: lower inner_lr or the "
                "optimizer's learning rate; the checkpoints saved before are as they were"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network, naming a parameter that differs."""
        self.loaded_meta_step = checkpoint["global_step"]
        saved, own = checkpoint["state_dict"], self.state_dict()
        for name in sorted(own.keys() | saved.keys()):
            saved_shape, own_shape = (
                tuple(state[name].shape) if name in state else "absent" for state in (saved, own)
            )
            if saved_shape != own_shape:
                raise UserError(
                    f"the checkpoint is of another network: {name} is {saved_shape} there and "
                    f"{own_shape} here; use the config that lies beside the checkpoint"
                )


def _gathered(curves: Tensor) -> Tensor:
    """Return the curves of every device, which may have measured unequally many tasks."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.cat(gather_all_tensors(curves)) if is_distributed else curves
