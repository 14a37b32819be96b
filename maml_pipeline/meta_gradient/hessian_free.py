"""The Hessian-free method: the reverse sweep with differences of gradients, without second derivatives.

The adjoint recursion is that of checkpointed.py, a_t = a_{t+1} - alpha H(theta_t) a_{t+1}. With g the
gradient of the support loss, the product of its Hessian and a vector v is the derivative of g along v,

    H(theta) v = (g(theta + e v) - g(theta - e v)) / (2 e) + O(e^2 |v|^3),

two gradients. The step rule is e |v| = eps^(1/3) (1 + |theta|), for each task: the parameters move by
a distance in proportion to their own norm, whatever the norm of v, where eps is the precision in which
the gradients are computed. It balances the truncation error, of the order of (e |v|)^2, against the
rounding error of the gradients, of the order of eps / (e |v|): both are about eps^(2/3), 4e-11 in
float64 and 2e-5 in float32, times constants that depend on the loss.

A ReLU has no derivative at its kink. Where a unit crosses it between theta - e v and theta + e v, the
difference contains the bend of the loss, which autograd's second derivative leaves out.
`scripts/measure_hessian_free.py` measures all of these errors; docs/engines.md has its table.

References:
    Fallah, Mokhtari, Ozdaglar, "On the Convergence Theory of Gradient-Based Model-Agnostic
    Meta-Learning Algorithms", 2020 (HF-MAML, for one inner step); Pearlmutter, "Fast Exact
    Multiplication by the Hessian", 1994 (the difference and its rounding error); Nocedal, Wright,
    "Numerical Optimization", 2006, section 8.1 (central differences and the cube root of eps).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.adaptation import ChunkGradient, loss_and_gradient
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

    Weaknesses: not exact. The error of float32 is small for smooth networks, larger with ReLU, and large
    in reduced precision. Inner steps must repeat exactly, so networks that draw random numbers are
    rejected.

    Also known as HF-MAML, and as finite-difference Hessian-vector products.

    The step rule, the errors and the references are at the top of this file.
    """

    def slope(theta_t: Parameters) -> Parameters:
        return loss_and_gradient(chunk_loss, theta_t, chunk.support_x, chunk.support_y)[2]

    def product(theta_t: Parameters, vector: Parameters) -> Parameters:
        return difference_of_gradients(slope, theta_t, vector)

    return sweep(chunk_loss, theta, chunk, inner, product)


def difference_of_gradients(
    slope: Callable[[Parameters], Parameters], theta: Parameters, vector: Parameters
) -> Parameters:
    """Multiply the derivative of each task's gradient at theta by the task's vector.

    Args:
        slope: theta `(T, ...)` -> the gradient of each task, `(T, ...)`.
        theta: Parameters `(T, ...)`.
        vector: Of the same shapes.
    """
    e = step_sizes(theta, vector)

    def displaced(sign: int) -> Parameters:
        return {name: p + sign * _aligned(e, p).to(p.dtype) * vector[name] for name, p in theta.items()}

    difference = slope(displaced(1))
    behind = slope(displaced(-1))
    for name, g in difference.items():
        difference[name] = (g - behind.pop(name)) / (2 * _aligned(e, g).to(g.dtype))
    return difference


def step_sizes(theta: Parameters, vector: Parameters) -> Tensor:
    """Return e of each task `(T,)`; 1 for a vector of zeros, whose product is zero for any e."""
    root = precision(theta) ** (1 / 3)
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
    return torch.stack([s.to(squares[0].dtype) for s in squares]).sum(0).sqrt()


def _aligned(per_task: Tensor, like: Tensor) -> Tensor:
    """Reshape `(T,)` so that it multiplies `(T, ...)`."""
    return per_task.reshape(-1, *([1] * (like.dim() - 1)))
