"""Run a network and restore its parameters, buffers and attributes, its mode and the random state."""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maml_pipeline.torch_internals import MODULE_REGISTRIES


@contextmanager
def preserve_state(*owners: object, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Give the tensors of modules temporary storage, and restore the original storage afterwards.

    Parameters remain the same objects, so references to them (in a list, a closure, a bound method) see
    the temporary values. Attributes are restored too.

    Args:
        owners: Modules; other objects, such as a loss function, are ignored.
        dtype: Temporary type of floating-point tensors; by default their own.
    """
    modules = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
    tensors = {id(t): t for module in modules for t in _registered(module)}.values()
    storages = [(tensor, tensor.data) for tensor in tensors]
    with preserve_attributes(modules):
        try:
            for tensor, data in storages:
                tensor.data = _copied(data, dtype)
            if dtype is not None:
                for module in modules:
                    _convert_attributes(module, dtype)
            yield
        finally:
            for tensor, data in storages:
                tensor.data = data


def _registered(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _copied(data: Tensor, dtype: torch.dtype | None) -> Tensor:
    return data.to(dtype, copy=True) if dtype and data.is_floating_point() else data.clone()


def _convert_attributes(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert tensors in plain attributes, which `Module.to` does not convert."""
    for name, value in module.__dict__.items():
        is_plain = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        if is_plain and value.is_floating_point() and not value.requires_grad:
            module.__dict__[name] = value.to(dtype)


@contextmanager
def preserve_attributes(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the attributes of modules afterwards, and the content of lists and dicts among them."""
    before = [(module.__dict__, _snapshot(module)) for module in modules]
    try:
        yield
    finally:
        for attributes, snapshot in before:
            for name in attributes.keys() - snapshot.keys():
                del attributes[name]
            for name, (value, content) in snapshot.items():
                attributes[name] = value
                if content is not None and not _same_content(value, content):
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)


def changed_attributes(network: nn.Module, snapshots: dict[str, dict[str, Any]]) -> list[str]:
    """Return the names of attributes that changed since `snapshot_attributes`."""
    return [
        f"{module_name}.{name}".strip(".")
        for module_name, module in network.named_modules()
        for name, value in module.__dict__.items()
        if name not in MODULE_REGISTRIES and not _is_unchanged(value, snapshots[module_name].get(name))
    ]


def snapshot_attributes(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return a snapshot of the attributes of each module, by module name."""
    return {name: _snapshot(module) for name, module in network.named_modules()}


def _snapshot(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return each attribute, with a shallow copy if it is a list, dict or set."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (list, dict, set)) else None)
        for name, value in module.__dict__.items()
    }


def _is_unchanged(value: Any, before: tuple[Any, Any] | None) -> bool:
    if before is None or value is not before[0]:
        # Numbers and strings may be equal without being identical.
        return before is not None and isinstance(value, (bool, int, float, str)) and value == before[0]
    return before[1] is None or _same_content(value, before[1])


def _same_content(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(key in content and value[key] is content[key] for key in value)
    if isinstance(value, list):
        return all(a is b for a, b in zip(value, content, strict=True))
    return bool(value == content)


class RandomState:
    """The current state of the random number generators of PyTorch, NumPy and Python.

    Args:
        device: Device of the network.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._torch = torch.get_rng_state()
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        """Set all generators back to this state."""
        torch.set_rng_state(self._torch)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def is_current(self) -> bool:
        """Tell whether no random number was drawn since."""
        now = RandomState(torch.device("cpu") if self._device is None else self._device)
        return (
            torch.equal(self._torch, now._torch)
            and (self._cuda is None or now._cuda is None or torch.equal(self._cuda, now._cuda))
            and all(np.array_equal(a, b) for a, b in zip(self._numpy, now._numpy, strict=True))
            and self._python == now._python
        )


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Restore the state of all random number generators afterwards."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
