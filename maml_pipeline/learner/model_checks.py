"""Check on one task, before training, that network, loss and metric fit the tasks."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError, describe
from maml_pipeline.learner.measures import measure_name
from maml_pipeline.meta_gradient import Loss
from maml_pipeline.tasks import Task
from maml_pipeline.tasks.task import type_name


def check_compatibility(network: nn.Module, loss: Loss, metric: Loss | None, task: Task) -> None:
    """Call network, loss and metric on both sets of one task, without changing their state.

    Raises:
        UserError: The network fails or does not return a tensor, the loss or metric fails or does not
            return one number, or no gradient reaches the network.
    """
    with _without_side_effects(network, task.support_x.device) as network:
        for name, x, y in (
            ("support", task.support_x, task.support_y),
            ("query", task.query_x, task.query_y),
        ):
            what = f"the tasks, whose {name}_x is {_kind(x)} and {name}_y {_described_targets(y)}"
            prediction = _try_loss(network, loss, what, x.clone(), y.clone())
            if metric is not None:
                _try_metric(metric, prediction.detach(), y.clone())


def check_support(network: nn.Module, loss: Loss, support_x: Tensor, support_y: Tensor) -> None:
    """Call network and loss on the support set of one task, without changing their state.

    Raises:
        UserError: As for `check_compatibility`.
    """
    inputs = f"{len(support_x)} inputs of shape {tuple(support_x.shape[1:])}"
    what = f"a support set of {inputs} {_dtype(support_x)} and targets {_described_targets(support_y)}"
    with _without_side_effects(network, support_x.device) as network:
        _try_loss(network, loss, what, support_x.clone(), support_y.clone())


def check_same_network(saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Reject the `state_dict` of another network.

    Args:
        saved: The `state_dict` of a checkpoint.
        own: The `state_dict` that it would replace.

    Raises:
        UserError: A name or shape differs; the message gives the first.
    """
    for name in sorted(own.keys() | saved.keys()):
        saved_shape, own_shape = (
            tuple(state[name].shape) if name in state else "absent" for state in (saved, own)
        )
        if saved_shape != own_shape:
            raise UserError(
                f"the checkpoint is of another network: {name} is {saved_shape} there and "
                f"{own_shape} here; use the config beside the checkpoint"
            )


def _try_loss(network: nn.Module, loss: Loss, what: str, x: Tensor, y: Tensor) -> Tensor:
    try:
        prediction = network(x)
        value: Any = loss(prediction, y) if isinstance(prediction, Tensor) else None
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"network {type(network).__name__} and loss {measure_name(loss)} do not fit {what}: "
            f"{describe(error)}"
        ) from error
    if not isinstance(prediction, Tensor):
        raise UserError(
            f"network {type(network).__name__} returns a {type_name(prediction)}; it must return one "
            "tensor, the predictions of a set"
        )
    _check_number(value, f"loss {measure_name(loss)}")
    if not value.requires_grad:
        raise UserError(
            f"no gradient reaches network {type(network).__name__} from loss {measure_name(loss)}: both "
            "must be differentiable and must not detach anything"
        )
    return prediction


def _try_metric(metric: Loss, prediction: Tensor, y: Tensor) -> None:
    try:
        value = metric(prediction, y)
    except Exception as error:
        raise UserError(
            f"metric {measure_name(metric)} does not fit predictions {_kind(prediction)} and targets "
            f"{_kind(y)}: {describe(error)}"
        ) from error
    _check_number(value, f"metric {measure_name(metric)}")


@contextmanager
def _without_side_effects(network: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
        _throwaway(network) as copied,
    ):
        # PyTorch's losses broadcast shapes that differ, and only warn.
        warnings.filterwarnings("error", "Using a target size")
        yield copied


@contextmanager
def _throwaway(network: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy, or the network itself if it cannot be copied; restore its buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        copied = copy.deepcopy(network)
    except Exception:  # such as a tensor computed from parameters, kept as an attribute
        copied = network
    yield copied
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


def _check_number(value: Any, what: str) -> None:
    if not isinstance(value, Tensor):
        raise UserError(f"{what} returns a {type_name(value)}; it must return a tensor with one number")
    if value.ndim or not value.is_floating_point():
        raise UserError(
            f"{what} returns {_kind(value)}; it must return one floating-point number, a tensor of "
            "shape (), such as a mean over the set"
        )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {_dtype(tensor)}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _described_targets(y: Tensor) -> str:
    largest = f"{y.max().item():g}" if y.numel() and not y.is_complex() else "?"
    return f"{_kind(y)} with values up to {largest}"
