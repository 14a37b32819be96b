"""A network as a function of its parameters."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maml_pipeline.meta_gradient.inner_loop import Loss, Parameters, trainable_parameters


def stateless(network: nn.Module, in_double: bool = False) -> Callable[[Parameters, Tensor], Tensor]:
    """Make a network a function of its trainable parameters, by name, and of its input.

    A parameter that several modules share is replaced in each of them. `functional_call` with
    `tie_weights=True` does so too, but leaves the network broken where one module has two names: it
    replaces the same parameter twice and restores the first replacement.

    Args:
        network: Left unchanged.
        in_double: Whether parameters and input are float64. Frozen parameters and buffers are then cast
            to it in each call.
    """
    name_of = {id(p): name for name, p in trainable_parameters(network).items()}
    tensors = dict(_tensors_by_place(network))
    names_by_place = {place: name_of[id(t)] for place, t in tensors.items() if id(t) in name_of}
    constants = {place: t for place, t in tensors.items() if id(t) not in name_of}

    def call(parameters: Parameters, x: Tensor) -> Tensor:
        placed = {place: parameters[name] for place, name in names_by_place.items()}
        if in_double:
            placed |= {place: double(t) for place, t in constants.items()}
        prediction: Tensor = functional_call(network, placed, (x,), tie_weights=False)
        return prediction

    return call


def loss_in_double(loss: Loss) -> Loss:
    """Return the loss with its parameters and buffers, if it has any, in float64."""
    if not isinstance(loss, nn.Module):
        return loss
    tensors = dict(_tensors_by_place(loss))

    def call(prediction: Tensor, target: Tensor) -> Tensor:
        placed = {place: double(t) for place, t in tensors.items()}
        value: Tensor = functional_call(loss, placed, (prediction, target), tie_weights=False)
        return value

    return call


def double(tensor: Tensor) -> Tensor:
    """Cast a floating-point tensor to float64, detached; return any other as it is."""
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor


def _tensors_by_place(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of each module once, with the name of the place."""
    for name, child in module.named_modules():
        for attribute, tensor in (
            *child.named_parameters(recurse=False, remove_duplicate=False),
            *child.named_buffers(recurse=False, remove_duplicate=False),
        ):
            yield f"{name}.{attribute}" if name else attribute, tensor
