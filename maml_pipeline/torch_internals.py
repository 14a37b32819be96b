"""Every private, undocumented or unstable part of PyTorch that this package relies on.

One function for each, with its reason. `tests/test_internals_torch.py` has a test for each function,
which fails when a PyTorch upgrade breaks it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._C._profiler import _EventType
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

MODULE_REGISTRIES = ("_parameters", "_buffers", "_modules")
"""Attributes in which `nn.Module` keeps what is registered; `preservation` treats them separately."""


class CpuAllocation(NamedTuple):
    """An allocation on the CPU; a deallocation has a size that is not positive."""

    time: int
    address: int
    size: int


def cpu_allocations(profiler: profile) -> list[CpuAllocation]:
    """Return every CPU allocation of a finished profile, in order of time.

    The public profiler reports memory by operator; a peak needs the single events.
    """
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None

    def walk(events: Iterable[Any]) -> Iterator[CpuAllocation]:
        for event in events:
            if event.tag == _EventType.Allocation:
                fields = event.extra_fields
                yield CpuAllocation(event.start_time_ns, fields.ptr, fields.alloc_size)
            yield from walk(event.children)

    return sorted(walk(results.experimental_event_tree()), key=lambda allocation: allocation.time)


def is_transformed() -> bool:
    """Tell whether a transform of `torch.func`, such as vmap, is being applied to the current call.

    Layers that PyTorch computes slowly or wrongly under a transform then use other operations.
    """
    return peek_interpreter_stack() is not None


def add_in_place(sums: list[Tensor], addends: list[Tensor]) -> None:
    """Add a tensor to each sum in one call, which takes less time than a call for each.

    PyTorch's functions of lists of tensors begin with an underscore, and refuse empty lists.
    """
    if sums:
        torch._foreach_add_(sums, addends)


def copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to the target in its place, in one call; see `add_in_place`."""
    if targets:
        torch._foreach_copy_(targets, sources)


@contextmanager
def without_attention_fast_path() -> Iterator[None]:
    """Disable the inference kernel of `nn.TransformerEncoderLayer`, which vmap does not support.

    PyTorch uses it in evaluation mode without gradients. Its switch is undocumented.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def uses_weight_normalization(module: nn.Module) -> bool:
    """Tell whether a module is PyTorch's weight normalisation, in its new form or in its old one.

    Its second derivative is wrong: `torch._weight_norm` fails `torch.autograd.gradgradcheck`.
    """
    hooks = module._forward_pre_hooks.values()
    is_old_form = any(isinstance(hook, WeightNorm) for hook in hooks)
    return is_old_form or isinstance(module, parametrizations._WeightNorm)


def is_spectral_normalization(module: nn.Module) -> bool:
    """Tell whether a module is PyTorch's spectral normalisation, which changes its buffers."""
    return isinstance(module, parametrizations._SpectralNorm)


def is_batch_or_instance_normalization(module: nn.Module) -> bool:
    """Tell whether a module is a layer that can have running statistics; all share a private base."""
    return isinstance(module, nn.modules.batchnorm._NormBase)


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to since it was made, as autograd counts."""
    return tensor._version


def was_changed_in_place(tensor: Tensor) -> bool:
    """Tell whether a new tensor was written to."""
    return version(tensor) > 0


def uses_activation_checkpointing(call: Callable[[], object]) -> bool:
    """Tell whether a call goes through `torch.utils.checkpoint`, which offers no hook of its own."""
    found = False

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal found
        found |= frame.f_code.co_filename == torch.utils.checkpoint.__file__

    profiler = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(profiler)
    return found


REENTRANT_CHECKPOINT_WARNING = "None of the inputs have requires_grad"
"""Beginning of the warning of reentrant `torch.utils.checkpoint`, which then drops gradients."""


def is_reentrant_checkpoint_error(message: str) -> bool:
    """Tell whether a message is that of reentrant `torch.utils.checkpoint`, which has no error type."""
    return "use_reentrant" in message or REENTRANT_CHECKPOINT_WARNING in message


def is_missing_derivative_error(message: str) -> bool:
    """Tell whether a message says that an operation has no derivative; there is no error type for it."""
    return "not implemented" in message


class OperationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which kernels run; the names of ATen operators are not a stable interface.

    Attributes:
        fused_attention: Attention ran in a fused kernel, which has no second derivative.
        has_padding: An embedding has a `padding_idx`.
        without_gradient: An operation ran under `torch.no_grad`, also inside a custom Function.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fused_attention = self.has_padding = self.without_gradient = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        self.fused_attention |= "_scaled_dot_product_" in name and "_math" not in name
        if name.startswith(("aten.embedding.", "aten._embedding_bag")):
            padding = args[2] if name.startswith("aten.embedding.") and len(args) > 2 else -1
            self.has_padding |= padding >= 0
        self.without_gradient |= not torch.is_grad_enabled()
        return function(*args, **(kwargs or {}))


class DetachWatch(TorchFunctionMode):
    """Record calls of `detach` and reads of `.data`, whose getter has no public name.

    Attributes:
        found: There was one.
    """

    DETACHING = (Tensor.detach, Tensor.detach_, Tensor.data.__get__)  # type: ignore[attr-defined]

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.found |= function in self.DETACHING
        return function(*args, **(kwargs or {}))


HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
"""Attributes in which a module keeps its hooks."""


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has hooks of any kind; there is no public list of them."""
    attributes = vars(module)
    return any(attributes[name] for name in HOOKS)


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Tell whether autograd calls hooks with a tensor's gradient; there is no public list of them."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def source_of_quotient(tensor: Tensor) -> Any:
    """Return the autograd node that a tensor's dividend comes from; `None` if it is not a quotient.

    The names of nodes are not a stable interface.
    """
    quotient = tensor.grad_fn
    return quotient.next_functions[0][0] if quotient and quotient.name() == "DivBackward0" else None


def flatten(tensors: list[Tensor]) -> Tensor:
    """Concatenate the numbers of tensors; `parameters_to_vector` takes several times as long."""
    return _flatten_dense_tensors(tensors)  # type: ignore[no-any-return, no-untyped-call]


def unflatten(values: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
    """Undo `flatten`: views of the values in the shapes of the tensors."""
    return _unflatten_dense_tensors(values, like)  # type: ignore[no-any-return, no-untyped-call]


def tensors_of(tree: Any) -> tuple[list[Tensor], TreeSpec]:
    """Return the tensors in nested tuples, lists and dicts, and what `with_tensors` takes.

    `torch.func` takes such arguments, but its functions for them begin with an underscore.
    """
    return tree_flatten(tree)


def with_tensors(spec: TreeSpec, tensors: Iterable[Tensor]) -> Any:
    """Undo `tensors_of`, with other tensors."""
    return tree_unflatten(tensors, spec)
