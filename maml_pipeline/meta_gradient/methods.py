"""The three methods of computing a meta-gradient: first order, unrolled and checkpointed.

Each returns, summed over the T tasks of a chunk, the derivative of the query loss after adaptation,

    d L_query(theta_k) / d theta_0   with   theta_{t+1} = theta_t - alpha grad L_support(theta_t);

`first_order` replaces d theta_k / d theta_0 by the identity; the other two are exact.

In the costs below, k is the number of inner steps, P the size of the parameters, A the size of the
activations of one forward pass, and a gradient is one forward and one backward pass. Costs are per task.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.checkpointed import ParameterCheckpoints, reverse_sweep
from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.meta_gradient.order import Method
from maml_pipeline.tasks import TaskBatch

Call = Callable[..., Any]
"""(function, *arguments) -> the function's result."""


class ChunkGradient(NamedTuple):
    """Losses `(T, k + 1)`, query predictions `(T, Q, ...)` and the meta-gradient summed over tasks."""

    inner_losses: Tensor
    prediction: Tensor
    gradient: Parameters


def call_eagerly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function without compiling it."""
    return function(*arguments)


def chunk_gradient(
    chunk_loss: ChunkLoss,
    theta: Parameters,
    chunk: TaskBatch,
    inner: InnerLoop,
    call: Call = call_eagerly,
) -> ChunkGradient:
    """Compute the meta-gradient of a chunk with the method that `inner` selects.

    Args:
        chunk_loss: Loss of each task of the chunk.
        theta: Initial parameters, which all tasks share.
        chunk: T tasks.
        inner: Inner loop and gradient order.
        call: Calls each part that is a pure function of tensors; `CompiledCalls` compiles it first.
    """
    if inner.method is Method.FIRST_ORDER:
        return first_order(chunk_loss, theta, chunk, inner, call)
    if inner.method is Method.CHECKPOINTED:
        return checkpointed(chunk_loss, theta, chunk, inner, call)
    return ChunkGradient(*call(unrolled, chunk_loss, theta, chunk, inner))


def first_order(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop, call: Call
) -> ChunkGradient:
    """Return the query gradient at the adapted parameters, ignoring how they depend on theta.

    Time: k + 1 gradients. Memory: A and a few P, independent of k.

    When to use: second order is too slow, or a layer has no second derivative in PyTorch.

    Weakness: biased. It omits the product of the factors I - alpha H(theta_t), which matters most for
    large alpha, many steps and strong curvature. The order gap probe measures the difference.

    Also known as FOMAML, or `create_graph=False`.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, section 5.2; Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018.
    """
    adapted, losses = expand(theta, len(chunk.support_x)), []
    for _ in range(inner.steps):
        adapted, support_loss = call(
            inner_step, chunk_loss, adapted, chunk.support_x, chunk.support_y, inner.lr
        )
        losses.append(support_loss)
    query_loss, prediction, query_gradient = call(
        loss_and_gradient, chunk_loss, adapted, chunk.query_x, chunk.query_y
    )
    losses.append(query_loss)
    return ChunkGradient(torch.stack(losses, dim=1), prediction, _sum_over_tasks(query_gradient))


def unrolled(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop
) -> ChunkGradient:
    """Differentiate through the whole inner loop, whose graph is kept.

    Time: k + 1 gradients and a backward pass through all of them. Memory: several A and P for each step.

    When to use: by default. It is the fastest method for second order, if it fits into memory.

    Weakness: memory is proportional to k. For many inner steps or large networks use `checkpointed`.

    Also known as (plain) MAML, backpropagation through the unrolled inner loop, or `create_graph=True`;
    for differential equations, discretise-then-optimise.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, equation 1.
    """
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    adapted, losses = expand(theta, len(chunk.support_x)), []
    for _ in range(inner.steps):
        support_loss, _ = chunk_loss(adapted, chunk.support_x, chunk.support_y)
        slope = gradient(support_loss, adapted, create_graph=True)
        adapted = {name: p - inner.lr * slope[name] for name, p in adapted.items()}
        losses.append(support_loss.detach())

    query_loss, prediction = chunk_loss(adapted, chunk.query_x, chunk.query_y)
    losses.append(query_loss.detach())
    return ChunkGradient(torch.stack(losses, dim=1), prediction.detach(), gradient(query_loss, theta))


def checkpointed(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop, call: Call
) -> ChunkGradient:
    """Adapt without a graph, then carry the adjoint back step by step from parameter checkpoints.

    Time: at most 2 k + 1 gradients, and k Hessian-vector products. Memory: several A for one
    Hessian-vector product, and about sqrt(2 k) P. At k = 10 it needs a fifth of the memory of `unrolled`
    on the 5-way ConvNet (`tests/test_engine_memory.py`).

    When to use: `unrolled` does not fit into memory.

    Weaknesses: slower than `unrolled`. Inner steps must repeat exactly, so networks that draw random
    numbers, as dropout does, are rejected.

    Also known as the (discrete) adjoint method, reverse sweep, gradient checkpointing or
    rematerialisation. Related: treeverse, revolve and binomial checkpointing, which recompute steps
    several times to hold only about log k states; here each step is recomputed at most once.

    References:
        See `maml_pipeline/meta_gradient/checkpointed.py`, which has the derivation.
    """
    support = chunk.support_x, chunk.support_y

    def step(theta_t: Parameters) -> tuple[Parameters, Tensor]:
        result: tuple[Parameters, Tensor] = call(inner_step, chunk_loss, theta_t, *support, inner.lr)
        return result

    def product(theta_t: Parameters, vector: Parameters) -> Parameters:
        result: Parameters = call(hessian_vector_product, chunk_loss, theta_t, *support, vector)
        return result

    adapted, losses = expand(theta, len(chunk.support_x)), []
    checkpoints = ParameterCheckpoints(inner.steps)
    for t in range(inner.steps):
        checkpoints.save(t, adapted)
        adapted, support_loss = step(adapted)
        losses.append(support_loss)

    query_loss, prediction, adjoint = call(
        loss_and_gradient, chunk_loss, adapted, chunk.query_x, chunk.query_y
    )
    losses.append(query_loss)
    del adapted  # freed before the sweep
    adjoint = reverse_sweep(adjoint, checkpoints, lambda theta_t: step(theta_t)[0], product, inner.lr)
    return ChunkGradient(torch.stack(losses, dim=1), prediction, _sum_over_tasks(adjoint))


def expand(theta: Parameters, tasks: int) -> Parameters:
    """Give each task the same parameters without copying them: `(...)` -> `(T, ...)`."""
    return {name: p.expand(tasks, *p.shape) for name, p in theta.items()}


def inner_step(
    chunk_loss: ChunkLoss, parameters: Parameters, x: Tensor, y: Tensor, lr: float
) -> tuple[Parameters, Tensor]:
    """Take one step of gradient descent on each task; return the losses before it, `(T,)`."""
    losses, _, slope = loss_and_gradient(chunk_loss, parameters, x, y)
    return {name: p.detach() - lr * slope[name] for name, p in parameters.items()}, losses


def loss_and_gradient(
    chunk_loss: ChunkLoss, parameters: Parameters, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Parameters]:
    """Return the losses `(T,)`, the predictions and the gradient, detached."""
    parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    losses, prediction = chunk_loss(parameters, x, y)
    return losses.detach(), prediction.detach(), gradient(losses, parameters)


def gradient(losses: Tensor, parameters: Parameters, create_graph: bool = False) -> Parameters:
    """Differentiate the sum of losses `(T,)`; parameters that it does not depend on get zeros."""
    # materialize_grads would give unused parameters gradients that require a gradient.
    gradients = torch.autograd.grad(
        losses.sum(), list(parameters.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


def hessian_vector_product(
    chunk_loss: ChunkLoss, theta: Parameters, x: Tensor, y: Tensor, vector: Parameters
) -> Parameters:
    """Multiply the Hessian of each task's loss at theta by the task's vector."""
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    losses, _ = chunk_loss(theta, x, y)
    slopes = gradient(losses, theta, create_graph=True)
    # A slope without a graph is constant: its curvature is zero. Once they are multiplied, the graph
    # refers to the vector and no longer to the slopes.
    directional = [(slope * vector[name]).sum() for name, slope in slopes.items() if slope.requires_grad]
    del losses, slopes
    if not directional:
        return {name: torch.zeros_like(v) for name, v in vector.items()}
    return gradient(torch.stack(directional), theta)


def _sum_over_tasks(gradient: Parameters) -> Parameters:
    return {name: g.sum(0) for name, g in gradient.items()}
