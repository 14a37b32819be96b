"""A network as a function of its parameters."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call

from maml_pipeline.meta_gradient.inner_loop import Parameters, trainable_parameters


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
