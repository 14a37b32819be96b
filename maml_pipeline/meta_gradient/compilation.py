"""Compiling meta-gradients, including their derivatives and vmap, with `torch.compile`."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.torch_internals import flatten, trace_with_fake_tensors

logger = logging.getLogger(__name__)


class CompiledCalls:
    """Call pure functions of tensors, compiled once for each set of argument shapes.

    A call is first traced to a graph without autograd and vmap, which is then compiled. Tracing uses no
    data: networks with control flow that depends on values cannot be compiled, and Python attributes of
    a network or loss are constants of the graph. If compiling fails, a warning is issued once and
    functions are called uncompiled.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._failed = False

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function; arguments without tensors are constants of the compiled graph."""
        leaves, unflatten, structure = flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)

        def of_tensors(*tensors: Tensor) -> Any:
            remaining = iter(tensors)
            return function(*unflatten([next(remaining) if c is None else c for c in constants]))

        layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        key = (function, constants, structure, layouts, *_autocast(tensors))
        if key not in self._compiled and not self._failed:
            name = function.__name__.replace("_", " ")
            logger.info("compile: %s, once; this can take a minute", name)
            try:
                return self._compile(key, of_tensors, tensors)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers raise errors of any type
                self._failed = True
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                warnings.warn(f"torch.compile failed; continuing uncompiled: {reason}", stacklevel=2)
        if key not in self._compiled:
            return function(*arguments)
        with torch.no_grad():
            return self._compiled[key](*tensors)

    def _compile(self, key: Any, function: Callable[..., Any], tensors: list[Tensor]) -> Any:
        compiled = torch.compile(trace_with_fake_tensors(function, tensors))
        with torch.no_grad():
            result = compiled(*tensors)
        self._compiled[key] = compiled
        return result


def _autocast(tensors: list[Tensor]) -> tuple[bool, torch.dtype]:
    device = tensors[0].device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
