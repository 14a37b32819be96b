"""A loss that hands Lightning a meta-gradient which is already computed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient import MetaGradient
from maml_pipeline.meta_gradient.inner_loop import trainable_parameters
from maml_pipeline.torch_internals import has_gradient_hooks, source_of_quotient


class _Deposit(NamedTuple):
    """A gradient, and the parameters that it belongs to, in the same order."""

    gradient: list[Tensor]
    parameters: list[Tensor]


def loss_with_gradient(
    result: MetaGradient, network: nn.Module, rates: nn.Parameter | None = None
) -> Tensor:
    """Return the loss of a meta-gradient; its backward deposits the gradient in the parameters.

    Those are the network's, and the learned inner learning rates, with rows in the gradient's order.

    Lightning treats it as an ordinary loss: its backward reaches the parameters through autograd, so
    accumulation, clipping and the all-reduce of DDP work as for any other loss. Loss scaling has no
    effect: all derivatives are computed before it.
    """
    parameters = [*trainable_parameters(network).values()]  # in the order of the gradient
    gradient = [*result.gradient.values()]
    if rates is not None:
        parameters.append(rates)
        gradient.append(torch.stack([*result.rates.values()]))
    loss: Tensor = _LossWithGradient.apply(result.loss, _Deposit(gradient, parameters), *parameters)
    return loss


class _LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, deposit: _Deposit, *parameters: Tensor) -> Tensor:
        """Keep the gradient; autograd must see the parameters as arguments of their own."""
        ctx.deposit = deposit
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient and pass it to the parameters."""
        return (None, None, *(grad_output * g for g in ctx.deposit.gradient))


def deposit_gradient(loss: Tensor) -> bool:
    """Do what `loss.backward()` does, without autograd, which takes as long as ten tensor operations.

    Args:
        loss: That of `loss_with_gradient` divided by 1, as Lightning divides it by the number of batches
            that it accumulates.

    Returns:
        Whether it was done. It is not for any other loss, beside gradients of earlier batches, and where
        hooks wait for autograd.
    """
    deposit = getattr(source_of_quotient(loss), "deposit", None)
    if not isinstance(deposit, _Deposit) or has_gradient_hooks(loss):
        return False
    if not all(map(_can_be_set, deposit.parameters, deposit.gradient)):
        return False
    for parameter, g in zip(deposit.parameters, deposit.gradient, strict=True):
        # Autograd, too, copies a gradient whose elements lie in another order.
        is_alike = g.stride() == parameter.stride()
        parameter.grad = g if is_alike else torch.empty_like(parameter).copy_(g)
    return True


def _can_be_set(parameter: Tensor, gradient: Tensor) -> bool:
    return (
        parameter.grad is None
        and gradient.dtype == parameter.dtype
        and gradient.layout == parameter.layout
        and not has_gradient_hooks(parameter)
    )
