"""Inspect what one call of a network does besides predicting."""

from typing import NamedTuple

from torch import nn

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.exactness.preservation import RandomState, preserve_state
from maml_pipeline.meta_gradient.exactness.state import (
    changes_attributes,
    check_registered_unchanged,
    check_repeatable,
    registered_tensors,
)
from maml_pipeline.meta_gradient.inner_loop import Loss
from maml_pipeline.tasks import Task
from maml_pipeline.torch_internals import (
    DetachWatch,
    OperationWatch,
    was_changed_in_place,
)


class NetworkTraits(NamedTuple):
    """What a network and its loss do when called on the support set of one task.

    Args:
        changes_inputs: They change their input in place.
        draws_random_numbers: They draw random numbers, as dropout does.
        fused_attention: Attention runs in a fused kernel, which has no second derivative.
        has_padding: An embedding has a `padding_idx`.
        changes_attributes: A call assigns attributes of the network.
        stops_gradients: Some operations are hidden from autograd with `detach`, `no_grad` or a
            `torch.autograd.Function`.
    """

    changes_inputs: bool
    draws_random_numbers: bool
    fused_attention: bool
    has_padding: bool
    changes_attributes: bool
    stops_gradients: bool


def inspect_network(network: nn.Module, loss: Loss, task: Task) -> NetworkTraits:
    """Call the network and its loss on one task, and reject what no engine supports.

    Raises:
        UserError: A call depends on earlier calls, or the loss is not a scalar.
    """
    assigns = changes_attributes(network, loss, task)
    with preserve_state(network, loss):
        before = {key: value.clone() for key, value in registered_tensors(network).items()}
        x, y = task.support_x.clone(), task.support_y.clone()
        state = RandomState(x.device)
        with OperationWatch() as operations, DetachWatch() as detached:
            prediction = network(x)
            value = loss(prediction, y)
        changes_inputs = was_changed_in_place(x) or was_changed_in_place(y)
        draws_random_numbers = not state.is_current()
        check_registered_unchanged(network, before)
        if value.shape != ():
            raise UserError(
                f"the loss of one task is {tuple(value.shape)}; it must be a scalar, so give the loss "
                "a reduction"
            )
        check_repeatable(network, loss, task, state)
    return NetworkTraits(
        changes_inputs,
        draws_random_numbers,
        operations.fused_attention,
        operations.has_padding,
        assigns,
        stops_gradients=detached.found or operations.without_gradient,
    )
