"""The loss of a chunk of tasks as a pure function of the tasks' parameters.

A chunk is a number of tasks that adapt at once. Each adapted parameter has a leading dimension T, one
slice per task, and task i's loss depends on slice i alone. The gradient of the summed losses therefore
holds every task's gradient, and PyTorch's autograd differentiates it to any order. Parameters that are
fixed in the inner loop are shared by all tasks and have no such dimension: they are not copied, and
their gradient is the sum over tasks.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from maml_pipeline.meta_gradient.exactness import Workarounds
from maml_pipeline.meta_gradient.fixed_prefix import record, replayed
from maml_pipeline.meta_gradient.inner_loop import Loss, Parameters
from maml_pipeline.meta_gradient.stateless import double, loss_in_double, stateless

PredictEach = Callable[[Parameters, Tensor], Tensor]
"""(parameters `(T, ...)`, inputs `(T, Q, ...)`) -> predictions `(T, Q, ...)`."""

Predict = Callable[[Parameters, Tensor], Tensor]
Evaluate = Callable[[Parameters, Tensor, Tensor], tuple[Tensor, Tensor]]

FEATURE = "()"
"""Ends the name of a feature among parameters, after the name of the module that computes it."""


@dataclass(frozen=True, eq=False)
class ChunkLoss:
    """The loss of each task of a chunk.

    Args:
        evaluate: (parameters, inputs `(T, S, ...)`, targets) -> losses `(T,)`, predictions
            `(T, S, ...)`. Parameters are `(T, ...)`, except the shared ones.
        evaluate_in_double: The same for floating-point arguments in float64.
        adapted: Names of the parameters that the inner steps move.
        shared: Names of the parameters without a task dimension; none of them is adapted.
        features: (parameters, inputs) -> the outputs of the network's fixed prefix `(T, S, ...)`, by
            name. Among the parameters of a call, they replace the prefix.
    """

    evaluate: Evaluate
    evaluate_in_double: Evaluate
    adapted: tuple[str, ...]
    shared: frozenset[str] = frozenset()
    features: Callable[[Parameters, Tensor], Parameters] | None = None

    def __call__(self, parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses `(T,)` and predictions `(T, S, ...)`."""
        return self.evaluate(parameters, x, y)

    def in_double(self, parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        """Return losses `(T,)` in float64 at float64 parameters, also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return self.evaluate_in_double(parameters, double(x), double(y))[0]

    def of_adapted(self, parameters: Parameters) -> Parameters:
        """Return the adapted ones of the parameters."""
        return {name: parameters[name] for name in self.adapted}

    def start(self, theta: Parameters, support_x: Tensor) -> Parameters:
        """Return the parameters before the first inner step, with the features of the support sets.

        Each task has the same parameters, which are not copied: `(...)` -> `(T, ...)`.
        """
        tasks = len(support_x)
        expanded = {
            name: p if name in self.shared else p.expand(tasks, *p.shape) for name, p in theta.items()
        }
        return expanded if self.features is None else expanded | self.features(expanded, support_x)

    def without_features(self, parameters: Parameters) -> Parameters:
        """Return the parameters alone, to evaluate the whole network on other inputs."""
        return {name: p for name, p in parameters.items() if not is_feature(name)}

    def sum_over_tasks(self, gradient: Parameters) -> Parameters:
        """Sum the gradients of the tasks: `(T, ...)` -> `(...)`."""
        return {name: g if name in self.shared else g.sum(0) for name, g in gradient.items()}


def is_feature(name: str) -> bool:
    """Tell whether a name among parameters is that of a feature."""
    return name.endswith(FEATURE)


def vectorized_loss(
    network: nn.Module,
    loss: Loss,
    workarounds: Workarounds,
    adapted: tuple[str, ...],
    shared: frozenset[str],
) -> ChunkLoss:
    """Map a network and its loss over the tasks of a chunk with `torch.func.vmap`."""
    call, prefix = stateless(network), workarounds.fixed_prefix

    def task_loss(
        call: Predict, loss: Loss, given: Parameters, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        features = {name.removesuffix(FEATURE): p for name, p in given.items() if is_feature(name)}
        parameters = {name: p for name, p in given.items() if not is_feature(name)}
        with replayed(network, prefix, features) if features else nullcontext():
            return workarounds.evaluate(partial(call, parameters), loss, x, y)

    def task_features(parameters: Parameters, x: Tensor) -> Parameters:
        predict = partial(workarounds.predict, partial(call, parameters), x)
        return {name + FEATURE: p for name, p in record(network, prefix, predict).items()}

    def mapped(function: Callable[..., Any], parameters: Parameters, *others: Tensor) -> Any:
        task_dimension = {name: None if name in shared else 0 for name in parameters}
        # A tensor that a call keeps as an attribute is useless outside vmap.
        with workarounds.preserved_attributes(network):
            return vmap(function, in_dims=(task_dimension, *[0 for _ in others]))(parameters, *others)

    features = partial(mapped, task_features) if prefix.recorded else None
    return ChunkLoss(
        partial(mapped, partial(task_loss, call, loss)),
        partial(mapped, partial(task_loss, stateless(network, in_double=True), loss_in_double(loss))),
        *(adapted, shared, features),
    )


def single_task_loss(
    network: nn.Module, loss: Loss, workarounds: Workarounds, adapted: tuple[str, ...]
) -> ChunkLoss:
    """Evaluate a chunk of one task without vmap, so that any module works."""

    def evaluate(
        call: Predict, loss: Loss, parameters: Parameters, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        task_parameters = {name: p[0] for name, p in parameters.items()}
        value, prediction = workarounds.evaluate(partial(call, task_parameters), loss, x[0], y[0])
        return value[None], prediction[None]

    return ChunkLoss(
        partial(evaluate, stateless(network), loss),
        partial(evaluate, stateless(network, in_double=True), loss_in_double(loss)),
        adapted,
    )


def plain_predictions(network: nn.Module, workarounds: Workarounds) -> PredictEach:
    """Predict one task after another, to the bit as a plain network with a task's parameters does.

    A batched matrix product or a grouped convolution over tasks may round differently.
    """
    call = stateless(network)

    def predict(parameters: Parameters, x: Tensor) -> Tensor:
        # Cloned, because kernels may depend on how memory is aligned.
        return torch.stack(
            [
                workarounds.predict(
                    partial(call, {name: p[task].clone() for name, p in parameters.items()}),
                    x[task].clone(),
                )
                for task in range(len(x))
            ]
        )

    return predict
