"""Bound how far rounding can move a linear unit's meta-gradient from its exact value.

Three methods of computing one gradient never agree to the last bit. The bound on their difference
follows from the dtype and the values by a running error analysis, to first order in the unit
roundoff u: each operation adds its rounding error, and each later inner step multiplies the
accumulated error by at most the spectral radius of I - alpha H_s, a symmetric matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.meta_gradient.closed_form import quadratic
from maml_pipeline.tasks import Task


class RoundingError:
    """Bound the rounding errors of one task, in the Euclidean norm.

    Args:
        task: One task with inputs `(S, D)`, `(Q, D)` and targets `(S, 1)`, `(Q, 1)`.
        inner: Inner learning rate, steps and gradient order.
        dtype: Floating-point type of the computation.

    References:
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 3.1
        (the error of a sum of n products is at most n u times the sum of their magnitudes) and 3.3.
    """

    def __init__(self, task: Task, inner: InnerLoop, dtype: torch.dtype) -> None:
        task = Task(*(tensor.double() for tensor in task))
        n = task.support_x.shape[1] + 1
        # Roundings: the sums over points and inputs, plus 8 for a prediction, a residual, the mean,
        # the factor 2, the learning rate and the subtraction.
        operations = len(task.support_x) + len(task.query_x) + n + 8
        self.n = n
        self.unit = operations * torch.finfo(dtype).eps / 2
        self.tiny = torch.finfo(dtype).tiny  # below it, rounding errors are absolute
        self.inner = inner

        H_s, _ = quadratic(task.support_x, task.support_y)
        self.radius: Tensor = torch.linalg.eigvalsh(torch.eye(n) - inner.lr * H_s).abs().max()
        # Norms with every product taken as positive, so that nothing cancels.
        self.support_h, self.support_b = _magnitudes(task.support_x, task.support_y)
        self.query_h, self.query_b = _magnitudes(task.query_x, task.query_y)
        self.query_y = task.query_y.square().mean().sqrt()

    def gradient_bound(self, thetas: Sequence[Tensor], query_gradient: Tensor) -> Tensor:
        """Bound the error of the meta-gradient.

        Args:
            thetas: Parameters before each inner step and after the last: k + 1 tensors `(D + 1,)`.
            query_gradient: Gradient of the query loss at the fast weights, `(D + 1,)`.

        Returns:
            A scalar.
        """
        norms = [theta.double().norm() for theta in thetas]
        error: Tensor = self.query_h * self._fast_weights_bound(norms)
        error = error + self.unit * (self.query_h * norms[-1] + self.query_b) + self.tiny
        if self.inner.first_order:
            return error
        norm = query_gradient.double().norm()
        for _ in range(self.inner.steps):
            # n, because a matrix product rounds relative to its entries' magnitudes.
            rounding = self.n * self.unit * (1 + self.inner.lr * self.support_h) * norm
            error = self.radius * error + rounding + self.tiny
            norm = self.radius * norm
        return error

    def difference_bound(
        self, thetas: Sequence[Tensor], step: Tensor, losses: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Bound the error of (losses[0] - losses[1]) / (2 step).

        Args:
            thetas: As in `gradient_bound`, for the point midway between the two that are compared.
            step: Distance of the two points from it, along one parameter.
            losses: Query loss at the two points.

        Returns:
            A scalar.
        """
        norms = []
        reach = step
        for theta in thetas:
            norms.append(theta.double().norm() + reach)
            reach = self.radius * reach
        x = (self.query_h / 2).sqrt()
        residual = x * self._fast_weights_bound(norms)
        residual = residual + self.unit * (x * norms[-1] + self.query_y) + self.tiny
        # A loss is the mean of squared residuals; the Cauchy-Schwarz inequality bounds its error.
        errors = [2 * loss.sqrt() * residual + self.unit * loss + self.tiny for loss in losses]
        bound: Tensor = (errors[0] + errors[1]) / (2 * step)
        return bound

    def _fast_weights_bound(self, norms: Sequence[Tensor]) -> Tensor:
        """Bound the error of the parameters after the last step."""
        error = torch.zeros((), dtype=torch.float64)
        for norm in norms[:-1]:
            size = norm + self.inner.lr * (self.support_h * norm + self.support_b)
            error = self.radius * error + self.unit * size + self.tiny
        return error


def _magnitudes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Bound the norms of H and b with every product in them taken as positive."""
    X = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).abs()
    return 2 / len(X) * X.square().sum(), (2 / len(X) * X.T @ y.abs().squeeze(1)).norm()
