"""Independent references for meta-gradients and adaptation curves, written for clarity."""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient import InnerLoop, Loss
from maml_pipeline.meta_gradient.closed_form import linear_meta_gradient
from maml_pipeline.meta_gradient.inner_loop import Parameters, trainable_parameters
from maml_pipeline.tasks import Task, TaskBatch


class PlainLoop:
    """Adapt one task at a time with plain autograd and gradient descent, in place.

    The network's parameters are back at their initial values after each method.
    """

    def __init__(self, network: nn.Module, loss: Loss, inner: InnerLoop) -> None:
        self.network, self.loss, self.inner = network, loss, inner
        self.parameters = trainable_parameters(network)
        self.theta = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.moves = [
            name for name in self.theta if any(fnmatchcase(name, one) for one in inner.adapt or "*")
        ]

    def curves(self, batch: TaskBatch, transductive: bool = True) -> Tensor:
        """Return the query losses before the first inner step and after each one, `(T, k + 1)`."""
        curves = []
        for task in batch.tasks():
            curve = []
            for theta in self._adapt(task):
                self._set(theta)
                with torch.no_grad():
                    prediction = self._predict_query(task, transductive)
                    curve.append(self.loss(prediction, task.query_y.clone()).clone())
            curves.append(torch.stack(curve))
        self._set(self.theta)
        return torch.stack(curves)

    def first_order(self, batch: TaskBatch) -> Parameters:
        """Return the first-order meta-gradient: the mean query gradient after adaptation."""
        adapted = [self._adapt(task)[-1] for task in batch.tasks()]
        gradients = [
            self._gradient(theta, task.query_x, task.query_y)
            for theta, task in zip(adapted, batch.tasks(), strict=True)
        ]
        self._set(self.theta)
        return {name: torch.stack([g[name] for g in gradients]).mean(0) for name in self.theta}

    def first_order_of_rates(self, batch: TaskBatch) -> Parameters:
        """Return -<a, g_t> by parameter `(k,)`, with a the query gradient and g_t that of step t."""
        total = {name: torch.zeros(self.inner.steps).to(self.theta[name]) for name in self.moves}
        for task in batch.tasks():
            *before, adapted = self._adapt(task)
            a = self._gradient(adapted, task.query_x, task.query_y)
            for t, theta in enumerate(before):
                g = self._gradient(theta, task.support_x, task.support_y)
                for name in self.moves:
                    total[name][t] -= (a[name] * g[name]).sum() / len(batch.support_x)
        self._set(self.theta)
        return total

    def slope_of_rates(self, batch: TaskBatch, name: str, t: int, h: float) -> float:
        """Differentiate the mean adapted query loss along one inner learning rate.

        Steps that are not differentiated move theta_{k-n} along the gradient of step t alone.
        """
        inner, rates = self.inner, dict(self.inner.rates or {})
        first = inner.first_differentiated_step
        trajectories = [self._adapt(task) for task in batch.tasks()]

        def adapted_loss(distance: float) -> float:
            moved, losses = rates[name].clone(), []
            moved[t] += distance
            self.inner = replace(inner, rates=rates | {name: moved})
            for trajectory, task in zip(trajectories, batch.tasks(), strict=True):
                start = trajectory[first]
                if t < first:
                    g = self._gradient(trajectory[t], task.support_x, task.support_y)
                    start = start | {name: start[name] - distance * g[name]}
                self._set(self._adapt(task, start, inner.steps - first)[-1])
                with torch.no_grad():
                    losses.append(self.loss(self.network(task.query_x.clone()), task.query_y.clone()))
            return float(torch.stack(losses).mean())

        slope = finite_difference(adapted_loss, h)
        self.inner = inner
        self._set(self.theta)
        return slope

    def slope(self, batch: TaskBatch, direction: Parameters, h: float) -> float:
        """Differentiate the mean adapted query loss along a direction by finite differences.

        Of the inner loop, the differentiated steps alone are a function of the parameters: those before
        them lead once to where theta_{k-n} is displaced.
        """
        differentiated = self.inner.steps - self.inner.first_differentiated_step
        starts = [self._adapt(task)[self.inner.first_differentiated_step] for task in batch.tasks()]

        def adapted_loss(distance: float) -> float:
            losses = []
            for start, task in zip(starts, batch.tasks(), strict=True):
                displaced = {name: p + distance * direction[name] for name, p in start.items()}
                self._set(self._adapt(task, displaced, differentiated)[-1])
                with torch.no_grad():
                    losses.append(self.loss(self.network(task.query_x.clone()), task.query_y.clone()))
            return float(torch.stack(losses).mean())

        slope = finite_difference(adapted_loss, h)
        self._set(self.theta)
        return slope

    def _adapt(
        self, task: Task, start: Parameters | None = None, steps: int | None = None
    ) -> list[Parameters]:
        """Return the parameters before and after each of the last inner steps; by default of all k."""
        trajectory = [self.theta if start is None else start]
        first = 0 if steps is None else self.inner.steps - steps
        for t in range(first, self.inner.steps):
            g = self._gradient(trajectory[-1], task.support_x, task.support_y)
            moved = {n: trajectory[-1][n] - self.inner.rate(t, n) * g[n] for n in self.moves}
            trajectory.append(trajectory[-1] | moved)
        return trajectory

    def _predict_query(self, task: Task, transductive: bool) -> Tensor:
        if transductive:
            prediction: Tensor = self.network(task.query_x.clone())
            return prediction
        points = [torch.cat([task.support_x, x[None]]) for x in task.query_x]
        return torch.stack([self.network(x)[-1] for x in points])

    def _gradient(self, theta: Parameters, x: Tensor, y: Tensor) -> Parameters:
        self._set(theta)
        loss = self.loss(self.network(x.clone()), y.clone())
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        named = zip(self.parameters.items(), gradients, strict=True)
        return {  # dense, since a sparse embedding has sparse gradients
            name: torch.zeros_like(p) if g is None else g.to_dense() for (name, p), g in named
        }

    def _set(self, theta: Parameters) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(theta[name])


def finite_difference(function: Callable[[float], float], h: float) -> float:
    """Differentiate a function at 0 by a central difference of fourth order."""
    near, far = function(h) - function(-h), function(2 * h) - function(-2 * h)
    return (8 * near - far) / (12 * h)


def inner_product(first: Parameters, second: Parameters) -> float:
    """Return the inner product of two sets of parameters."""
    return sum(float((first[name] * second[name]).sum()) for name in first)


def linear_closed_form(network: nn.Linear, batch: TaskBatch, inner: InnerLoop) -> Tensor:
    """Return the mean meta-gradient of `nn.Linear(D, 1)` with squared error: weights, then the bias."""
    theta = torch.cat([network.weight.detach()[0], network.bias.detach()])
    return torch.stack([linear_meta_gradient(theta, task, inner) for task in batch.tasks()]).mean(0)
