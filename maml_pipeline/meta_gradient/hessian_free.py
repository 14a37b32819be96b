"""The Hessian-free method: the reverse sweep with differences of gradients, without second derivatives.

The adjoint recursion is that of checkpointed.py, a_t = a_{t+1} - alpha H(theta_t) a_{t+1}. With g the
gradient of the support loss, the product of its Hessian and a vector v is the derivative of g along v,
computed twice from three gradients, and without a second derivative:

    ahead  = (g(theta + e v) - g(theta)) / e,
    behind = (g(theta) - g(theta - e v)) / e.

Kinks decide how. A ReLU has no derivative at its kink; where a unit crosses it between the two points of
a difference, the difference contains the jump of the gradient, divided by e. The number of crossings is
in proportion to e, and their effect to 1 / e, so no e makes the mean error small: only an e for which a
crossing is improbable does. On Omniglot 20-way the gradients of a task at initial parameters lie on two
sides of a kink with probability 0.07 at e |v| = 1e-7 (1 + |theta|). The rounding of float32 leaves no
such e; at 1e-9 the probability is 7e-4, on both sides 5e-7. Therefore three rules:

1. Each gradient of a difference is computed in float64, whatever the type of the network and also under
   autocast. All else stays in the network's type.
2. e |v| = 1e-9 (1 + |theta|) for each task. On the networks of docs/engines.md the error of rounding,
   about eps / (e |v|), and of truncation, about e |v|, then add up to the least, 1e-7 of the product.
3. The shorter of `ahead` and `behind` is the product: of two that differ, the longer contains a jump.
   Only if both do is the product wrong. This is how essentially non-oscillatory schemes choose among
   differences beside a discontinuity.

`scripts/measure_hessian_free.py` measures errors and steps; docs/engines.md has its tables.

References:
    Fallah, Mokhtari, Ozdaglar, "On the Convergence Theory of Gradient-Based Model-Agnostic
    Meta-Learning Algorithms", 2020 (HF-MAML, for one inner step); Pearlmutter, "Fast Exact
    Multiplication by the Hessian", 1994 (the difference and its rounding error); Nocedal, Wright,
    "Numerical Optimization", 2006, section 8.1 (steps of differences); Harten, Engquist, Osher,
    Chakravarthy, "Uniformly High Order Accurate Essentially Non-oscillatory Schemes, III", 1987 (the
    shorter difference).
"""

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.adaptation import ChunkGradient, gradient
from maml_pipeline.meta_gradient.checkpointed import sweep
from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.meta_gradient.stateless import double
from maml_pipeline.tasks import TaskBatch

RELATIVE_STEP = 1e-9
"""e |v| / (1 + |theta|)."""


def hessian_free(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop
) -> ChunkGradient:
    """Carry the adjoint back as `checkpointed` does, with differences of gradients.

    Time: at most k + n + 1 gradients, and 3 n in float64. Memory: that of first order in float64, a few
    P, and about sqrt(2 n) P of parameter checkpoints.

    When to use: a layer has no second derivative in PyTorch, or a wrong one.

    Weaknesses: float64, which takes twice the time and memory of float32 on a CPU, is far slower on most
    GPUs, and is missing on some devices; a network must run in it. The error is about 1e-6, unless units
    cross a kink on both sides of a task's parameters: then that task's product is wrong by orders of
    magnitude. Before training, the error is measured, and a large one reported. Inner steps must repeat
    exactly, so networks that draw random numbers are rejected.

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

    def slope(sign: int) -> Parameters:
        moved = {
            name: double(theta[name]) + sign * _aligned(e, v) * double(v) for name, v in vector.items()
        }
        parameters = {name: double(p).detach().requires_grad_() for name, p in (theta | moved).items()}
        del moved
        # The losses are divided by e, and not the gradients: those of shared parameters are summed over
        # tasks, each of which has an e of its own.
        return gradient(chunk_loss.in_double(parameters, x, y) / e, parameters)

    centre, ahead = slope(0), slope(1)
    for name, p in theta.items():  # a difference needs the network's precision alone
        ahead[name] = (ahead[name] - centre[name]).to(p.dtype)
    behind = slope(-1)
    for name, p in theta.items():
        behind[name] = (centre.pop(name) - behind[name]).to(p.dtype)
    return shorter(ahead, behind, chunk_loss.shared)


def step_sizes(theta: Parameters, vector: Parameters) -> Tensor:
    """Return e of each task `(T,)`; 1 for a vector of zeros, whose product is zero for any e."""
    length = _squares(vector).sqrt()
    distance = RELATIVE_STEP * (1 + _squares(theta).sqrt())
    return torch.where(length > 0, distance / length, torch.ones_like(length))


def shorter(a: Parameters, b: Parameters, shared: frozenset[str] = frozenset()) -> Parameters:
    """Choose for each task the shorter of two vectors; for all at once if parameters are shared.

    Args:
        a: Of parameters `(T, ...)`, and of shared ones `(...)`. Emptied.
        b: The same.
        shared: Names of the shared parameters, whose part is a sum over tasks.
    """
    of_a, of_b = (_squares(v, shared) for v in (a, b))
    takes_a = of_a <= of_b
    return {name: torch.where(_aligned(takes_a, b[name]), a.pop(name), b.pop(name)) for name in [*a]}


def _squares(parameters: Parameters, shared: frozenset[str] = frozenset()) -> Tensor:
    """Return the squared length of each task's part `(T,)` in float64, or of all if some are shared."""
    tasks = 1 if shared else len(next(iter(parameters.values())))
    squares = [p.double().square().reshape(tasks, -1).sum(1) for p in parameters.values()]
    return torch.stack(squares).sum(0)


def _aligned(per_task: Tensor, like: Tensor) -> Tensor:
    """Reshape `(T,)` so that it multiplies `(T, ...)`, and `(1,)` any shape."""
    if len(per_task) == 1:
        return per_task.reshape([1] * like.dim()) if like.dim() else per_task[0]
    return per_task.reshape(-1, *([1] * (like.dim() - 1)))
