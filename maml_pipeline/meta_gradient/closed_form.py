"""The meta-gradient of a linear network with squared error in closed form."""

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.inner_loop import InnerLoop
from maml_pipeline.tasks import Task


def linear_meta_gradient(theta: Tensor, task: Task, inner: InnerLoop) -> Tensor:
    """Compute the meta-gradient of `nn.Linear(D, 1)` in closed form, for any number of inner steps.

    The support loss is quadratic with Hessian H_s, so theta_k is affine in theta with slope
    (I - alpha H_s)^k. The chain rule gives (I - alpha H_s)^k times the query gradient at theta_k
    for second order, and (I - alpha H_s)^n if the last n steps are differentiated; first order is the
    query gradient alone, n = 0.

    Args:
        theta: Weights followed by the bias, `(D + 1,)`.
        task: One task with inputs `(S, D)`, `(Q, D)` and targets `(S, 1)`, `(Q, 1)`.
        inner: Inner learning rate, steps and gradient order; the loss is the mean squared error.

    Returns:
        The gradient of the query loss after adaptation, `(D + 1,)`.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, equation 1.
    """
    H_s, b_s = quadratic(task.support_x, task.support_y)
    H_q, b_q = quadratic(task.query_x, task.query_y)
    A = torch.eye(len(theta), dtype=theta.dtype) - inner.lr * H_s

    theta_k = theta
    for _ in range(inner.steps):
        theta_k = A @ theta_k + inner.lr * b_s
    query_gradient = H_q @ theta_k - b_q
    differentiated = inner.steps - inner.first_differentiated_step
    meta_gradient: Tensor = torch.linalg.matrix_power(A, differentiated) @ query_gradient
    return meta_gradient


def quadratic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return H and b such that the gradient of the mean squared error of `nn.Linear` is H theta - b.

    Args:
        x: Inputs `(S, D)`.
        y: Targets `(S, 1)`.

    Returns:
        The Hessian H `(D + 1, D + 1)` and b `(D + 1,)`, weights followed by the bias.
    """
    X = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    return 2 / len(X) * X.T @ X, 2 / len(X) * X.T @ y.squeeze(1)
