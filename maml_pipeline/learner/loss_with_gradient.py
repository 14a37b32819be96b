"""How a meta-gradient that is already known reaches Lightning."""

from typing import Any

import torch
from torch import Tensor


class LossWithGradient(torch.autograd.Function):
    """A loss whose backward hands over a gradient that is already known.

    To Lightning it is an ordinary loss: its backward reaches the parameters through autograd, so
    gradient scaling, accumulation, clipping and the all-reduce of DDP happen as for any other.
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
