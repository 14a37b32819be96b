"""The Hessian-free method: the reverse sweep with differences of gradients, without second derivatives.

The adjoint recursion is that of checkpointed.py, a_t = a_{t+1} - alpha H(theta_t) a_{t+1}. With g the
gradient of the support loss, the product of its Hessian and a vector v is the derivative of g along v,

    H(theta) v = (g(theta + e v) - g(theta - e v)) / (2 e) + O(e^2 |v|^3),

two gradients. The step rule is e |v| = eps^(1/2) (1 + |theta|), for each task: the adapted parameters
move by a distance in proportion to their own norm, whatever the norm of v, where eps is the precision in
which the gradients are computed. The rounding error of the gradients, eps / (e |v|), is then about
eps^(1/2), 1e-8 in float64 and 3e-4 in float32; the truncation error (e |v|)^2 is eps, times constants
that depend on the loss. eps^(1/3), which balances the two where all constants are 1, was up to a hundred
times less accurate in float32: v may move a few parameters far, so the constant of truncation is large.

A ReLU has no derivative at its kink. Where a unit crosses it between theta - e v and theta + e v, the
difference contains the bend of the loss, divided by 2 e, which autograd's second derivative leaves out.
`scripts/measure_hessian_free.py` measures all of these errors; docs/engines.md has its table.

References:
    Fallah, Mokhtari, Ozdaglar, "On the Convergence Theory of Gradient-Based Model-Agnostic
    Meta-Learning Algorithms", 2020 (HF-MAML, for one inner step); Pearlmutter, "Fast Exact
    Multiplication by the Hessian", 1994 (the difference and its rounding error); Nocedal, Wright,
    "Numerical Optimization", 2006, section 8.1 (central differences).
"""

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.adaptation import ChunkGradient, gradient
from maml_pipeline.meta_gradient.checkpointed import sweep
from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.tasks import TaskBatch


def hessian_free(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop
) -> ChunkGradient:
    """Carry the adjoint back as `checkpointed` does, with central differences of gradients.

    Time: at most k + 3 n + 1 gradients. Memory: that of first order, a few P, and about sqrt(2 n) P of
    parameter checkpoints.

    When to use: a layer has no second derivative in PyTorch, or a wrong one; or `checkpointed` does not
    fit into memory.

    Weaknesses: not exact. The error is small for smooth networks, and may be larger than that of first
    order for networks with kinks, such as ReLU's: the first use measures it in the network's type, and
    warns. Inner steps must repeat exactly, so networks that draw random numbers are rejected.

    Also known as HF-MAML, and as finite-difference Hessian-vector products.

    The step rule, the errors and the references are at the top of this file.
    """

    def product(theta_t: Parameters, vector: Parameters) -> Parameters:
        support = chunk.support_x, chunk.support_y
        return difference_of_gradients(chunk_loss, theta_t, *support, chunk_loss.of_adapted(vector))

    return sweep(chunk_loss, theta, chunk, inner, product)


def difference_of_gradients(
    chunk_loss: ChunkLoss, theta: Parameters, x: Tensor, y: Tensor, vector: Parameters
) -> Parameters:
    """Multiply the derivative of each task's gradient at theta by the task's vector.

    Args:
        chunk_loss: Loss of each task.
        theta: Parameters of each task.
        x: Inputs `(T, S, ...)`.
        y: Targets `(T, S, ...)`.
        vector: Of the adapted parameters, `(T, ...)`: only they move.

    Returns:
        The product, of all parameters.
    """
    e = step_sizes(chunk_loss.of_adapted(theta), vector)
    # The losses are divided by 2 e, and not the gradients: those of shared parameters are summed over
    # tasks, each of which has an e of its own.
    weights = 1 / (2 * e)

    def slope(sign: int) -> Parameters:
        moved = {name: theta[name] + sign * _aligned(e, v) * v for name, v in vector.items()}
        parameters = {name: p.detach().requires_grad_() for name, p in (theta | moved).items()}
        del moved
        losses, _ = chunk_loss(parameters, x, y)
        return gradient(weights.to(losses.dtype) * losses, parameters)

    difference, behind = slope(1), slope(-1)
    for name in difference:
        difference[name] = difference[name] - behind.pop(name)
    return difference


def step_sizes(theta: Parameters, vector: Parameters) -> Tensor:
    """Return e of each task `(T,)`; 1 for a vector of zeros, whose product is zero for any e."""
    root = precision(theta) ** (1 / 2)
    length = _norms(vector)
    return torch.where(length > 0, root * (1 + _norms(theta)) / length, torch.ones_like(length))


def precision(parameters: Parameters) -> float:
    """Return eps of the coarsest type in which a gradient is computed, also under autocast."""
    types = {p.dtype for p in parameters.values()}
    device = next(iter(parameters.values())).device.type
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in types)


def _norms(parameters: Parameters) -> Tensor:
    squares = [p.reshape(len(p), -1).square().sum(1) for p in parameters.values()]
    return torch.stack(squares).sum(0).sqrt()


def _aligned(per_task: Tensor, like: Tensor) -> Tensor:
    """Reshape `(T,)` so that it multiplies `(T, ...)`, in its type."""
    return per_task.reshape(-1, *([1] * (like.dim() - 1))).to(like.dtype)
