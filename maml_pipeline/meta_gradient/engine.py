"""What all engines share: their interface, and the exactness check before each first use."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient.chunk_loss import single_task_loss
from maml_pipeline.meta_gradient.exactness import (
    Computation,
    Workarounds,
    derivative_error,
    evaluation_mode,
    verified_workarounds,
)
from maml_pipeline.meta_gradient.inner_loop import (
    InnerLoop,
    Loss,
    Parameters,
    adapted_names,
    trainable_parameters,
)
from maml_pipeline.meta_gradient.methods import chunk_gradient
from maml_pipeline.tasks import Task, TaskBatch
from maml_pipeline.torch_internals import without_attention_fast_path


class MetaGradient(NamedTuple):
    """The mean query loss of T tasks and its gradient with respect to the initial parameters.

    Args:
        loss: Mean query loss after adaptation, a scalar.
        gradient: By parameter name, in the shapes of the network's trainable parameters; zeros for
            parameters that the loss does not depend on.
        inner_losses: `(T, k + 1)`: the support loss before each inner step and, last, the query loss
            after adaptation.
        metric: The metric on each query set `(T,)`; `None` if no metric was given.
        rates: The gradient with respect to learned inner learning rates `(n,)`, by the name of the
            parameter that they move; empty if none are learned.
    """

    loss: Tensor
    gradient: Parameters
    inner_losses: Tensor
    metric: Tensor | None
    rates: Parameters


@contextmanager
def differentiable(batch: TaskBatch) -> Iterator[TaskBatch]:
    """Yield a batch, with autograd enabled whatever the caller has chosen."""
    with torch.inference_mode(False), torch.enable_grad():
        # Autograd cannot save inference tensors, but it can save their clones.
        yield TaskBatch(*(t.clone() if t.is_inference() else t for t in batch))


class Engine(ABC):
    """Computes meta-gradients. Engines differ in speed, memory and the networks they support."""

    def meta_gradient(
        self,
        network: nn.Module,
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        metric: Loss | None = None,
    ) -> MetaGradient:
        """Compute the gradient of the mean query loss after adaptation; `.grad` is not touched.

        Works under `torch.no_grad` and `torch.inference_mode`.

        Args:
            network: Holds the initial parameters theta_0.
            loss: (prediction, target) -> scalar, used on support and query sets.
            batch: T tasks.
            inner: Inner loop and gradient order.
            metric: (prediction, target) -> scalar, computed on the query set.

        Returns:
            The meta-gradient, detached.

        Raises:
            UserError: The meta-gradient of this network or loss would not be exact.

        References:
            Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
            Networks", 2017, equation 1 and algorithm 1; first order: section 5.2.
        """
        with differentiable(batch) as batch:
            workarounds = verified_workarounds(self._computation(inner), network, loss, batch, inner)
            try:
                return self._meta_gradient(network, loss, batch, inner, workarounds, metric)
            except RuntimeError as error:
                if (explained := derivative_error(network, inner, error)) is None:
                    raise
                raise explained from error

    def check(self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
        """Compare this engine with plain autograd on two of these tasks, once per network.

        `meta_gradient` does so on its first call. Call `check` earlier to reject a network before
        training starts, or to keep the comparison out of the first meta-step.

        Args:
            network: Left unchanged.
            loss: (prediction, target) -> scalar.
            batch: T tasks.
            inner: Inner loop and gradient order.

        Raises:
            UserError: The meta-gradient would not be exact; the message names a remedy.
        """
        verified_workarounds(self._computation(inner), network, loss, batch, inner)

    def check_evaluation(
        self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop
    ) -> None:
        """Compare `adaptation_curves` with plain autograd, with the network in evaluation mode.

        Raises:
            UserError: The evaluation would not be exact; the message names a remedy.
        """
        inner = inner.in_first_order()
        with evaluation_mode(network):
            verified_workarounds(self._evaluation(), network, loss, batch, inner)

    def adaptation_curves(
        self,
        network: nn.Module,
        measures: dict[str, Loss],
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        transductive: bool = True,
    ) -> dict[str, Tensor]:
        """Measure the query set before the first inner step and after each one.

        After the last step, each task is predicted by plain calls of the network. So on a CPU the last
        measures are bit for bit those of a network with `adapted_parameters`, and depend neither on the
        other tasks nor on their number.

        Works under `torch.no_grad` and `torch.inference_mode`. Each inner step's graph is freed
        before the next one, whichever gradient order `inner` has.

        Args:
            network: Left unchanged.
            measures: (prediction, target) -> scalar, by name.
            loss: The support loss that adaptation minimises.
            batch: T tasks.
            inner: Inner learning rate and number of steps k.
            transductive: Predict each query set as one batch; `False` predicts each query point
                separately, see `predict_query`.

        Returns:
            `(T, k + 1)` for each measure, by its name.
        """
        inner = inner.in_first_order()
        with differentiable(batch) as batch, without_attention_fast_path():
            workarounds = verified_workarounds(self._evaluation(), network, loss, batch, inner)
            return self._curves(network, measures, loss, batch, inner, workarounds, transductive)

    def adapted_parameters(
        self, network: nn.Module, loss: Loss, support_x: Tensor, support_y: Tensor, inner: InnerLoop
    ) -> Parameters:
        """Adapt to the support set of one task.

        Works under `torch.no_grad` and `torch.inference_mode`. On a CPU, the parameters are bit for bit
        those of `adaptation_curves` after the last inner step, whichever tasks adapt with this one.

        Args:
            network: Left unchanged.
            loss: The support loss that adaptation minimises.
            support_x: Inputs `(S, ...)`.
            support_y: Targets `(S, ...)`.
            inner: Inner learning rate and number of steps k.

        Returns:
            The adapted values of the network's trainable parameters, by name and detached.

        Raises:
            UserError: The adaptation would not be exact; the message names a remedy.
        """
        inner = inner.in_first_order()
        batch = TaskBatch.stack([Task(support_x, support_y, support_x, support_y)])
        with differentiable(batch) as task, without_attention_fast_path():
            workarounds = verified_workarounds(self._evaluation(), network, loss, task, inner)
            with workarounds.preserved_attributes(network):
                return self._adapted(network, loss, task, inner, workarounds)

    def flops(self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> int:
        """Count the floating-point operations of a meta-gradient, in matrix products and convolutions.

        They are counted for one task without vmap, and are those of the method, whichever engine:
        PyTorch miscounts the derivatives of grouped convolutions, and sees nothing of machine code.

        Args:
            network: Holds the initial parameters.
            loss: (prediction, target) -> scalar.
            batch: T tasks.
            inner: Inner loop and gradient order.
        """
        # Late: it imports Triton.
        from torch.utils.flop_counter import FlopCounterMode

        task = TaskBatch(*(tensor[:1] for tensor in batch))
        workarounds = verified_workarounds(self._computation(inner), network, loss, batch, inner)
        theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
        adapted = adapted_names(network, inner.adapt)
        chunk_loss = single_task_loss(network, loss, workarounds, adapted)
        counter = FlopCounterMode(display=False)
        with differentiable(task) as task, workarounds.preserved_attributes(network), counter:
            chunk_gradient(chunk_loss, theta, task, inner)
        return counter.get_total_flops() * len(batch.support_x)

    def forget_captures(self) -> None:  # noqa: B027 (most engines keep none)
        """Free what is kept to replay meta-gradients on a GPU; the next one allocates anew."""

    # What each engine implements -----------------------------------------------------------------

    @abstractmethod
    def _computation(self, inner: InnerLoop) -> Computation:
        """Return the meta-gradient as it is compared with plain autograd."""

    @abstractmethod
    def _evaluation(self) -> Computation:
        """Return the evaluation as it is compared with plain autograd."""

    @abstractmethod
    def _meta_gradient(
        self,
        network: nn.Module,
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        workarounds: Workarounds,
        metric: Loss | None,
    ) -> MetaGradient:
        """Compute `meta_gradient` with workarounds that make it exact."""

    @abstractmethod
    def _curves(
        self,
        network: nn.Module,
        measures: dict[str, Loss],
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        workarounds: Workarounds,
        transductive: bool,
    ) -> dict[str, Tensor]:
        """Compute `adaptation_curves` with workarounds that make them exact."""

    @abstractmethod
    def _adapted(
        self,
        network: nn.Module,
        loss: Loss,
        task: TaskBatch,
        inner: InnerLoop,
        workarounds: Workarounds,
    ) -> Parameters:
        """Compute `adapted_parameters` of a batch of one task, with workarounds that make them exact."""
