"""The losses of a chunk of tasks for PyTorch's autograd, which differentiates them once."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import Parameters
from maml_pipeline.meta_gradient.native.batch import batch_losses
from maml_pipeline.meta_gradient.native.network import FeedForward


def native_chunk_loss(network: FeedForward, adapted: tuple[str, ...]) -> ChunkLoss:
    """Return the loss of a chunk of tasks as machine code, which has no second derivative.

    Args:
        network: The network.
        adapted: Names of the parameters that the inner steps move.
    """
    evaluate = partial(_evaluate, network)
    return ChunkLoss(evaluate, evaluate, adapted)


def _evaluate(
    network: FeedForward, parameters: Parameters, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    names = [name for name, _ in network.shapes]
    losses, predictions = _Losses.apply(network, x, y, *(parameters[name] for name in names))
    return losses, predictions


class _Losses(torch.autograd.Function):
    """Losses and predictions; the gradients are computed with them and kept."""

    @staticmethod
    def forward(
        ctx: Any, network: FeedForward, x: Tensor, y: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        theta = {name: p for (name, _), p in zip(network.shapes, parameters, strict=True)}
        result = batch_losses(network, network.pack_tasks(theta), x, y)
        ctx.network, ctx.theta = network, theta
        ctx.save_for_backward(result.gradients)
        ctx.mark_non_differentiable(result.predictions)
        return result.losses, result.predictions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_losses: Tensor, _of_predictions: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        like = {name: p[0] for name, p in ctx.theta.items()}
        parts = ctx.network.unpack(gradients * of_losses[:, None], like)
        return None, None, None, *(parts[name] for name in ctx.theta)
