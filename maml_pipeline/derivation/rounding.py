"""How far rounding alone can move a linear unit's meta-gradient from its exact value.

Three ways of computing one gradient never agree to the last bit. What they may differ by follows from
the dtype and from the numbers at hand, by a running error analysis to first order in the unit
roundoff u: each operation adds its own rounding, and every later inner step multiplies what has
gathered by the spectral radius of I - alpha H_s, which is symmetric.
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
        dtype: What the arithmetic is done in.

    References:
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, sections 3.1
        (a sum of n products is off by n u times the sum of their magnitudes) and 3.3.
    """

    def __init__(self, task: Task, inner: InnerLoop, dtype: torch.dtype) -> None:
        task = Task(*(tensor.double() for tensor in task))
        n = task.support_x.shape[1] + 1
        # The sums over the points and over the inputs, and what a prediction, a residual, the mean,
        # the factor 2, the learning rate and the subtraction round besides.
        operations = len(task.support_x) + len(task.query_x) + n + 8
        self.n = n
        self.unit = operations * torch.finfo(dtype).eps / 2
        self.tiny = torch.finfo(dtype).tiny  # below it, rounding is absolute
        self.inner = inner

        H_s, _ = quadratic(task.support_x, task.support_y)
        self.radius: Tensor = torch.linalg.eigvalsh(torch.eye(n) - inner.lr * H_s).abs().max()
        # Magnitudes without the cancellation that the exact quantities enjoy.
        self.support_h, self.support_b = _magnitudes(task.support_x, task.support_y)
        self.query_h, self.query_b = _magnitudes(task.query_x, task.query_y)
        self.query_y = task.query_y.square().mean().sqrt()

    def of_gradient(self, thetas: Sequence[Tensor], query_gradient: Tensor) -> Tensor:
        """Bound the error of the meta-gradient.

        Args:
            thetas: The parameters before each inner step and after the last: k + 1 of `(D + 1,)`.
            query_gradient: The query loss's gradient at the fast weights `(D + 1,)`.

        Returns:
            A scalar.
        """
        norms = [theta.double().norm() for theta in thetas]
        error: Tensor = self.query_h * self._of_fast_weights(norms)
        error = error + self.unit * (self.query_h * norms[-1] + self.query_b) + self.tiny
        if self.inner.first_order:
            return error
        norm = query_gradient.double().norm()
        for _ in range(self.inner.steps):
            # n: a product of matrices rounds relative to their entries' magnitudes.
            rounding = self.n * self.unit * (1 + self.inner.lr * self.support_h) * norm
            error = self.radius * error + rounding + self.tiny
            norm = self.radius * norm
        return error

    def of_difference(
        self, thetas: Sequence[Tensor], step: Tensor, losses: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Bound the error of (losses[0] - losses[1]) / (2 step).

        Args:
            thetas: As in `of_gradient`, between the two points that are compared.
            step: How far each of the two is away, along one parameter.
            losses: The query loss at either.

        Returns:
            A scalar.
        """
        norms = []
        reach = step
        for theta in thetas:
            norms.append(theta.double().norm() + reach)
            reach = self.radius * reach
        x = (self.query_h / 2).sqrt()
        residual = x * self._of_fast_weights(norms)
        residual = residual + self.unit * (x * norms[-1] + self.query_y) + self.tiny
        # A loss is the mean of squared residuals; Cauchy and Schwarz bound what theirs do to it.
        errors = [2 * loss.sqrt() * residual + self.unit * loss + self.tiny for loss in losses]
        bound: Tensor = (errors[0] + errors[1]) / (2 * step)
        return bound

    def _of_fast_weights(self, norms: Sequence[Tensor]) -> Tensor:
        error = torch.zeros((), dtype=torch.float64)
        for norm in norms[:-1]:
            size = norm + self.inner.lr * (self.support_h * norm + self.support_b)
            error = self.radius * error + self.unit * size + self.tiny
        return error


def _magnitudes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Bound the norms of H and b when every product in them is taken as positive."""
    X = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).abs()
    return 2 / len(X) * X.square().sum(), (2 / len(X) * X.T @ y.abs().squeeze(1)).norm()
