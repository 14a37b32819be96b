"""The inner loop: how a network adapts to one task."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import GradientOrder, Method
from maml_pipeline.limits import check_positive, check_whole

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target) -> scalar."""

Parameters = dict[str, Tensor]
"""Trainable parameters by name."""


@dataclass(frozen=True)
class InnerLoop:
    """Gradient descent on the support loss: theta_{t+1} = theta_t - alpha * grad L_support(theta_t).

    Args:
        lr: Inner learning rate alpha, above 0.
        steps: Number of inner steps k, at least 0.
        first_order: Treat the support gradients as constants (FOMAML) instead of differentiating
            through them (MAML).
        checkpointed: Compute second order by recomputing inner steps instead of keeping their graph.
            Has no effect on first order, which keeps no graph.

    Raises:
        UserError: A setting is out of range.
    """

    lr: float
    steps: int = 1
    first_order: bool = False
    checkpointed: bool = False

    def __post_init__(self) -> None:
        check_positive("inner_lr", self.lr)
        check_whole("inner_steps", self.steps, 0)

    @property
    def method(self) -> Method:
        """How the meta-gradient is computed."""
        return Method.of(self.first_order, self.checkpointed)

    @property
    def order(self) -> GradientOrder:
        """The gradient order."""
        return self.method.order

    def for_evaluation(self) -> "InnerLoop":
        """Return the same steps without a meta-gradient, so that no graph is kept."""
        return InnerLoop(self.lr, self.steps, first_order=True)


def trainable_parameters(network: nn.Module) -> Parameters:
    """Return the parameters that require a gradient, by name; a shared parameter appears once."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def check_finite(inner_losses: Tensor, inner_lr: float, when: str) -> None:
    """Raise an error that names the first inner step whose loss is not finite.

    Args:
        inner_losses: `(T, k + 1)`, one column per inner step.
        inner_lr: Inner learning rate, for the message.
        when: Position in training, for the message: "meta-step 12".

    Raises:
        UserError: A loss is NaN or infinite.
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
