"""The checkpointed method: second order without keeping the graph of the inner loop.

The inner loop is theta_{t+1} = theta_t - alpha g(theta_t), where g is the gradient of the support loss
and H its Hessian. The adjoint of step t is a_t = d L_query(theta_k) / d theta_t. By the chain rule,
since H is symmetric,

    a_k = grad L_query(theta_k),
    a_t = (I - alpha H(theta_t)) a_{t+1} = a_{t+1} - alpha H(theta_t) a_{t+1},   t = k - 1, ..., 0,

and a_0 is the meta-gradient: one Hessian-vector product per step, in reverse order. Truncated second
order stops at a_{k-n}. A step needs theta_t alone. Its activations are recomputed, and freed before the
next step.

If only the parameters phi of theta = (phi, psi) adapt, psi_{t+1} = psi_t, and the same adjoint is

    a_t = a_{t+1} - alpha (d^2 L_support / (d theta d phi))(theta_t) a^phi_{t+1}:

its part of psi accumulates mixed derivatives. So does that of the features of the network's fixed
prefix, which count as fixed parameters during the sweep; after it, their adjoint is carried back to psi.

A learned inner learning rate alpha_{t,p} of parameter p has the gradient -<a_{t+1,p}, g(theta_t)_p>,
and alpha_t multiplies a_{t+1} before its Hessian-vector product.

Nor is every theta_t kept. The n differentiated steps are divided into segments of L, L - 1, ..., 1
steps, with L the smallest integer such that L (L + 1) / 2 >= n. Only the first theta_t of each segment
is a checkpoint; the sweep recomputes the others of a segment when it reaches it. The earlier a segment,
the fewer checkpoints remain in front of it, so the longer it may be: at most L - 1, about sqrt(2 n),
copies of the parameters are held besides the current one. Each inner step is recomputed at most once.

The Hessian-vector products are reverse-over-reverse. Forward-over-reverse held more memory and took
longer on each network of this project (PyTorch 2.15): it carries a tangent with every activation.

References:
    Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
    differentiation", 1992 (treeverse); Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear
    Memory Cost", 2016 (keeping some states and recomputing the others); Kemaev et al., "Scalable
    Meta-Learning via Mixed-Mode Differentiation", 2025 (Hessian-vector products in the sweep).
"""

from collections.abc import Callable
from math import ceil, sqrt

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.adaptation import (
    ChunkGradient,
    RateGradient,
    gradient,
    inner_step,
    loss_and_gradient,
    support_gradient,
)
from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss, is_feature
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.tasks import TaskBatch

Product = Callable[[Parameters, Parameters], Parameters]
"""(theta_t, vector) -> the Hessian of each task's support loss at theta_t, times the task's vector."""


def checkpointed(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop
) -> ChunkGradient:
    """Adapt without a graph, then carry the adjoint back step by step from parameter checkpoints.

    Time: at most k + n + 1 gradients, and n Hessian-vector products. Memory: several A for one
    Hessian-vector product, and about sqrt(2 n) P. At k = 10 it needs a fifth of the memory of `unrolled`
    on the 5-way ConvNet (`tests/test_engine_memory.py`).

    When to use: `unrolled` does not fit into memory.

    Weaknesses: slower than `unrolled`. Inner steps must repeat exactly, so networks that draw random
    numbers, as dropout does, are rejected.

    Also known as the (discrete) adjoint method, reverse sweep, gradient checkpointing or
    rematerialisation. Related: treeverse, revolve and binomial checkpointing, which recompute steps
    several times to hold only about log k states; here each step is recomputed at most once.

    The derivation and the references are at the top of this file.
    """
    support = chunk.support_x, chunk.support_y

    def product(theta_t: Parameters, vector: Parameters) -> Parameters:
        return hessian_vector_product(chunk_loss, theta_t, *support, vector)

    return sweep(chunk_loss, theta, chunk, inner, product)


def sweep(
    chunk_loss: ChunkLoss,
    theta: Parameters,
    chunk: TaskBatch,
    inner: InnerLoop,
    product: Product,
) -> ChunkGradient:
    """Adapt without a graph, then carry the adjoint back with any Hessian-vector product."""
    support = chunk.support_x, chunk.support_y
    first = inner.first_differentiated_step

    rates = RateGradient(inner)

    def step(theta_t: Parameters, t: int) -> Parameters:
        return inner_step(chunk_loss, theta_t, *support, inner, t)[0]

    def learn_rates(theta_t: Parameters, t: int, adjoint: Parameters) -> None:
        if inner.rates is not None:
            rates.add(t, support_gradient(chunk_loss, theta_t, *support)[1], adjoint)

    adapted, losses = chunk_loss.start(theta, chunk.support_x), []
    features = {name: p for name, p in adapted.items() if is_feature(name)}
    checkpoints = ParameterCheckpoints(inner.steps - first)
    for t in range(inner.steps):
        if t >= first:
            checkpoints.save(t - first, adapted)
        adapted, support_loss, slope = inner_step(chunk_loss, adapted, *support, inner, t)
        if t < first:
            rates.keep(t, slope)
        del slope  # freed before the next step
        losses.append(support_loss)

    query_loss, prediction, adjoint = loss_and_gradient(
        chunk_loss, chunk_loss.without_features(adapted), chunk.query_x, chunk.query_y
    )
    losses.append(query_loss)
    del adapted  # freed before the sweep
    adjoint |= {name: torch.zeros_like(feature) for name, feature in features.items()}
    adjoint = reverse_sweep(adjoint, checkpoints, step, product, learn_rates, inner)
    rates.add_kept(adjoint)
    of_features = {name: adjoint.pop(name) for name in features}
    meta_gradient = chunk_loss.sum_over_tasks(adjoint)
    if features:
        through_prefix = features_gradient(chunk_loss, theta, chunk.support_x, of_features)
        meta_gradient |= {name: meta_gradient[name] + g for name, g in through_prefix.items()}
    return ChunkGradient(torch.stack(losses, dim=1), prediction, meta_gradient, rates.total)


def hessian_vector_product(
    chunk_loss: ChunkLoss, theta: Parameters, x: Tensor, y: Tensor, vector: Parameters
) -> Parameters:
    """Multiply the Hessian of each task's loss at theta by the task's vector.

    Only the vector's adapted parameters phi count, since only they move: the product is that of the
    columns d^2 L / (d theta d phi) with them.
    """
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    losses, _ = chunk_loss(theta, x, y)
    slopes = gradient(losses, chunk_loss.of_adapted(theta), create_graph=True)
    # A slope without a graph is constant: its curvature is zero. Once they are multiplied, the graph
    # refers to the vector and no longer to the slopes.
    directional = [(slope * vector[name]).sum() for name, slope in slopes.items() if slope.requires_grad]
    del losses, slopes
    if not directional:
        return {name: torch.zeros_like(v) for name, v in vector.items()}
    return gradient(torch.stack(directional), theta)


def features_gradient(
    chunk_loss: ChunkLoss, theta: Parameters, support_x: Tensor, adjoint: Parameters
) -> Parameters:
    """Carry the adjoint of the fixed prefix's features back to the parameters that all tasks share."""
    shared = {name: theta[name].detach().requires_grad_() for name in chunk_loss.shared}
    features = chunk_loss.start(theta | shared, support_x)
    directional = [(features[name] * a).sum() for name, a in adjoint.items()]
    return gradient(torch.stack(directional), shared)


def reverse_sweep(
    adjoint: Parameters,
    checkpoints: "ParameterCheckpoints",
    step: Callable[[Parameters, int], Parameters],
    product: Product,
    learn_rates: Callable[[Parameters, int, Parameters], None],
    inner: InnerLoop,
) -> Parameters:
    """Compute a_{k-n} from a_k for each task of a chunk; parameters and adjoints are `(T, ...)`.

    Those of shared parameters are `(...)`, summed over tasks.

    Args:
        adjoint: a_k, the query gradient at theta_k. Overwritten.
        checkpoints: Filled while the chunk adapted. Emptied.
        step: (theta_t, t) -> theta_{t+1}.
        product: (theta_t, a_{t+1}) -> H(theta_t) a_{t+1}.
        learn_rates: Called with theta_t, t and a_{t+1}.
        inner: Inner learning rates.
    """
    first = inner.first_differentiated_step
    for t in reversed(range(first, inner.steps)):
        theta_t = checkpoints.pop(t - first, lambda theta_s, s: step(theta_s, s + first))
        learn_rates(theta_t, t, adjoint)
        if inner.rates is None:
            curvature, lr = product(theta_t, adjoint), inner.lr
        else:  # those of a step differ between parameters, so they multiply the adjoint
            scaled = {name: inner.rate(t, name) * adjoint[name] for name in inner.rates}
            curvature, lr = product(theta_t, adjoint | scaled), 1.0
            del scaled
        del theta_t  # freed before the next one is recomputed
        for name in adjoint:
            adjoint[name] = adjoint[name] - lr * curvature.pop(name)
    return adjoint


class ParameterCheckpoints:
    """The parameters from which `reverse_sweep` recomputes theta_{k-1}, ..., theta_{k-n}.

    Args:
        steps: Number of differentiated steps n; their indices start at 0 here.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._starts = segment_starts(steps)
        self._by_step: dict[int, Parameters] = {}

    def save(self, t: int, theta_t: Parameters) -> None:
        """Save theta_t if it starts a segment or lies in the last one, which is needed first."""
        if t in self._starts or t > self._starts[-1]:
            self._by_step[t] = theta_t

    def pop(self, t: int, step: Callable[[Parameters, int], Parameters]) -> Parameters:
        """Remove and return theta_t, after recomputing its segment if necessary."""
        start = max(s for s in self._starts if s <= t)
        for s in range(start, t):
            if s + 1 not in self._by_step:
                self._by_step[s + 1] = step(self._by_step[s], s)
        return self._by_step.pop(t)


def longest_segment(steps: int) -> int:
    """Return L, the smallest integer such that L (L + 1) / 2 >= n."""
    return ceil((sqrt(8 * steps + 1) - 1) / 2)


def segment_starts(steps: int) -> list[int]:
    """Return the steps at which the segments start."""
    starts, start, length = [], 0, longest_segment(steps)
    while start < steps:
        starts.append(start)
        start, length = start + length, length - 1
    return starts
