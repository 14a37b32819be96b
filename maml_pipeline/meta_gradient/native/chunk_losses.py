"""The losses of a chunk of tasks for PyTorch's autograd, which differentiates them once."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import Parameters
from maml_pipeline.meta_gradient.native.batch import batch_losses
from maml_pipeline.meta_gradient.native.network import FeedForward

PACKED = "packed"
"""Name of all parameters in one vector."""


def packed_chunk_loss(network: FeedForward) -> ChunkLoss:
    """Return the loss of a chunk of tasks as machine code, as a function of one vector for each task."""
    evaluate = partial(_evaluate_packed, network)
    return ChunkLoss(evaluate, evaluate, adapted=(PACKED,))


def named_chunk_loss(network: FeedForward, names: tuple[str, ...]) -> ChunkLoss:
    """Return the loss of a chunk of tasks as machine code, as a function of named parameters."""
    evaluate = partial(_evaluate_named, network)
    return ChunkLoss(evaluate, evaluate, adapted=names)


def _evaluate_packed(
    network: FeedForward, parameters: Parameters, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    losses, predictions = _Losses.apply(network, parameters[PACKED], x, y)
    return losses, predictions


def _evaluate_named(
    network: FeedForward, parameters: Parameters, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    return _evaluate_packed(network, {PACKED: network.pack_tasks(parameters)}, x, y)


class _Losses(torch.autograd.Function):
    """Losses and predictions; the gradients are computed with them and kept."""

    @staticmethod
    def forward(
        ctx: Any, network: FeedForward, theta: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = batch_losses(network, theta.contiguous(), x, y)
        ctx.save_for_backward(result.gradients)
        ctx.mark_non_differentiable(result.predictions)
        return result.losses, result.predictions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_losses: Tensor, _of_predictions: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return None, gradients * of_losses[:, None], None, None
