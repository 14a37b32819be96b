"""Compare one computation of an engine with plain autograd, on a few tasks and inner steps."""

from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.exactness.plain_autograd import LossesAndGradient, PlainAutograd
from maml_pipeline.meta_gradient.exactness.preservation import RandomState
from maml_pipeline.meta_gradient.exactness.second_derivative import second_derivative_is_wrong
from maml_pipeline.meta_gradient.exactness.workarounds import Workarounds
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, Parameters
from maml_pipeline.tasks import TaskBatch

_STEPS = 2
_NEARBY = 1e-2  # from the initial parameters, which may lie exactly on the kink of a ReLU


class Computation(NamedTuple):
    """One computation of an engine that is compared with plain autograd.

    Args:
        engine: Name of the engine.
        compute: (network, loss, batch, inner, workarounds) -> losses and meta-gradient.
        is_evaluation: It computes the query losses after each inner step and no meta-gradient.
        uses_vmap: It maps the network over tasks with vmap.
        uses_clones: It calls learn2learn's clones unless `Workarounds.bypass_clones` is set.
        error_remedy: Remedy for an error that plain autograd does not raise.
        random_remedy: Remedy for random numbers, if the computation does not support them.
        remedy: Remedy for a network whose result is wrong.
    """

    engine: str
    compute: Callable[[nn.Module, Loss, TaskBatch, InnerLoop, Workarounds], LossesAndGradient]
    is_evaluation: bool
    uses_vmap: bool
    uses_clones: bool
    error_remedy: str
    random_remedy: str | None
    remedy: str


class Mismatch(NamedTuple):
    """How a computation differs from plain autograd: an error, or how much and where."""

    error: str | None
    difference: float
    where: str


class Comparison:
    """One computation, network and loss, in the network's current type.

    Args:
        computation: The engine's computation.
        network: Its parameters are overwritten: use it within `preserve_state`.
        loss: (prediction, target) -> scalar.
        tasks: A few tasks, in the network's type.
        inner: The run's inner loop; at most two steps are taken.
        workarounds: Selects the attention kernel of plain autograd.
    """

    def __init__(
        self,
        computation: Computation,
        network: nn.Module,
        loss: Loss,
        tasks: TaskBatch,
        inner: InnerLoop,
        workarounds: Workarounds,
    ) -> None:
        self.computation, self.network, self.loss, self.tasks = computation, network, loss, tasks
        self.support = tasks.support_x[0], tasks.support_y[0]
        plain = Workarounds(copy_inputs=True, math_attention=workarounds.math_attention)
        self.plain_autograd = PlainAutograd(network, loss, plain, inner.adapt)
        theta = {name: p.detach().clone() for name, p in self.plain_autograd.parameters.items()}
        epsilon = max(torch.finfo(p.dtype).eps for p in theta.values())
        self.tolerance, self.tiny = max(1e-6, epsilon**0.5), max(1e-7, 8 * epsilon)
        self.generator = torch.Generator().manual_seed(0)
        self.random_state = RandomState(tasks.support_x.device)
        self.points = [self._near(theta, _NEARBY) for _ in range(2)]
        self.inner = self._few_steps(inner)

    def mismatch(self, workarounds: Workarounds) -> Mismatch | None:
        """Return how the computation differs at both of two points near theta; `None` if it does not."""
        mismatch = None
        for theta in self.points:
            expected = self._expected(theta)
            if not expected.losses.isfinite().all():
                continue  # training stops there with an error of its own
            self.plain_autograd.set_parameters(theta)
            self.random_state.restore()
            try:
                actual = self.computation.compute(
                    self.network, self.loss, self.tasks, self.inner, workarounds
                )
            except (torch.OutOfMemoryError, UserError):
                raise
            except (RuntimeError, ValueError, TypeError) as error:
                return Mismatch(first_sentence(error), 0, "")
            difference, where = _difference(actual, expected)
            if difference <= self.tolerance:
                return None
            # Coarse rounding and sharp bends also make the network differ from itself nearby.
            itself, _ = _difference(self._expected(self._near(theta, self.tiny)), expected)
            if difference <= 30 * itself:
                return None
            mismatch = Mismatch(None, difference, where)
        return mismatch

    def second_derivative_is_wrong(self) -> bool:
        """Tell whether Hessian-vector products differ from finite differences at both of two points.

        The products of `hessian_free` are finite differences themselves. The comparison then tells
        whether u^T J d = d^T J u: the derivative J of a gradient is symmetric, unless the gradient is
        not that of the loss values.
        """
        if self.computation.is_evaluation or self.inner.is_first_order:
            return False
        plain = self.plain_autograd
        is_free = self.inner.method is Method.HESSIAN_FREE
        multiply = plain.difference_of_gradients if is_free else plain.hessian_vector_product

        def slope(theta: Parameters) -> Parameters:
            self.random_state.restore()
            return self.plain_autograd.gradient(theta, *self.support)[1]

        def product(theta: Parameters, vector: Parameters) -> Parameters:
            if is_free:  # it multiplies adjoints, which are zero in parameters excluded from learning
                excluded = {name: g == 0 for name, g in slope(theta).items()}
                vector = {name: v.masked_fill(excluded[name], 0) for name, v in vector.items()}
            self.random_state.restore()
            return multiply(theta, *self.support, vector)

        return all(
            second_derivative_is_wrong(
                slope, product, theta, self._adapted_direction(theta), self._direction(theta)
            )
            for theta in self.points
        )

    def _adapted_direction(self, theta: Parameters) -> Parameters:
        """Draw a direction of the adapted parameters: no other second derivatives are used."""
        adapted = self.plain_autograd.adapted
        direction = self._direction(theta)
        return {name: d if name in adapted else torch.zeros_like(d) for name, d in direction.items()}

    def _near(self, theta: Parameters, distance: float) -> Parameters:
        return {name: theta[name] + distance * d for name, d in self._direction(theta).items()}

    def _direction(self, theta: Parameters) -> Parameters:
        """Draw a random direction; each part is about as long as the parameter itself."""
        direction = {}
        for name, p in theta.items():
            noise = torch.randn(p.shape, generator=self.generator, dtype=torch.float64)
            length = p.abs().square().mean().sqrt()
            direction[name] = noise.to(p) * torch.where(length > 0, length, torch.ones_like(length))
        return direction

    def _few_steps(self, inner: InnerLoop) -> InnerLoop:
        """Choose at most two inner steps, large enough to matter and small enough not to diverge."""
        theta = self.points[0]
        self.random_state.restore()
        _, slope = self.plain_autograd.slope(theta, *self.support)
        length, steepness = _norm({name: theta[name] for name in slope}), _norm(slope)
        lr = min(10 * inner.lr, 0.05 * length / steepness) if steepness > 0 else inner.lr
        steps, n = min(inner.steps, _STEPS), inner.differentiated_steps
        if n is not None:  # one of the two if only some are differentiated
            n = min(n, steps if n == inner.steps else steps - 1)
        lr = lr if isfinite(lr) and lr > 0 else inner.lr
        few = replace(inner, lr=lr, steps=steps, differentiated_steps=n)
        return few if inner.rates is None else replace(few, rates=self._different_rates(few))

    def _different_rates(self, inner: InnerLoop) -> Parameters:
        """Choose a rate for each parameter and inner step, all different."""
        return {
            name: inner.lr * (0.5 + torch.rand(max(1, inner.steps), generator=self.generator).to(p))
            for name, p in self.plain_autograd.adapted.items()
        }

    def _expected(self, theta: Parameters) -> LossesAndGradient:
        self.random_state.restore()
        plain = self.plain_autograd
        compute = plain.query_losses if self.computation.is_evaluation else plain.meta_gradient
        return compute(theta, self.tasks, self.inner)


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error message, which may be a page long."""
    return (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0].rstrip(".")


def _norm(parameters: Parameters) -> float:
    return float(torch.stack([p.norm() for p in parameters.values()]).norm())


def _difference(actual: LossesAndGradient, expected: LossesAndGradient) -> tuple[float, str]:
    """Return the largest relative difference and where it is.

    The gradient of each parameter is compared with its own norm, or with a thousandth of the largest
    norm if that is larger. The losses of an evaluation are compared with how much adaptation changes
    them.
    """
    scale = expected.losses.abs().max()
    if not expected.gradient:
        changes = (expected.losses - expected.losses[:, :1]).abs().max()
        scale = torch.maximum(changes, 1e-3 * scale)
    error = (actual.losses - expected.losses).abs().max()
    differences = [(_ratio(error, scale), " in the losses" if expected.gradient else "")]
    for ours, theirs, where in (
        (actual.gradient, expected.gradient, " at "),
        (actual.rates, expected.rates, " at the inner learning rates of "),
    ):
        largest = max((g.norm() for g in theirs.values()), default=scale)
        for name, g in theirs.items():
            error = (ours[name] - g).norm()
            ratio = _ratio(error, torch.maximum(g.norm(), 1e-3 * largest))
            differences.append((ratio, where + name))
    return max(differences)


def _ratio(error: Tensor, scale: Tensor) -> float:
    if error == 0:
        return 0.0
    ratio = float(error / scale)
    return ratio if isfinite(ratio) else float("inf")
