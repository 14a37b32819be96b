"""Compute a meta-gradient in first order, or in second order by one of three methods.

Two of them, checkpointed.py and hessian_free.py, are in files of their own.

Each returns, summed over the T tasks of a chunk, the derivative of the query loss after adaptation,

    d L_query(theta_k) / d theta_0   with   theta_{t+1} = theta_t - alpha grad L_support(theta_t);

First order replaces d theta_k / d theta_0 by the identity. Truncated second order replaces
d theta_{k-n} / d theta_0 by it, and differentiates through the last n inner steps alone.

Inner steps move the adapted parameters phi of theta = (phi, psi); psi is fixed in the inner loop. The
derivative with respect to psi is the query loss's own at (phi_k, psi) and, except in first order, what
reaches it through the differentiated support gradients. What the network computes before any of phi
takes part, its fixed prefix, is computed once for the support set.

In the costs below, k is the number of inner steps, n the number of differentiated ones, P the size of
the parameters, A the size of the activations of one forward pass, and a gradient is one forward and one
backward pass. Costs are per task.
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
from maml_pipeline.meta_gradient.hessian_free import hessian_free
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
    if inner.is_first_order:
        return first_order(chunk_loss, theta, chunk, inner)
    if inner.method is Method.CHECKPOINTED:
        return checkpointed(chunk_loss, theta, chunk, inner)
    if inner.method is Method.HESSIAN_FREE:
        return hessian_free(chunk_loss, theta, chunk, inner)
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
    adapted, losses, rates = chunk_loss.start(theta, chunk.support_x), [], RateGradient(inner)
    for t in range(inner.steps):
        adapted, support_loss, slope = inner_step(chunk_loss, adapted, *support, inner, t)
        losses.append(support_loss)
        rates.keep(t, slope)
        del slope  # freed before the next step
    query_loss, prediction, query_gradient = loss_and_gradient(
        chunk_loss, chunk_loss.without_features(adapted), chunk.query_x, chunk.query_y
    )
    losses.append(query_loss)
    rates.add_kept(query_gradient)
    gradient = chunk_loss.sum_over_tasks(query_gradient)
    return ChunkGradient(torch.stack(losses, dim=1), prediction, gradient, rates.total)


def unrolled(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop
) -> ChunkGradient:
    """Differentiate through the last n inner steps, whose graph is kept; by default through all.

    Time: k + 1 gradients and a backward pass through n + 1 of them. Memory: several A and P for each
    differentiated step, independent of k.

    When to use: by default. It is the fastest method for second order, if it fits into memory.

    Weakness: memory is proportional to n. For many inner steps or large networks use `checkpointed`, or
    truncate. Truncation is biased: it omits the factors I - alpha H(theta_t) of the first k - n steps.
    The bias decays exponentially with n where the support loss is strongly convex.

    Also known as (plain) MAML, backpropagation through the unrolled inner loop, or `create_graph=True`;
    for differential equations, discretise-then-optimise. Truncated: K-step truncated back-propagation.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, equation 1; Shaban, Cheng, Hatch, Boots, "Truncated Back-propagation for Bilevel
        Optimization", 2019, section 3.
    """
    support = chunk.support_x, chunk.support_y
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    inner = inner.with_differentiable_rates()
    adapted, losses = chunk_loss.start(theta, chunk.support_x), []
    first, starts, rates = inner.first_differentiated_step, {}, RateGradient(inner)
    if first:
        moved = adapted
        for t in range(first):
            moved, support_loss, slope = inner_step(chunk_loss, moved, *support, inner, t)
            losses.append(support_loss)
            rates.keep(t, slope)
            del slope  # freed before the next step
        starts = {n: p.detach().requires_grad_() for n, p in chunk_loss.of_adapted(moved).items()}
        adapted = adapted | starts
        del moved
    for t in range(first, inner.steps):
        support_loss, _ = chunk_loss(adapted, *support)
        slope = gradient(support_loss, chunk_loss.of_adapted(adapted), create_graph=True)
        moved = {name: adapted[name] - inner.rate(t, name) * g for name, g in slope.items()}
        adapted = adapted | moved
        losses.append(support_loss.detach())

    adapted = chunk_loss.without_features(adapted)
    query_loss, prediction = chunk_loss(adapted, chunk.query_x, chunk.query_y)
    losses.append(query_loss.detach())
    learned = {name + RATE: r for name, r in (inner.rates or {}).items()}
    found = gradient(query_loss, theta | starts | learned)
    rates.add_kept(found)
    for name in learned:
        rates.total[name.removesuffix(RATE)] += found.pop(name)
    # With respect to theta, autograd sums the gradients of the tasks; each has a start of its own.
    meta_gradient = {name: g.sum(0) if name in starts else g for name, g in found.items()}
    return ChunkGradient(torch.stack(losses, dim=1), prediction.detach(), meta_gradient, rates.total)
