"""Compare one engine's way of computing with plain autograd, on a few tasks and few inner steps."""

from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.by_hand import ByHand, Expected
from maml_pipeline.meta_gradient.handling import Handling
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, Parameters
from maml_pipeline.meta_gradient.preserved import RandomState
from maml_pipeline.tasks import TaskBatch

_STEPS = 2
_NEARBY = 1e-2  # from the initial parameters, where a value may lie on a ReLU's kink by design


class Way(NamedTuple):
    """One way in which an engine computes, to be held to plain autograd.

    Args:
        engine: Its name.
        compute: (network, loss, batch, inner, handling) -> losses and meta-gradient, uncompiled.
        evaluates: Query losses after every inner step are computed, and no meta-gradient.
        maps_tasks: By vmap.
        clones: learn2learn's clones are called, unless the handling says otherwise.
        error_remedy: What to do about an error that plain autograd does not meet.
        random_remedy: What to do about random numbers, where this way cannot draw them.
        remedy: What to do about a network that this way gets wrong.
    """

    engine: str
    compute: Callable[[nn.Module, Loss, TaskBatch, InnerLoop, Handling], Expected]
    evaluates: bool
    maps_tasks: bool
    clones: bool
    error_remedy: str
    random_remedy: str | None
    remedy: str


class Fault(NamedTuple):
    """How a way differs from plain autograd: by an error of its own, or by so much, and where."""

    error: str | None
    difference: float
    where: str


class Trial:
    """One way, one network and one loss, in the type that the network has now.

    Args:
        way: The engine's own computation.
        network: `borrowed`, since its parameters are overwritten.
        loss: (prediction, target) -> scalar.
        tasks: A few tasks, in the network's type.
        inner: The run's inner loop; fewer steps are taken.
        handling: Says which attention kernel plain autograd takes.
    """

    def __init__(
        self,
        way: Way,
        network: nn.Module,
        loss: Loss,
        tasks: TaskBatch,
        inner: InnerLoop,
        handling: Handling,
    ) -> None:
        self.way, self.network, self.loss, self.tasks = way, network, loss, tasks
        plain = Handling(copies_tasks=True, math_attention=handling.math_attention)
        self.by_hand = ByHand(network, loss, plain)
        theta = {name: p.detach().clone() for name, p in self.by_hand.parameters.items()}
        epsilon = max(torch.finfo(p.dtype).eps for p in theta.values())
        self.tolerance, self.tiny = max(1e-6, epsilon**0.5), max(1e-7, 8 * epsilon)
        self.generator = torch.Generator().manual_seed(0)
        self.random_state = RandomState(tasks.support_x.device)
        self.points = [self._near(theta, _NEARBY) for _ in range(2)]
        self.inner = self._few_steps(inner)

    def fault(self, handling: Handling) -> Fault | None:
        """Say how the way differs near the initial parameters: at two points, or at none."""
        fault = None
        for theta in self.points:
            expected = self._expected(theta)
            if not expected.losses.isfinite().all():
                continue  # training stops there with a message of its own
            self.by_hand.place(theta)
            self.random_state.restore()
            try:
                actual = self.way.compute(self.network, self.loss, self.tasks, self.inner, handling)
            except (torch.OutOfMemoryError, UserError):
                raise
            except (RuntimeError, ValueError, TypeError) as error:
                return Fault(reason(error), 0, "")
            difference, where = _difference(actual, expected)
            if difference <= self.tolerance:
                return None
            # A network that rounds coarsely, or bends sharply, differs from itself as well.
            itself, _ = _difference(self._expected(self._near(theta, self.tiny)), expected)
            if difference <= 30 * itself:
                return None
            fault = Fault(None, difference, where)
        return fault

    def second_derivative_is_wrong(self) -> bool:
        """Hold a Hessian-vector product to finite differences of the gradient: wrong at two points."""
        if self.way.evaluates or self.inner.first_order or self.inner.steps == 0:
            return False
        return all(self._second_derivative_is_wrong(theta) for theta in self.points)

    def _second_derivative_is_wrong(self, theta: Parameters) -> bool:
        """Compare u^T J d for random u and d, with J the derivative of the gradient.

        d is zero where the gradient is: what is kept from learning, as an embedding's padding row, may
        well have an influence.
        """
        support = self.tasks.support_x[0], self.tasks.support_y[0]

        def slope(distance: float) -> Parameters:
            self.random_state.restore()
            shifted = {name: p + distance * d[name] for name, p in theta.items()}
            return self.by_hand.gradient(shifted, *support)[1]

        u, d = self._direction(theta), self._direction(theta)
        at_theta = slope(0)
        d = {name: torch.where(g == 0, torch.zeros_like(g), d[name]) for name, g in at_theta.items()}
        self.random_state.restore()
        by_autograd = sum(_products(self.by_hand.product(theta, *support, u), d))
        negligible = 1e-3 * sum(map(abs, _products(u, at_theta)))

        for h in (1e-5, 1e-7, 1e-3):
            by_differences, scale = _central_difference(slope, u, h)
            error, scale = abs(by_differences - by_autograd), scale + negligible
            if not error > 1e-4 * scale:
                return False
            again, _ = _central_difference(slope, u, h / 2)
            if error > 1e-3 * scale and abs(again - by_differences) < 0.1 * error:
                return True
        return False  # too many kinks, or too coarse a rounding, to tell

    def _near(self, theta: Parameters, distance: float) -> Parameters:
        return {name: theta[name] + distance * d for name, d in self._direction(theta).items()}

    def _direction(self, theta: Parameters) -> Parameters:
        """Draw a random direction, in each parameter about as long as the parameter itself."""
        direction = {}
        for name, p in theta.items():
            noise = torch.randn(p.shape, generator=self.generator, dtype=torch.float64)
            length = p.abs().square().mean().sqrt()
            direction[name] = noise.to(p) * torch.where(length > 0, length, torch.ones_like(length))
        return direction

    def _few_steps(self, inner: InnerLoop) -> InnerLoop:
        """Choose few inner steps, long enough to matter and short enough not to diverge."""
        theta = self.points[0]
        self.random_state.restore()
        _, slope = self.by_hand.gradient(theta, self.tasks.support_x[0], self.tasks.support_y[0])
        length, steepness = _norm(theta), _norm(slope)
        lr = min(10 * inner.lr, 0.05 * length / steepness) if steepness > 0 else inner.lr
        steps = min(inner.steps, _STEPS)
        return replace(inner, lr=lr if isfinite(lr) and lr > 0 else inner.lr, steps=steps)

    def _expected(self, theta: Parameters) -> Expected:
        self.random_state.restore()
        compute = self.by_hand.query_losses if self.way.evaluates else self.by_hand.meta_gradient
        return compute(theta, self.tasks, self.inner)


def reason(error: Exception) -> str:
    """Return the first sentence of an error, which may be a page long."""
    return (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0].rstrip(".")


def _central_difference(
    slope: Callable[[float], Parameters], u: Parameters, h: float
) -> tuple[float, float]:
    """Return u^T J d, and the sum of its parts' magnitudes."""
    plus, minus = slope(h), slope(-h)
    parts = _products({name: (plus[name] - minus[name]) / (2 * h) for name in plus}, u)
    return sum(parts), sum(map(abs, parts))


def _products(first: Parameters, second: Parameters) -> list[float]:
    return torch.stack([(first[name] * second[name]).sum() for name in first]).tolist()


def _norm(parameters: Parameters) -> float:
    return float(torch.stack([p.norm() for p in parameters.values()]).norm())


def _difference(actual: Expected, expected: Expected) -> tuple[float, str]:
    """Return the largest relative difference, and where it is.

    Every parameter is compared by itself; those whose gradient is nearly zero count by the largest.
    Curves of an evaluation are compared by how much adaptation changes them.
    """
    scale = expected.losses.abs().max()
    if not expected.gradient:
        changes = (expected.losses - expected.losses[:, :1]).abs().max()
        scale = torch.maximum(changes, 1e-3 * scale)
    error = (actual.losses - expected.losses).abs().max()
    differences = [(_ratio(error, scale), " in the losses" if expected.gradient else "")]
    largest = max((g.norm() for g in expected.gradient.values()), default=scale)
    for name, g in expected.gradient.items():
        error = (actual.gradient[name] - g).norm()
        differences.append((_ratio(error, torch.maximum(g.norm(), 1e-3 * largest)), f" at {name}"))
    return max(differences)


def _ratio(error: Tensor, scale: Tensor) -> float:
    if error == 0:
        return 0.0
    ratio = float(error / scale)
    return ratio if isfinite(ratio) else float("inf")
