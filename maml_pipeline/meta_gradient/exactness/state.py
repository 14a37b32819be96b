"""Reject networks that carry state from one call to the next."""

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.exactness.preservation import (
    RandomState,
    changed_attributes,
    preserve_state,
    snapshot_attributes,
)
from maml_pipeline.meta_gradient.inner_loop import Loss
from maml_pipeline.tasks import Task
from maml_pipeline.torch_internals import (
    is_batch_or_instance_normalization,
    is_spectral_normalization,
)

# Two calls on the same input may differ by rounding: the order of a parallel sum may vary.
ROUNDING = 1e-5


def check_repeatable(network: nn.Module, loss: Loss, task: Task, state: RandomState) -> None:
    """Reject a network or loss whose second call differs from its first.

    Raises:
        UserError: Two calls with the same random numbers differ.
    """
    with torch.no_grad():
        calls = []
        for _ in range(2):
            state.restore()
            calls.append(prediction_and_loss(network, loss, task))
    if relative_distance(*calls) > ROUNDING:
        raise UserError(
            f"network {type(network).__name__} or its loss keeps state: two calls on the same task "
            "give different results; MAML needs a function of parameters and inputs alone (random "
            "numbers may come from torch, numpy.random or random)"
        )


def check_registered_unchanged(network: nn.Module, before: dict[str, Tensor]) -> None:
    """Reject a network whose call changed parameters or buffers.

    Args:
        network: After the call.
        before: Copies of `registered_tensors` before the call.

    Raises:
        UserError: A parameter or buffer changed.
    """
    name = type(network).__name__
    for key, value in registered_tensors(network).items():
        if torch.equal(value, before[key]):
            continue
        if isinstance(value, nn.Parameter):
            raise UserError(
                f"network {name} changes its parameter {key} when called (as an embedding with "
                "max_norm does), which has no derivative: leave that out"
            )
        module = network.get_submodule(key.rpartition(".")[0])
        remedy = "MAML needs a network without state: keep no state in buffers"
        if is_batch_or_instance_normalization(module):
            remedy = (
                "give normalisation layers track_running_stats=False (MAML normalises by batch "
                "statistics, also in evaluation)"
            )
        elif is_spectral_normalization(module) or key.endswith(("weight_u", "weight_v")):
            remedy = (
                "PyTorch's spectral normalisation runs a power iteration in each call: divide by "
                "torch.linalg.matrix_norm(weight, 2) instead"
            )
        raise UserError(f"network {name} changes its buffer {key} when called: {remedy}")


def changes_attributes(network: nn.Module, loss: Loss, task: Task) -> bool:
    """Tell whether a call assigns attributes of the network.

    Raises:
        UserError: Evaluation reads what a call in training assigned.
    """
    state = RandomState(task.support_x.device)

    def evaluate() -> Tensor:
        state.restore()
        with torch.no_grad():
            return prediction_and_loss(network.eval(), loss, task)

    def call() -> list[str]:
        snapshots = snapshot_attributes(network)
        state.restore()
        network(task.support_x.clone())
        return changed_attributes(network, snapshots)

    with preserve_state(network):
        changed = call()
    if changed and network.training:
        with preserve_state(network):
            before = evaluate()
        with preserve_state(network):
            call()
            after = evaluate()
        # Changed buffers are rejected by `check_registered_unchanged`.
        with preserve_state(network):
            buffers = [buffer.clone() for buffer in network.buffers()]
            call()
            buffers_are_unchanged = all(map(torch.equal, buffers, network.buffers()))
        if buffers_are_unchanged and relative_distance(after, before) > ROUNDING:
            raise UserError(
                f"network {type(network).__name__} reads in evaluation what training assigned to its "
                f"attribute {changed[0]}: MAML needs a function of parameters and inputs alone"
            )
    state.restore()
    return bool(changed)


def registered_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


def prediction_and_loss(network: nn.Module, loss: Loss, task: Task) -> Tensor:
    """Return the prediction of the support set, flattened, followed by the loss."""
    prediction = network(task.support_x.clone())
    # Copied before the loss, which may overwrite it.
    flat = prediction.detach().flatten().clone() if isinstance(prediction, Tensor) else None
    value = loss(prediction, task.support_y.clone()).detach().reshape(1)
    return value if flat is None else torch.cat([flat, value.to(flat)])


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|; 0 if both are equal, also where both are NaN."""
    if torch.equal(actual.nan_to_num(), expected.nan_to_num()):
        return 0.0
    distance = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(distance.nan_to_num(nan=float("inf")))
