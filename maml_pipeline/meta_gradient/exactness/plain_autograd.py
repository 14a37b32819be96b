"""The reference that engines are compared with: one task at a time, plain autograd.

The network is called with its own parameters, which are set to theta_t in place, so that layers in
lists, closures and activation checkpointing work as in ordinary training.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.exactness.preservation import RandomState
from maml_pipeline.meta_gradient.exactness.workarounds import Workarounds
from maml_pipeline.meta_gradient.inner_loop import (
    InnerLoop,
    Loss,
    Parameters,
    adapted_names,
    trainable_parameters,
)
from maml_pipeline.tasks import Task, TaskBatch


class LossesAndGradient(NamedTuple):
    """Losses `(T, k + 1)` and their meta-gradient, which is empty for an evaluation.

    `rates` is that of learned inner learning rates; empty if none are learned.
    """

    losses: Tensor
    gradient: Parameters
    rates: Parameters


class PlainAutograd:
    """Compute losses and derivatives of a network at any parameters.

    Args:
        network: Its parameters are overwritten: use it within `preserve_state`.
        loss: (prediction, target) -> scalar.
        workarounds: How the network is called.
        adapt: Patterns of the parameters that the inner steps move, as in `InnerLoop`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        workarounds: Workarounds,
        adapt: Sequence[str] | None = None,
    ) -> None:
        self.network, self.loss, self.workarounds = network, loss, workarounds
        self.parameters = trainable_parameters(network)
        self.adapted = {name: self.parameters[name] for name in adapted_names(network, adapt)}
        self.device = next(iter(self.parameters.values())).device

    def meta_gradient(self, theta: Parameters, batch: TaskBatch, inner: InnerLoop) -> LossesAndGradient:
        """Compute what `Engine.meta_gradient` computes."""
        results = [self._task_meta_gradient(theta, task, inner) for task in batch.tasks()]
        gradient = {
            name: torch.stack([result.gradient[name] for result in results]).mean(0) for name in theta
        }
        rates = {
            name: torch.stack([result.rates[name] for result in results]).mean(0)
            for name in inner.rates or {}
        }
        return LossesAndGradient(torch.stack([result.losses for result in results]), gradient, rates)

    def query_losses(self, theta: Parameters, batch: TaskBatch, inner: InnerLoop) -> LossesAndGradient:
        """Compute what `Engine.adaptation_curves` computes if the loss is the measure."""
        curves = []
        for task in batch.tasks():
            theta_t, curve = theta, []
            for step in range(inner.steps + 1):
                with torch.no_grad():
                    curve.append(self.loss_at(theta_t, task.query_x, task.query_y))
                if step < inner.steps:
                    theta_t, _ = self._step(theta_t, task, inner, step)
            curves.append(torch.stack(curve))
        return LossesAndGradient(torch.stack(curves), {}, {})

    def set_parameters(self, theta: Parameters) -> None:
        """Overwrite the network's parameters in place."""
        for name, p in self.parameters.items():
            p.data.copy_(theta[name])

    def loss_at(self, theta: Parameters, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss at theta with its graph."""
        self.set_parameters(theta)
        return self.workarounds.evaluate(self.network, self.loss, x, y)[0]

    def gradient(self, theta: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Parameters]:
        """Return the loss at theta and its gradient with respect to all parameters."""
        loss = self.loss_at(theta, x, y)
        return loss.detach(), _differentiate(loss, self.parameters)

    def slope(
        self, theta: Parameters, x: Tensor, y: Tensor, create_graph: bool = False
    ) -> tuple[Tensor, Parameters]:
        """Return the loss at theta and its gradient with respect to the adapted parameters."""
        loss = self.loss_at(theta, x, y)
        return loss.detach(), _differentiate(loss, self.adapted, create_graph)

    def hessian_vector_product(
        self, theta: Parameters, x: Tensor, y: Tensor, vector: Parameters
    ) -> Parameters:
        """Multiply the Hessian of the loss at theta by a vector, which is zero unless adapted."""
        _, slopes = self.slope(theta, x, y, create_graph=True)
        directional = [(slope * vector[name]).sum() for name, slope in slopes.items()]
        directional = [value for value in directional if value.requires_grad]
        if not directional:
            return {name: torch.zeros_like(v) for name, v in vector.items()}
        return _differentiate(torch.stack(directional).sum(), self.parameters)

    def difference_of_gradients(
        self, theta: Parameters, x: Tensor, y: Tensor, vector: Parameters
    ) -> Parameters:
        """Approximate `hessian_vector_product` by the differences of hessian_free.py, in float64."""
        at, along = (torch.cat([v[name].flatten() for name in self.adapted]) for v in (theta, vector))
        if not along.any():
            return {name: torch.zeros_like(v) for name, v in vector.items()}
        e = float(1e-9 * (1 + at.norm()) / along.norm())
        ahead, centre, behind = (
            self.gradient(
                theta | {name: theta[name] + sign * e * vector[name] for name in self.adapted}, x, y
            )[1]
            for sign in (1, 0, -1)
        )
        sides = [
            {name: (end[name] - start[name]) / e for name in theta}
            for end, start in ((ahead, centre), (centre, behind))
        ]
        return min(sides, key=lambda side: float(torch.stack([g.norm() for g in side.values()]).norm()))

    def _task_meta_gradient(self, theta: Parameters, task: Task, inner: InnerLoop) -> LossesAndGradient:
        support = task.support_x, task.support_y
        steps, losses = [], []
        for t in range(inner.steps):
            steps.append((theta, RandomState(self.device)))
            theta, loss = self._step(theta, task, inner, t)
            losses.append(loss)
        loss, adjoint = self.gradient(theta, task.query_x, task.query_y)
        losses.append(loss)
        after = RandomState(self.device)
        product = self.hessian_vector_product
        if inner.method is Method.HESSIAN_FREE:
            product = self.difference_of_gradients
        rates = {name: torch.zeros_like(r) for name, r in (inner.rates or {}).items()}
        for t, (theta_t, random_state) in reversed([*enumerate(steps)]):
            if rates:
                random_state.restore()  # so that dropout draws the same mask
                _, slope = self.slope(theta_t, *support)
                for name, g in slope.items():
                    rates[name][min(t, len(rates[name]) - 1)] -= (g * adjoint[name]).sum()
            if t >= inner.first_differentiated_step:
                random_state.restore()
                moved = {name: inner.rate(t, name) * adjoint[name] for name in self.adapted}
                curvature = product(theta_t, *support, adjoint | moved)
                adjoint = {name: a - curvature[name] for name, a in adjoint.items()}
        after.restore()
        return LossesAndGradient(torch.stack(losses), adjoint, rates)

    def _step(
        self, theta: Parameters, task: Task, inner: InnerLoop, t: int
    ) -> tuple[Parameters, Tensor]:
        """Take inner step t; return the loss before it."""
        loss, slope = self.slope(theta, task.support_x, task.support_y)
        return theta | {name: theta[name] - inner.rate(t, name) * g for name, g in slope.items()}, loss


def _differentiate(value: Tensor, parameters: Parameters, create_graph: bool = False) -> Parameters:
    gradients = torch.autograd.grad(
        value, list(parameters.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }
