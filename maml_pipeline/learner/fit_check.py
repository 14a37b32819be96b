"""Whether network, loss and metric fit the tasks: tried on one task, before training."""

import copy
import warnings

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError, describe
from maml_pipeline.meta_gradient import Loss
from maml_pipeline.tasks import Task
from maml_pipeline.tasks.task import kind_of


def measure_name(measure: Loss) -> str:
    """Return the name under which a loss or metric is logged: a function's own, or its class's."""
    return getattr(measure, "__name__", type(measure).__name__.lower())


def check_measures(loss: Loss, metric: Loss | None) -> None:
    """Refuse what cannot be a loss or a metric, whatever the tasks.

    Raises:
        UserError: It is not callable, learns parameters of its own, or cannot be logged by name.
    """
    for key, measure in (("loss", loss), ("metric", metric)):
        if measure is None and key == "metric":
            continue
        if not callable(measure) or isinstance(measure, type):
            given = f"the class {measure.__name__}" if isinstance(measure, type) else repr(measure)
            raise UserError(
                f"{key} is {given}; it must be a function of (prediction, target), or an instance of a "
                "class like torch.nn.MSELoss"
            )
        if isinstance(measure, nn.Module) and any(p.requires_grad for p in measure.parameters()):
            raise UserError(
                f"{key} {measure_name(measure)} has trainable parameters, but the network's alone are "
                "meta-learned: put them into the network, or set requires_grad to False"
            )
    if metric is not None:
        name = measure_name(metric)
        if name == "loss":
            raise UserError("metric is called loss, as the loss is; give it another name")
        if not name.isidentifier():
            raise UserError(f"metric is called {name}, which is no name to log it under: use def")


def check_fit(network: nn.Module, loss: Loss, metric: Loss | None, task: Task) -> None:
    """Try a copy of the network, the loss and the metric on both sets of one task.

    Raises:
        UserError: The network fails or does not return a tensor; the loss or metric fails or is not a
            number; or the loss is not one that the network can learn from.
    """
    with torch.random.fork_rng([]), torch.enable_grad(), warnings.catch_warnings():
        # PyTorch's losses broadcast shapes that differ, and only warn.
        warnings.filterwarnings("error", "Using a target size")
        network = _copied(network)  # so that no running statistic moves
        for name, x, y in (
            ("support", task.support_x, task.support_y),
            ("query", task.query_x, task.query_y),
        ):
            try:
                prediction = network(x.clone())
                if isinstance(prediction, Tensor):
                    value = loss(prediction, y.clone())
            except Exception as error:  # whatever a user's own code may raise
                raise UserError(
                    f"network {type(network).__name__} and loss {measure_name(loss)} do not fit the "
                    f"tasks, whose {name}_x is {_kind(x)} and {name}_y {_kind(y)} with values up to "
                    f"{_largest(y)}: {describe(error)}"
                ) from error
            if not isinstance(prediction, Tensor):
                raise UserError(
                    f"network {type(network).__name__} returns a {kind_of(prediction)}; it must return "
                    "one tensor, the predictions of a set: choose it in the network's forward"
                )
            _check_number(value, f"loss {measure_name(loss)}")
            if not value.requires_grad:
                raise UserError(
                    f"no gradient reaches network {type(network).__name__} from loss "
                    f"{measure_name(loss)}: it must be differentiable, and the network must not detach"
                )
            if metric is not None:
                try:
                    measured = metric(prediction.detach(), y.clone())
                except Exception as error:
                    raise UserError(
                        f"metric {measure_name(metric)} does not fit predictions {_kind(prediction)} "
                        f"and targets {_kind(y)}: {describe(error)}"
                    ) from error
                _check_number(measured, f"metric {measure_name(metric)}")


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:
        raise UserError(
            f"network {type(network).__name__} cannot be copied ({describe(error)}): it must hold "
            "parameters and buffers alone, and no tensor that was computed from them"
        ) from error


def _check_number(value: object, what: str) -> None:
    if not isinstance(value, Tensor):
        raise UserError(f"{what} returns a {kind_of(value)}; it must return a tensor with one number")
    if value.ndim or not value.is_floating_point():
        raise UserError(
            f"{what} returns {_kind(value)}; it must return one floating-point number, a tensor of "
            "shape (), such as a mean over the set"
        )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _largest(y: Tensor) -> str:
    return f"{y.max().item():g}" if y.numel() and not y.is_complex() else "?"
