"""Adapt a network to the support set of one task, as a plain module to predict with."""

import copy
import threading

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError, first_line
from maml_pipeline.learner.model_checks import check_support
from maml_pipeline.meta_gradient import Engine, InnerLoop, Loss, initialise_lazy
from maml_pipeline.meta_gradient.exactness import check_copy, evaluation_mode, preserve_random_state
from maml_pipeline.tasks import Task
from maml_pipeline.tasks.task import type_name

ONE_AT_A_TIME = threading.RLock()
"""Checking a network changes its mode and its parameters for a moment, which no other thread may see."""


def adapted_network(
    network: nn.Module,
    engine: Engine,
    loss: Loss,
    support_x: Tensor,
    support_y: Tensor,
    inner: InnerLoop,
    transductive: bool,
) -> nn.Module:
    """Return a copy of a network that has adapted to the support set of one task.

    Calls from several threads take turns.

    Args:
        network: Left unchanged, except that lazy layers take their shapes from the support set.
        engine: Computes the inner steps.
        loss: (prediction, target) -> scalar, which adaptation minimises.
        support_x: Inputs `(S, ...)` on any device.
        support_y: Targets `(S, ...)` on any device.
        inner: Inner learning rate and number of steps k.
        transductive: Whether query points share a batch; if not, the copy is in a `NonTransductive`.

    Raises:
        UserError: The support set does not fit the network or the loss, the adaptation would not be
            exact or diverges, or the network cannot be copied.
    """
    check_tensors(support_x, support_y)
    device = next(network.parameters()).device
    with (
        ONE_AT_A_TIME,
        torch.inference_mode(False),
        torch.enable_grad(),
        preserve_random_state(device),
        evaluation_mode(network),
    ):
        # Copies: autograd cannot differentiate inference tensors.
        support_x, support_y = (t.detach().to(device, copy=True) for t in (support_x, support_y))
        task = Task(support_x, support_y, support_x, support_y)
        initialise_lazy(network, task)
        check_support(network, loss, support_x, support_y)
        parameters = engine.adapted_parameters(network, loss, support_x, support_y, inner)
        if not all(p.isfinite().all() for p in parameters.values()):
            raise UserError(
                f"the adapted parameters are not finite after {inner.steps} inner steps with inner_lr "
                f"{inner.lr}: lower inner_lr, or look for bad values in the support set"
            )
        adapted = _copy(network, loss, task)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if name in parameters:
                    parameter.copy_(parameters[name])
    return adapted if transductive else NonTransductive(adapted, support_x).eval()


class NonTransductive(nn.Module):
    """Predict each query point in a batch with the support set, never with other query points.

    This is how `transductive: false` evaluates networks whose normalisation shares statistics among the
    points of a batch. Costs Q calls of the network with S + 1 points each.

    Args:
        network: Adapted to the support set.
        support_x: The support set's inputs `(S, ...)`; a buffer, so that `to` moves it.

    Shapes: `(Q, ...)` -> `(Q, ...)`.

    References:
        Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018, section 6.1.
    """

    support_x: Tensor

    def __init__(self, network: nn.Module, support_x: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("support_x", support_x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.network(torch.cat([self.support_x, point[None]]))[-1] for point in x])


def check_tensors(support_x: Tensor, support_y: Tensor) -> None:
    """Check that inputs and targets are tensors with the same number of points, at least one.

    Raises:
        UserError: They are not.
    """
    for name, tensor in (("support_x", support_x), ("support_y", support_y)):
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name} is {type_name(tensor)}; it must be a tensor of shape (S, ...)")
        if tensor.layout is not torch.strided:
            raise UserError(f"{name} is a sparse tensor; give a dense one, such as {name}.to_dense()")
        if not tensor.ndim or not len(tensor):
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}; its first dimension must be the number of "
                "support points S, at least 1"
            )
    if len(support_x) != len(support_y):
        raise UserError(
            f"support_x has shape {tuple(support_x.shape)} and support_y {tuple(support_y.shape)}; the "
            "first dimension of both must be the number of support points S"
        )


def _copy(network: nn.Module, loss: Loss, task: Task) -> nn.Module:
    try:
        duplicate = copy.deepcopy(network)
        with torch.autocast(task.support_x.device.type, enabled=False):  # it caches cast parameters
            check_copy(network, duplicate, loss, task)
    except Exception as error:  # copying may call the user's code
        raise UserError(
            f"network {type(network).__name__} cannot be copied: {first_line(error)}; keep its layers "
            "and parameters as attributes, make no other references to them (as lambdas do), and take "
            "weight_norm and spectral_norm from torch.nn.utils.parametrizations"
        ) from error
    return duplicate
