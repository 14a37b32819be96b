"""Layers that need attention by name: lazy ones and weight normalisation."""

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.exactness.state import registered_tensors
from maml_pipeline.meta_gradient.inner_loop import InnerLoop
from maml_pipeline.tasks import Task
from maml_pipeline.torch_internals import uses_weight_normalization


def initialise_lazy(network: nn.Module, task: Task) -> None:
    """Initialise lazy layers, such as `nn.LazyLinear`, from the shapes of one task.

    Networks without lazy layers are not called. Use it before building an optimizer.

    Args:
        network: Its lazy layers draw their initial parameters.
        task: Any task of the distribution.
    """
    # A lazy layer whose parameters were loaded becomes an ordinary one in its first call, too.
    is_lazy_layer = (isinstance(module, LazyModuleMixin) for module in network.modules())
    if any(is_lazy_layer) or any(map(is_lazy, registered_tensors(network).values())):
        with torch.no_grad():
            network(task.support_x.clone())


def check_initialised(network: nn.Module) -> None:
    """Reject lazy layers that have no parameters yet.

    Raises:
        UserError: The network has such a layer.
    """
    for name, tensor in registered_tensors(network).items():
        if is_lazy(tensor):
            raise UserError(
                f"network {type(network).__name__} has an uninitialised lazy layer at {name}: call the "
                "network once on a task's support_x before training"
            )


def check_twice_differentiable(network: nn.Module, inner: InnerLoop) -> None:
    """Reject second order through PyTorch's weight normalisation, whose second derivative is wrong.

    The comparison with finite differences would reject it as well; this error names the layer.

    Raises:
        UserError: The network has such a layer.
    """
    if not inner.needs_second_derivatives:
        return
    for name, module in network.named_modules():
        if uses_weight_normalization(module):
            raise UserError(
                f"PyTorch's weight normalisation, at {name}, has a wrong second derivative: set method "
                "to hessian_free or first_order to true, or write the layer as "
                "weight_v * (weight_g / norm of weight_v)"
            )
