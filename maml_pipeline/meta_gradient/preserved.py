"""Try things with a network, and leave no trace: parameters, buffers, attributes, random numbers."""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def borrowed(*owners: object, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Move the tensors of modules to storage of their own, and put everything back afterwards.

    The parameters stay the same objects, so that whatever else refers to them (a list, a closure, a
    bound method) sees the same values. What is put back is the very storage, bit for bit.

    Args:
        owners: Modules; anything else, such as a loss that is a function, is ignored.
        dtype: The type that floating-point tensors have meanwhile; their own by default.
    """
    modules = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
    tensors = {id(t): t for module in modules for t in _registered(module)}.values()
    storages = [(tensor, tensor.data) for tensor in tensors]
    with attributes_restored(modules):
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
    both = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in both if tensor is not None]


def _copied(data: Tensor, dtype: torch.dtype | None) -> Tensor:
    return data.to(dtype, copy=True) if dtype and data.is_floating_point() else data.clone()


def _convert_attributes(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert tensors that are plain attributes, which no `Module.to` reaches."""
    for name, value in module.__dict__.items():
        is_plain = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        if is_plain and value.is_floating_point() and not value.requires_grad:
            module.__dict__[name] = value.to(dtype)


@contextmanager
def attributes_restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put back what is assigned to attributes of modules, and what is put into lists and dicts there."""
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
    """Name the attributes that are not as in `snapshots`, as made by `snapshot_attributes`."""
    return [
        f"{module_name}.{name}".strip(".")
        for module_name, module in network.named_modules()
        for name, value in module.__dict__.items()
        if name not in ("_parameters", "_buffers", "_modules")
        and not _is_as_before(value, snapshots[module_name].get(name))
    ]


def snapshot_attributes(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Remember every module's attributes, by name of the module."""
    return {name: _snapshot(module) for name, module in network.named_modules()}


def _snapshot(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return each attribute with a shallow copy of its content where it is a list, dict or set."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (list, dict, set)) else None)
        for name, value in module.__dict__.items()
    }


def _is_as_before(value: Any, before: tuple[Any, Any] | None) -> bool:
    if before is None or value is not before[0]:
        # Small numbers and texts may be equal without being one object.
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
    """The state of every generator that a network may draw from: PyTorch's, NumPy's and Python's.

    Args:
        device: Where the network runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._torch = torch.get_rng_state()
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        """Let every generator draw again what it drew from here on."""
        torch.set_rng_state(self._torch)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def is_current(self) -> bool:
        """Say whether nothing was drawn since."""
        now = RandomState(torch.device("cpu") if self._device is None else self._device)
        return (
            torch.equal(self._torch, now._torch)
            and (self._cuda is None or now._cuda is None or torch.equal(self._cuda, now._cuda))
            and all(np.array_equal(a, b) for a, b in zip(self._numpy, now._numpy, strict=True))
            and self._python == now._python
        )


@contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """Draw random numbers without anyone noticing afterwards."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()
