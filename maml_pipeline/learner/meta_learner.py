"""MetaLearner: MAML of either gradient order as a LightningModule."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.learner.evaluation import EvaluatedByAdaptation
from maml_pipeline.learner.model_checks import (
    check_compatibility,
    check_measures,
    check_same_network,
    measure_name,
)
from maml_pipeline.meta_gradient import (
    Engine,
    InnerLoop,
    MetaGradient,
    build_engine,
    initialise_lazy,
)
from maml_pipeline.meta_gradient.inner_loop import check_finite, trainable_parameters
from maml_pipeline.meta_gradient.torch_internals import is_missing_derivative_error
from maml_pipeline.tasks import Task, TaskBatch
from maml_pipeline.tasks.task import check_at_least


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the fraction of correct answers: logits `(S, ways)`, labels `(S,)` -> scalar in [0, 1]."""
    return (logits.argmax(dim=-1) == labels).float().mean()


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Build Adam with the paper's outer learning rate, 1e-3, as one fused kernel."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


class MetaLearner(EvaluatedByAdaptation):
    """Meta-learn the initial parameters of any network with first- or second-order MAML.

    Args:
        network: Maps inputs `(S, ...)` to predictions `(S, ...)`; its parameters are meta-learned.
        loss: (prediction, target) -> scalar, for support and query sets: a function such as
            `torch.nn.functional.mse_loss`, or an instance of a class such as `torch.nn.HuberLoss`, by
            `class_path` and `init_args`.
        inner_lr: Inner learning rate alpha.
        inner_steps: Inner steps k while training.
        eval_inner_steps: Inner steps while validating and testing; `None` for `inner_steps`.
        transductive: Validate and test with query sets predicted as one batch, so that batch
            normalisation shares statistics among query points, as in the MAML paper; `False` predicts
            each query point by itself, normalised with the support set. Training is always
            transductive.
        first_order: `True` for first-order meta-gradients (FOMAML), `False` for second-order (MAML).
        first_order_steps: Take first-order meta-gradients in the first so many meta-steps, and the order
            of `first_order` afterwards (derivative-order annealing).
        engine: `"learn2learn"` adapts one task after another; `"vectorized"` adapts all at once, which
            is faster for small networks, and supports fewer modules. Both compute the same
            meta-gradient, and refuse what they cannot run exactly.
        tasks_per_chunk: For `"vectorized"`: how many tasks to adapt at once, which bounds memory;
            `"auto"` for as many as fit, `None` for all.
        checkpoint_inner_steps: Save memory in second order: recompute inner steps instead of
            keeping their graphs. First order keeps none in any case.
        compile: For `"vectorized"`: compile the meta-gradient with `torch.compile`, which takes a
            minute or more in the first meta-step.
        metric: A second measure beside the loss, given like it and logged under its name, such as
            `maml_pipeline.learner.accuracy`.
        optimizer: Builds the outer optimiser from the parameters; Adam with 1e-3 by default.
        lr_scheduler: Builds a schedule of the outer learning rate, stepped once per meta-step;
            ReduceLROnPlateau once per validation, with `monitor` `val/loss` by default.

    Raises:
        UserError: A setting is out of range, or not supported by the engine.

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
        if not trainable_parameters(network):
            raise UserError(
                f"network {type(network).__name__} has no parameter that requires a gradient"
            )
        check_measures(loss, metric)
        check_at_least("first_order_steps", first_order_steps, 0)
        if eval_inner_steps is not None:
            check_at_least("eval_inner_steps", eval_inner_steps, 0)
        super().__init__(network, loss, metric)
        self.first_order_steps = first_order_steps
        self.inner = InnerLoop(inner_lr, inner_steps, first_order, checkpoint_inner_steps)
        self.engine = build_engine(engine, tasks_per_chunk, compile)
        self.compiles = compile
        self._uncompiled_engine = build_engine(engine, tasks_per_chunk) if compile else self.engine
        self.eval_inner = InnerLoop(
            inner_lr, inner_steps if eval_inner_steps is None else eval_inner_steps
        )
        self.transductive = transductive
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.loaded_meta_step = 0
        self._is_checked = False

    # One meta-step, from top to bottom ----------------------------------------------------------

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Return the mean query loss of T tasks; its backward deposits the meta-gradient."""
        self.check_first_batch(batch)
        result = self._meta_gradient(self.engine, batch, self.inner_loop())
        self._reset_metric()
        is_logged = self._is_logged()
        if is_logged or result.loss.is_cpu:
            # Reading a value waits for the GPU. A value that is not finite stays so until then.
            self._check_finite(result)
        if is_logged:
            self._log_training(result, tasks=len(batch.support_x))
        parameters = trainable_parameters(self.network)  # in the order of the gradient
        loss: Tensor = LossWithGradient.apply(
            result.loss, *result.gradient.values(), *parameters.values()
        )
        return loss

    def inner_loop(self) -> InnerLoop:
        """Return the settings of the inner loop in the current meta-step, with its gradient order."""
        return replace(self.inner, first_order=self.takes_first_order())

    def takes_first_order(self) -> bool:
        """Tell whether the current meta-step takes the first-order meta-gradient."""
        return self.inner.first_order or self.global_step < self.first_order_steps

    def _meta_gradient(self, engine: Engine, batch: TaskBatch, inner: InnerLoop) -> MetaGradient:
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

    def _check_finite(self, result: MetaGradient) -> None:
        check_finite(result.inner_losses, self.inner.lr, f"meta-step {self.global_step}")

    def _is_logged(self) -> bool:
        """Log at the logger's interval, and in the first ten meta-steps for the progress bar.

        Logging takes 0.1 ms per value, which is long compared with a meta-step on sine waves.
        """
        every = int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return self.global_step < 10 or (every > 0 and (self.global_step + 1) % every == 0)

    def _log_training(self, result: MetaGradient, tasks: int) -> None:
        measures = {"loss": result.loss}
        if self.metric is not None and result.metric is not None:
            measures[measure_name(self.metric)] = result.metric.mean()
        for name, value in measures.items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=tasks, sync_dist=True)
        if self.first_order_steps:
            self.log("train/first_order", float(self.takes_first_order()))

    def configure_optimizers(self) -> Any:
        """Build the outer optimiser and its schedule, if any."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            # Never stepped by Lightning, but after each validation by EvaluatedByAdaptation.
            settings |= {"monitor": getattr(scheduler, "monitor", "val/loss"), "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    # Outside training ---------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Predict with the initial parameters: `(S, ...)` -> `(S, ...)`."""
        prediction: Tensor = self.network(x)
        return prediction

    def meta_gradient(self, batch: TaskBatch) -> dict[str, Tensor]:
        """Compute the gradient of the mean query loss after adaptation, as training does.

        Args:
            batch: T tasks.

        Returns:
            The gradient by parameter name, in the parameter's shape. `.grad` is left unchanged.

        Raises:
            UserError: A loss is not finite.
        """
        self.check_first_batch(batch)
        result = self._meta_gradient(self.engine, batch, self.inner_loop())
        self._check_finite(result)
        return result.gradient

    def uncompiled_meta_gradient(self, batch: TaskBatch, inner: InnerLoop) -> MetaGradient:
        """Compute a meta-gradient of either order on the run's engine, without compiling.

        Args:
            batch: T tasks.
            inner: Settings of the inner loop, and the gradient order.

        Raises:
            UserError: The network does not support this order.
        """
        self.check_first_batch(batch)
        return self._meta_gradient(self._uncompiled_engine, batch, inner)

    def check_first_batch(self, batch: TaskBatch) -> None:
        """Check the first batch of this process, unless `check_task` has run."""
        if not self._is_checked:
            self.check_task(next(iter(batch.tasks())))

    def check_task(self, task: Task) -> None:
        """Check network, loss and metric on one task, and the engine against plain autograd.

        Lazy layers take their shapes from the task.

        Raises:
            UserError: They do not fit the task and its shapes, or the engine would not be exact.
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

    def configure_model(self) -> None:
        """Convert to the trainer's precision before a checkpoint is loaded.

        Lightning does only afterwards, which would round float64 parameters to float32.
        """
        self.trainer.precision_plugin.convert_module(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save parameters that are not finite."""
        if not all(p.isfinite().all() for p in self.network.parameters()):
            raise UserError(
                f"the parameters are not finite at meta-step {self.global_step}: lower inner_lr or the "
                "optimizer's learning rate; earlier checkpoints are unchanged"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network."""
        self.loaded_meta_step = checkpoint["global_step"]
        check_same_network(checkpoint["state_dict"], self.state_dict())


class LossWithGradient(torch.autograd.Function):
    """A loss whose backward passes on a gradient that is already computed.

    Lightning treats it as an ordinary loss: its backward reaches the parameters through autograd, so
    gradient scaling, accumulation, clipping and the all-reduce of DDP work as for any other.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *gradient_and_parameters: Tensor) -> Tensor:
        """Keep the gradient; `gradient_and_parameters` holds n gradients, then n parameters."""
        ctx.gradient = gradient_and_parameters[: len(gradient_and_parameters) // 2]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradient and pass it to the parameters."""
        scaled = tuple(grad_output * g for g in ctx.gradient)
        return (None, *(None for _ in scaled), *scaled)
