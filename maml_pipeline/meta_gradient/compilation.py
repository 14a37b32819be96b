"""`torch.compile` of meta-gradients, derivatives and vmap and all."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

logger = logging.getLogger(__name__)


class CompiledCalls:
    """Calls pure functions of tensors, each compiled once for every shape of its arguments.

    Autograd and vmap are traced away first, so that the compiler sees tensor operations alone. The
    trace is made without data: a network whose path depends on its values cannot be compiled, and
    plain Python attributes of a network or a loss are constants of the trace. What cannot be compiled
    runs as it is, after one warning.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._failed = False

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function; arguments that are not tensors, nor hold any, are constants to it."""
        leaves, structure = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)

        def of_tensors(*tensors: Tensor) -> Any:
            remaining = iter(tensors)
            filled = [next(remaining) if c is None else c for c in constants]
            return function(*tree_unflatten(filled, structure))

        layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        key = (function, constants, str(structure), layouts, *_autocast(tensors))
        if key not in self._compiled and not self._failed:
            logger.info("compile: %s, once", function.__name__.strip("_").replace("_", " "))
            try:
                return self._compile(key, of_tensors, tensors)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may meet
                self._failed = True
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                warnings.warn(f"compile did not succeed, so goes without: {reason}", stacklevel=2)
        if key not in self._compiled:
            return function(*arguments)
        with torch.no_grad():
            return self._compiled[key](*tensors)

    def _compile(self, key: Any, function: Callable[..., Any], tensors: list[Tensor]) -> Any:
        # The network's frozen parameters and buffers are not fake: the trace refers to them.
        trace = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
        compiled = torch.compile(trace(*tensors))
        with torch.no_grad():
            result = compiled(*tensors)
        self._compiled[key] = compiled
        return result


def _autocast(tensors: list[Tensor]) -> tuple[bool, torch.dtype]:
    device = tensors[0].device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
