"""What every engine takes and gives: the inner loop's settings and a meta-gradient as a value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.order import GradientOrder, Method
from maml_pipeline.tasks import TaskBatch

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target) -> scalar."""

Parameters = dict[str, Tensor]
"""Trainable parameters by name."""


@dataclass(frozen=True)
class InnerLoop:
    """How a network adapts to one task: theta_{t+1} = theta_t - lr * grad L_support(theta_t).

    Args:
        lr: Inner learning rate alpha, above 0.
        steps: Inner steps k, at least 0.
        first_order: Treat the support gradients as constants (FOMAML) instead of differentiating
            through them (MAML).
        checkpointed: Second order without the graph of the inner loop: keep parameters alone and
            walk back over the steps. First order keeps no graph anyway.

    Raises:
        UserError: A setting is out of its range.
    """

    lr: float
    steps: int = 1
    first_order: bool = False
    checkpointed: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise UserError(f"inner_lr is {self.lr}; it must be a number above 0")
        if self.steps < 0:
            raise UserError(f"inner_steps is {self.steps}; it must be 0 or more")

    @property
    def method(self) -> Method:
        """How the meta-gradient is computed."""
        return Method.of(self.first_order, self.checkpointed)

    @property
    def order(self) -> GradientOrder:
        """The gradient order."""
        return self.method.order


def first_order(inner: InnerLoop) -> InnerLoop:
    """Return how an evaluation adapts, which takes no derivative of its steps."""
    return InnerLoop(inner.lr, inner.steps, first_order=True)


class MetaGradient(NamedTuple):
    """The mean query loss of T tasks and its gradient with respect to the initial parameters.

    `gradient` has the shapes of the network's trainable parameters, by name; parameters that the
    loss does not depend on get zeros. `inner_losses` `(T, k + 1)` holds the support loss before
    each inner step and, last, the query loss after all of them. `metric` `(T,)` is the metric on
    the query set, `None` where none was asked for.
    """

    loss: Tensor
    gradient: Parameters
    inner_losses: Tensor
    metric: Tensor | None


def trainable_parameters(network: nn.Module) -> Parameters:
    """Return the parameters that are learned, by name, each once even where modules share it."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


class Engine(Protocol):
    """One way to compute meta-gradients. Engines differ in speed, memory and in what they can run."""

    def meta_gradient(
        self,
        network: nn.Module,
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        metric: Loss | None = None,
    ) -> MetaGradient:
        """Compute the gradient of the mean query loss after adaptation, leaving `.grad` alone.

        Args:
            network: Its parameters are the initial ones, theta.
            loss: (prediction, target) -> scalar, for support and query set alike.
            batch: T tasks.
            inner: How to adapt, and the gradient order.
            metric: (prediction, target) -> scalar, judged on the query set.

        Returns:
            The meta-gradient, detached.

        References:
            Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
            Networks", 2017, equation 1 and algorithm 1; first order: section 5.2.
        """
        ...

    def check(self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
        """Hold this engine to plain autograd on a few of these tasks, unless that was done before.

        `meta_gradient` does it by itself when it first meets a network. Do it ahead to refuse a
        network early, or to keep the first meta-gradient free of it.

        Args:
            network: It is left as it is.
            loss: (prediction, target) -> scalar.
            batch: T tasks.
            inner: How to adapt, and the gradient order.

        Raises:
            UserError: The network, the loss or this order would not be exact, and what to do.
        """
        ...

    def check_evaluation(
        self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop
    ) -> None:
        """Do as `check` does, for `adaptation_curves` of a network in evaluation mode.

        Raises:
            UserError: An evaluation would not be exact, and what to do.
        """
        ...

    def adaptation_curves(
        self,
        network: nn.Module,
        measures: dict[str, Loss],
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        transductive: bool = True,
    ) -> dict[str, Tensor]:
        """Measure the query set before the first inner step and after every one.

        Works under `torch.no_grad` and `torch.inference_mode` alike. No graph outlives its inner
        step, whatever `inner` says of the order.

        Args:
            network: It is left as it is.
            measures: (prediction, target) -> scalar, by name.
            loss: What adaptation descends on the support set.
            batch: T tasks.
            inner: Inner learning rate and steps k.
            transductive: Predict a query set as one batch; `False`: each of its points by itself, see
                `predict_query`.

        Returns:
            By name of the measure, `(T, k + 1)`.
        """
        ...


def check_finite(inner_losses: Tensor, inner_lr: float, when: str) -> None:
    """Raise a `UserError` that names the inner step at which a loss stopped being finite.

    Args:
        inner_losses: `(T, k + 1)`, one column an inner step.
        inner_lr: Inner learning rate, for the message.
        when: Where training stood, for the message: "meta-step 12".
    """
    finite = torch.isfinite(inner_losses)
    if finite.all():
        return
    inner_step = int((~finite).any(dim=0).nonzero()[0])
    value = inner_losses[~finite[:, inner_step], inner_step][0].item()
    raise UserError(
        f"the loss is {value} at {when}, inner step {inner_step}, with inner_lr {inner_lr}: "
        "lower inner_lr or the optimizer's learning rate, or look for bad values in the tasks"
    )
