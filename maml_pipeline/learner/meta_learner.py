"""MetaLearner: MAML of either gradient order as a LightningModule."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from maml_pipeline import run_folder
from maml_pipeline.errors import UserError
from maml_pipeline.files import expand_home
from maml_pipeline.learner.evaluation import EvaluatedByAdaptation
from maml_pipeline.learner.learned_inner_lr import (
    RATE_NAMES,
    LearnedInnerLr,
    check_same_rates,
    initial_rates,
    mean_rates,
    parameter_groups,
)
from maml_pipeline.learner.lightning_internals import remember_signature
from maml_pipeline.learner.loss_with_gradient import deposit_gradient, loss_with_gradient
from maml_pipeline.learner.measures import MeansOfMetaStep, check_measures, measure_name
from maml_pipeline.learner.model_checks import check_compatibility, check_same_network
from maml_pipeline.learner.outer_optimizer import adam, release_gradients, scheduler_config
from maml_pipeline.learner.saved_run import checkpoint_of_run, learner_of_checkpoint, learner_of_run
from maml_pipeline.limits import check_whole
from maml_pipeline.meta_gradient import InnerLoop, MetaGradient, build_engine, initialise_lazy
from maml_pipeline.meta_gradient.inner_loop import adapted_names, check_finite, trainable_parameters
from maml_pipeline.tasks import Task, TaskBatch

logger = logging.getLogger(__name__)


class MetaLearner(EvaluatedByAdaptation):
    """Meta-learn the initial parameters of any network with first- or second-order MAML.

    Args:
        network: Maps inputs `(S, ...)` to predictions `(S, ...)`; its parameters are meta-learned.
        loss: (prediction, target) -> scalar, for support and query sets: a function such as
            `torch.nn.functional.mse_loss`, or an instance of a class such as `torch.nn.HuberLoss`, by
            `class_path` and `init_args`.
        inner_lr: Inner learning rate alpha.
        learned_inner_lr: Meta-learn a rate for each adapted parameter and inner step, which starts at
            `inner_lr`; see `LearnedInnerLr`. An evaluation takes the last one in further steps.
        inner_steps: Inner steps k in training.
        eval_inner_steps: Inner steps in validation and test; `None` for `inner_steps`.
        adapt: Patterns of the names of the parameters that the inner loop moves: `["head.*"]` for the
            head alone, `["*.bias"]` for every bias; `None` for all. All are meta-learned either way.
        transductive: Predict each query set as one batch in validation and test, so that batch
            normalisation shares statistics among query points, as in the MAML paper; `False` predicts
            each query point separately, normalised with the support set. Training is always
            transductive.
        first_order: `True` for first-order meta-gradients (FOMAML), `False` for second-order (MAML).
        differentiated_steps: For second order: differentiate through the last n inner steps alone
            (truncated); `None` for all. 0 is first order, and `inner_steps` second order, bit for bit.
        method: How second order is computed. `"unrolled"` keeps the graph of the differentiated steps;
            `"checkpointed"` recomputes them, to save memory; `"hessian_free"` takes differences of
            gradients in place of second derivatives, which is not exact.
        first_order_meta_steps: Number of initial meta-steps that take first-order meta-gradients,
            before the order of the other keys (derivative-order annealing).
        engine: `"native"` runs this project's networks as machine code on a CPU, and anything else like
            `"vectorized"`, which adapts all tasks at once; `"learn2learn"`, an optional dependency, one
            after another, which is slower for small networks but supports more modules. All compute
            the same meta-gradient, and reject networks that they cannot run exactly.
        tasks_per_chunk: For `"vectorized"`: number of tasks that adapt at once, which bounds memory;
            `"auto"` for as many as fit, `None` for all. Machine code runs one task on each thread.
        metric: A second measure beside the loss, of the same form, logged under its name; such as
            `maml_pipeline.learner.accuracy`.
        optimizer: Builds the outer optimizer from the parameters; default: Adam with 1e-3.
        lr_scheduler: Builds a schedule of the outer learning rate, stepped once per meta-step;
            ReduceLROnPlateau once per validation, with `monitor` `val/loss` by default.

    Raises:
        UserError: A setting is out of range, the engine does not support it, or is not installed.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, algorithm 1; Shaban, Cheng, Hatch, Boots, "Truncated Back-propagation for Bilevel
        Optimization", 2019 (`differentiated_steps`); Fallah, Mokhtari, Ozdaglar, "On the Convergence
        Theory of Gradient-Based Model-Agnostic Meta-Learning Algorithms", 2020 (`hessian_free`);
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019, section 4 (derivative-order
        annealing, learned inner learning rates); Nichol, Achiam, Schulman, "On First-Order
        Meta-Learning Algorithms", 2018, section 6.1 (transduction); Raghu, Raghu, Bengio, Vinyals,
        "Rapid Learning or Feature Reuse?", 2020 (ANIL: `adapt` the head alone); Oh, Yoo, Kim, Yun,
        "BOIL", 2021 (the body alone).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: Callable[..., Any],
        inner_lr: float,
        learned_inner_lr: LearnedInnerLr | None = None,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        adapt: list[str] | None = None,
        transductive: bool = True,
        first_order: bool = False,
        differentiated_steps: NonNegativeInt | None = None,
        method: Literal["unrolled", "checkpointed", "hessian_free"] = "unrolled",
        first_order_meta_steps: NonNegativeInt = 0,
        engine: Literal["native", "vectorized", "learn2learn"] = "native",
        tasks_per_chunk: PositiveInt | Literal["auto"] | None = None,
        metric: Callable[..., Any] | None = None,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if not trainable_parameters(network):
            raise UserError(
                f"network {type(network).__name__} has no parameter that requires a gradient"
            )
        check_measures(loss, metric)
        check_whole("first_order_meta_steps", first_order_meta_steps, 0)
        if eval_inner_steps is not None:
            check_whole("eval_inner_steps", eval_inner_steps, 0)
        super().__init__(network, loss, metric)
        self.first_order_meta_steps = first_order_meta_steps
        self.inner = InnerLoop(inner_lr, inner_steps, first_order, differentiated_steps, method, adapt)
        self.adapted_names = adapted_names(network, self.inner.adapt)
        self.learned_inner_lr = learned_inner_lr
        dtype = network.get_parameter(self.adapted_names[0]).dtype
        self.inner_rates = (
            None if learned_inner_lr is None else initial_rates(self.inner, self.adapted_names, dtype)
        )
        self.engine = build_engine(engine, tasks_per_chunk)
        eval_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self.eval_inner = InnerLoop(inner_lr, eval_steps, adapt=adapt)
        self.transductive = transductive
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.loaded_meta_step = 0
        self._training_means = MeansOfMetaStep()
        self._is_checked = False

    # One meta-step ------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Forget the means of an earlier training; warn of a loss scaling that has no effect."""
        self._training_means = MeansOfMetaStep()
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            logger.warning(
                "trainer.precision is %s, whose loss scaling cannot protect a meta-gradient from "
                "underflow, since the engine computes all derivatives before; bf16-mixed needs none",
                self.trainer.precision,
            )

    @remember_signature
    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Return the mean query loss of T tasks; its backward deposits the meta-gradient."""
        self.check_first_batch(batch)
        result = self._run_engine(batch)
        self._reset_metric()
        is_logged = self._is_logged()
        if is_logged or result.loss.is_cpu:
            # Reading a value waits for the GPU. A loss that is not finite stays so until the next log.
            self._check_finite(result)
        if is_logged:
            self._log_training(result, tasks=len(batch.support_x))
        return loss_with_gradient(result, self.network, self.inner_rates)

    def _run_engine(self, batch: TaskBatch) -> MetaGradient:
        inner = self.inner_loop()
        return self.engine.meta_gradient(self.network, self.loss, batch, inner, self.metric)

    def inner_loop(self) -> InnerLoop:
        """Return the inner loop of the current meta-step, with its gradient order."""
        inner = self._with_rates(self.inner)
        return inner.in_first_order() if self.takes_first_order() else inner

    def evaluation_loop(self) -> InnerLoop:
        """Return the inner loop of an evaluation, with the learned rates if there are any."""
        return self._with_rates(self.eval_inner)

    def _with_rates(self, inner: InnerLoop) -> InnerLoop:
        if self.inner_rates is None:
            return inner
        rates = dict(zip(self.adapted_names, self.inner_rates.detach(), strict=True))
        return replace(inner, rates=rates)

    def takes_first_order(self) -> bool:
        """Tell whether the current meta-step takes the first-order meta-gradient."""
        return self.inner.is_first_order or 0 < self.first_order_meta_steps > self.global_step

    def _check_finite(self, result: MetaGradient) -> None:
        # If the sum is finite, so is every loss: one operation in all but the last meta-step.
        if not math.isfinite(result.inner_losses.sum().item()):
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
        batches = self.trainer.accumulate_grad_batches
        means = self._training_means.updated(self.global_step, measures, batches)
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=tasks, sync_dist=True)
        if self.first_order_meta_steps:
            self.log("train/first_order", float(self.takes_first_order()))
        if self.inner_rates is not None:
            for layer, rate in mean_rates(self.inner_rates.detach(), self.adapted_names).items():
                self.log("train/inner_lr" + (f"/{layer}" if layer else ""), rate)

    def configure_optimizers(self) -> Any:
        """Build the outer optimizer and its schedule, if any."""
        network = (p for p in self.network.parameters() if p.requires_grad)
        optimizer = self.optimizer(parameter_groups(network, self.inner_rates, self.learned_inner_lr))
        if self.lr_scheduler is None:
            return optimizer
        schedule = scheduler_config(self.lr_scheduler(optimizer))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Release the gradients of the previous meta-step."""
        release_gradients(optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Deposit the meta-gradient; by autograd if anything happens to it on the way."""
        trainer = self.trainer
        is_whole = (
            trainer.accumulate_grad_batches == 1 and type(trainer.strategy) is SingleDeviceStrategy
        )
        if not (is_whole and deposit_gradient(loss)):
            super().backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient if the trainer does; Lightning checks the settings again in every batch."""
        if gradient_clip_val is not None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Outside training ---------------------------------------------------------------------------

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        which: Literal["best", "last"] = "best",
        device: str | torch.device = "cpu",
    ) -> Self:
        """Build the learner of a run and load one of its checkpoints.

        Args:
            folder: The run's folder, such as `runs/omniglot-5w1s-second-s0`.
            which: `best` for the checkpoint with the best validation result, or the last one if nothing
                was validated; `last` for the most recent one.
            device: Where to put the learner.

        Returns:
            The learner, in evaluation mode.

        Raises:
            UserError: The folder is not a run's or has no checkpoint, the checkpoint is damaged, a class
                of the config cannot be imported, or the device is not available.
        """
        path = expand_home(Path(folder), "run folder")
        return learner_of_run(cls, path, checkpoint_of_run(path, which), device)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, **settings: Any
    ) -> Self:
        """Load a checkpoint: of a run, or of a plain Trainer.

        Parameters must match exactly, and no code in the file is run; so Lightning's arguments `strict`,
        `weights_only` and `hparams_file` do not exist here.

        Args:
            checkpoint_path: A checkpoint in a run's folder, whose `config.yaml` has the settings; or any
                other, with the arguments of the constructor.
            map_location: Device of the learner; the CPU by default.
            settings: All arguments of the constructor, such as `network=..., loss=..., inner_lr=...`;
                they replace those of a run's `config.yaml`.

        Returns:
            The learner; in evaluation mode if its settings are a run's.

        Raises:
            UserError: Arguments are missing, or the checkpoint is damaged or of another network.
        """
        path = expand_home(Path(checkpoint_path), "checkpoint")
        device = "cpu" if map_location is None else map_location
        run = run_folder.enclosing_run(path)
        if not settings and run is not None:
            return learner_of_run(cls, run, path, device)
        return learner_of_checkpoint(cls, path, settings, device)

    def forward(self, x: Tensor) -> Tensor:
        """Predict with the initial parameters: `(S, ...)` -> `(S, ...)`."""
        prediction: Tensor = self.network(x)
        return prediction

    def meta_gradient(self, batch: TaskBatch) -> dict[str, Tensor]:
        """Compute the meta-gradient of T tasks as training does; `.grad` is left unchanged.

        Returns:
            The gradient by parameter name, in the parameter's shape.

        Raises:
            UserError: A loss is not finite.
        """
        self.check_first_batch(batch)
        result = self._run_engine(batch)
        self._check_finite(result)
        return result.gradient

    def check_first_batch(self, batch: TaskBatch) -> None:
        """Check the first batch in this process, unless `check_task` has run."""
        if not self._is_checked:
            self.check_task(next(iter(batch.tasks())))

    def check_task(self, task: Task) -> None:
        """Check network, loss and metric on one task, and the engine against plain autograd.

        Initialises lazy layers with the task's shapes.

        Raises:
            UserError: They do not fit the task, or the engine would not be exact.
        """
        initialise_lazy(self.network, task)
        check_compatibility(self.network, self.loss, self.metric, task)
        # Tasks must not affect each other: the second one has the inputs at other targets.
        other = task._replace(support_x=task.support_x.roll(1, 0), query_x=task.query_x.roll(1, 0))
        batch = TaskBatch.stack([task, other])
        inner = self._with_rates(self.inner)
        if self.first_order_meta_steps > 0:
            self.engine.check(self.network, self.loss, batch, inner.in_first_order())
        self.engine.check(self.network, self.loss, batch, inner)
        self.engine.check_evaluation(self.network, self.loss, batch, self.evaluation_loop())
        self._is_checked = True

    def configure_model(self) -> None:
        """Convert to the trainer's precision before a checkpoint is loaded.

        Lightning converts only afterwards, which would round float64 parameters to float32.
        """
        self.trainer.precision_plugin.convert_module(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject parameters that are not finite; save the names of those that learned rates move."""
        if self.inner_rates is not None:
            checkpoint[RATE_NAMES] = [*self.adapted_names]
        if not all(p.isfinite().all() for p in self.parameters()):
            raise UserError(
                f"the parameters are not finite at meta-step {self.global_step}: lower inner_lr or the "
                "optimizer's learning rate; earlier checkpoints are unchanged"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint of another network."""
        self.loaded_meta_step = checkpoint["global_step"]
        check_same_network(checkpoint["state_dict"], self.state_dict())
        if self.inner_rates is not None:
            check_same_rates(checkpoint.get(RATE_NAMES, self.adapted_names), self.adapted_names)
