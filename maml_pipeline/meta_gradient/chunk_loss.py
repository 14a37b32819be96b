"""The loss of a chunk of tasks as a pure function of the tasks' parameters.

A chunk is a number of tasks that adapt at once. Each adapted parameter has a leading dimension T, one
slice per task, and task i's loss depends on slice i alone. The gradient of the summed losses therefore
holds every task's gradient, and PyTorch's autograd differentiates it to any order. Parameters that are
fixed in the inner loop are shared by all tasks and have no such dimension: they are not copied, and
their gradient is the sum over tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from maml_pipeline.meta_gradient.exactness import Workarounds
from maml_pipeline.meta_gradient.inner_loop import Loss, Parameters, trainable_parameters

PredictEach = Callable[[Parameters, Tensor], Tensor]
"""(parameters `(T, ...)`, inputs `(T, Q, ...)`) -> predictions `(T, Q, ...)`."""


@dataclass(frozen=True, eq=False)
class ChunkLoss:
    """The loss of each task of a chunk.

    Args:
        evaluate: (parameters, inputs `(T, S, ...)`, targets) -> losses `(T,)`, predictions
            `(T, S, ...)`. Parameters are `(T, ...)`, except the shared ones.
        adapted: Names of the parameters that the inner steps move.
        shared: Names of the parameters without a task dimension; none of them is adapted.
    """

    evaluate: Callable[[Parameters, Tensor, Tensor], tuple[Tensor, Tensor]]
    adapted: tuple[str, ...]
    shared: frozenset[str] = frozenset()

    def __call__(self, parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses `(T,)` and predictions `(T, S, ...)`."""
        return self.evaluate(parameters, x, y)

    def of_adapted(self, parameters: Parameters) -> Parameters:
        """Return the adapted ones of the parameters."""
        return {name: parameters[name] for name in self.adapted}

    def expand(self, theta: Parameters, tasks: int) -> Parameters:
        """Give each task the same parameters without copying them: `(...)` -> `(T, ...)`."""
        return {
            name: p if name in self.shared else p.expand(tasks, *p.shape) for name, p in theta.items()
        }

    def sum_over_tasks(self, gradient: Parameters) -> Parameters:
        """Sum the gradients of the tasks: `(T, ...)` -> `(...)`."""
        return {name: g if name in self.shared else g.sum(0) for name, g in gradient.items()}


def vectorized_loss(
    network: nn.Module,
    loss: Loss,
    workarounds: Workarounds,
    adapted: tuple[str, ...],
    shared: frozenset[str],
) -> ChunkLoss:
    """Map a network and its loss over the tasks of a chunk with `torch.func.vmap`."""
    call = stateless(network)

    def task_loss(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return workarounds.evaluate(partial(call, parameters), loss, x, y)

    task_dimension = {name: None if name in shared else 0 for name in trainable_parameters(network)}
    mapped = vmap(task_loss, in_dims=(task_dimension, 0, 0))

    def evaluate(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # A tensor that a call keeps as an attribute is useless outside vmap.
        with workarounds.preserved_attributes(network):
            result: tuple[Tensor, Tensor] = mapped(parameters, x, y)
            return result

    return ChunkLoss(evaluate, adapted, shared)


def single_task_loss(
    network: nn.Module, loss: Loss, workarounds: Workarounds, adapted: tuple[str, ...]
) -> ChunkLoss:
    """Evaluate a chunk of one task without vmap, so that any module works."""
    call = stateless(network)

    def evaluate(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        task_parameters = {name: p[0] for name, p in parameters.items()}
        value, prediction = workarounds.evaluate(partial(call, task_parameters), loss, x[0], y[0])
        return value[None], prediction[None]

    return ChunkLoss(evaluate, adapted)


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


def stateless(network: nn.Module) -> Callable[[Parameters, Tensor], Tensor]:
    """Make a network a function of its trainable parameters, by name, and of its input.

    A parameter that several modules share is replaced in each of them. `functional_call` with
    `tie_weights=True` does so too, but leaves the network broken where one module has two names: it
    replaces the same parameter twice and restores the first replacement.
    """
    name_of = {id(p): name for name, p in trainable_parameters(network).items()}
    names_by_place = {
        f"{module_name}.{attribute}" if module_name else attribute: name_of[id(p)]
        for module_name, module in network.named_modules()  # each module once
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in name_of
    }

    def call(parameters: Parameters, x: Tensor) -> Tensor:
        placed = {place: parameters[name] for place, name in names_by_place.items()}
        prediction: Tensor = functional_call(network, placed, (x,), tie_weights=False)
        return prediction

    return call
