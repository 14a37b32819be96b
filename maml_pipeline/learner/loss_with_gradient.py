"""A loss that hands Lightning a meta-gradient which is already computed."""

from typing import Any

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient import MetaGradient
from maml_pipeline.meta_gradient.inner_loop import trainable_parameters


def loss_with_gradient(
    result: MetaGradient, network: nn.Module, rates: nn.Parameter | None = None
) -> Tensor:
    """Return the loss of a meta-gradient; its backward deposits the gradient in the parameters.

    Those are the network's, and the learned inner learning rates, with rows in the gradient's order.

    Lightning treats it as an ordinary loss: its backward reaches the parameters through autograd, so
    gradient scaling, accumulation, clipping and the all-reduce of DDP work as for any other loss.
    """
    parameters = [*trainable_parameters(network).values()]  # in the order of the gradient
    gradient = [*result.gradient.values()]
    if rates is not None:
        parameters.append(rates)
        gradient.append(torch.stack([*result.rates.values()]))
    loss: Tensor = _LossWithGradient.apply(result.loss, *gradient, *parameters)
    return loss


class _LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *gradient_and_parameters: Tensor) -> Tensor:
        """Keep the gradient; `gradient_and_parameters` holds n gradients, then n parameters."""
        ctx.gradient = gradient_and_parameters[: len(gradient_and_parameters) // 2]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient and pass it to the parameters."""
        scaled = tuple(grad_output * g for g in ctx.gradient)
        return (None, *(None for _ in scaled), *scaled)
