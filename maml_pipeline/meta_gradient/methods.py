"""The three methods of computing a meta-gradient: first order, unrolled, and checkpointed.py.

Each returns, summed over the T tasks of a chunk, the derivative of the query loss after adaptation,

    d L_query(theta_k) / d theta_0   with   theta_{t+1} = theta_t - alpha grad L_support(theta_t);

`first_order` replaces d theta_k / d theta_0 by the identity; the other two are exact.

Inner steps move the adapted parameters phi of theta = (phi, psi); psi is fixed in the inner loop. The
derivative with respect to psi is the query loss's own at (phi_k, psi) and, except in first order, what
reaches it through the support gradients. What the network computes before any of phi takes part, its
fixed prefix, is computed once for the support set.

In the costs below, k is the number of inner steps, P the size of the parameters, A the size of the
activations of one forward pass, and a gradient is one forward and one backward pass. Costs are per task.
"""

import torch

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.adaptation import (
    ChunkGradient,
    RateGradient,
    gradient,
    inner_step,
    loss_and_gradient,
)
from maml_pipeline.meta_gradient.checkpointed import checkpointed
from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.tasks import TaskBatch

RATE = "@inner_lr"
"""Ends the name of a parameter's learned inner learning rates, beside the parameters themselves."""


def chunk_gradient(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop
) -> ChunkGradient:
    """Compute the meta-gradient of a chunk with the method that `inner` selects.

    Args:
        chunk_loss: Loss of each task of the chunk.
        theta: Initial parameters, which all tasks share.
        chunk: T tasks.
        inner: Inner loop and gradient order.
    """
    if inner.method is Method.FIRST_ORDER:
        return first_order(chunk_loss, theta, chunk, inner)
    if inner.method is Method.CHECKPOINTED:
        return checkpointed(chunk_loss, theta, chunk, inner)
    return unrolled(chunk_loss, theta, chunk, inner)


def first_order(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop
) -> ChunkGradient:
    """Return the query gradient at the adapted parameters, ignoring how they depend on theta.

    Time: k + 1 gradients. Memory: A and a few P, independent of k; learned rates keep one P per step.

    When to use: second order is too slow, or a layer has no second derivative in PyTorch.

    Weakness: biased. It omits the product of the factors I - alpha H(theta_t), which matters most for
    large alpha, many steps and strong curvature. The order gap probe measures the difference.

    Also known as FOMAML, or `create_graph=False`.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, section 5.2; Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018.
    """
    support = chunk.support_x, chunk.support_y
    adapted, losses, slopes = chunk_loss.start(theta, chunk.support_x), [], []
    for t in range(inner.steps):
        adapted, support_loss, slope = inner_step(chunk_loss, adapted, *support, inner, t)
        losses.append(support_loss)
        if inner.rates is not None:
            slopes.append(slope)
        del slope  # freed before the next step
    query_loss, prediction, query_gradient = loss_and_gradient(
        chunk_loss, chunk_loss.without_features(adapted), chunk.query_x, chunk.query_y
    )
    losses.append(query_loss)
    rates = RateGradient(inner)
    for t, slope in enumerate(slopes):
        rates.add(t, slope, query_gradient)
    gradient = chunk_loss.sum_over_tasks(query_gradient)
    return ChunkGradient(torch.stack(losses, dim=1), prediction, gradient, rates.result())


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
    inner = inner.with_differentiable_rates()
    adapted, losses = chunk_loss.start(theta, chunk.support_x), []
    for t in range(inner.steps):
        support_loss, _ = chunk_loss(adapted, chunk.support_x, chunk.support_y)
        slope = gradient(support_loss, chunk_loss.of_adapted(adapted), create_graph=True)
        moved = {name: adapted[name] - inner.rate(t, name) * g for name, g in slope.items()}
        adapted = adapted | moved
        losses.append(support_loss.detach())

    adapted = chunk_loss.without_features(adapted)
    query_loss, prediction = chunk_loss(adapted, chunk.query_x, chunk.query_y)
    losses.append(query_loss.detach())
    rates = dict(inner.rates or {})
    both = gradient(query_loss, theta | {name + RATE: r for name, r in rates.items()})
    return ChunkGradient(
        torch.stack(losses, dim=1),
        prediction.detach(),
        {name: both[name] for name in theta},
        {name: both[name + RATE] for name in rates},
    )
