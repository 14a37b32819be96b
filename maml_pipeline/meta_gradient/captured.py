"""Capture a computation on a GPU as a CUDA graph, and replay it: one launch instead of thousands.

A GPU computes the meta-gradient of a small network in less time than Python needs to launch its kernels.
A replay reads the same tensors as the captured call, where they are, and computes with the same Python
values. So everything else that a result depends on belongs to the key under which a capture is kept.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from maml_pipeline.torch_internals import copy_each, tensors_of, version, with_tensors

logger = logging.getLogger(__name__)

MOST_CAPTURES = 2
"""Captures that are kept at once, one for each gradient order of a training that changes it."""

CALLS_BEFORE_CAPTURE = 2
"""Calls in a row before one is captured: the first fills caches and chooses kernels."""

Call = Callable[[list[Tensor]], Any]
"""(arguments) -> tensors in tuples, lists and dicts."""


class Capture(NamedTuple):
    """A call that can be repeated.

    Args:
        results: Each replay writes to them.
        replay: Repeats the call with what its arguments hold now.
    """

    results: Any
    replay: Callable[[], None]


class _Kept(NamedTuple):
    """A capture, and the arguments that it reads, whose memory must not be used for anything else."""

    copied: list[Tensor]
    live: list[Tensor]
    capture: Capture


class CapturedCalls:
    """Call functions of tensors, and replay those that are called repeatedly.

    The third call of a function in a row is captured, and later ones replay it. Functions that take
    turns are never captured. One that cannot be captured, because it waits for the GPU or there is too
    little memory, is called as it is.

    Args:
        capture: Captures a call with some arguments.
        device: Type of the device on which it can.

    Attributes:
        kept: The captures, by their keys.
    """

    def __init__(self, capture: Callable[[Call, list[Tensor]], Capture], device: str = "cuda") -> None:
        self.device = device
        self._capture = capture
        self.kept: dict[Hashable, _Kept] = {}
        self._refused: set[Hashable] = set()
        self._previous: Hashable = None
        self._calls = 0

    def __call__(self, key: Hashable, function: Callable[[Any, Any], Any], given: Any, live: Any) -> Any:
        """Return `function(given, live)`, in memory of its own.

        Args:
            key: Identifies the function and all Python values that it depends on.
            function: Draws no random numbers, and leaves its arguments unchanged.
            given: Tensors that may be others in each call, in tuples, lists and dicts.
            live: Tensors that change in place from call to call, likewise.
        """
        (copied, form), (read, live_form) = tensors_of(given), tensors_of(live)
        key = (
            *(key, form, live_form, *_settings_of_pytorch()),
            *((t.shape, t.dtype, t.device) for t in copied),
            *((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in read),
        )
        self._calls = self._calls + 1 if key == self._previous else 1
        self._previous = key
        is_due = self._calls > CALLS_BEFORE_CAPTURE and key not in self._refused
        if is_due and key not in self.kept:

            def call(tensors: list[Tensor]) -> Any:
                number = len(copied)
                return function(
                    with_tensors(form, tensors[:number]), with_tensors(live_form, tensors[number:])
                )

            self._try_to_capture(key, call, copied, read)
        if key not in self.kept:
            return self.with_memory(partial(function, given, live))
        kept = self.kept[key]
        copy_each(kept.copied, copied)
        kept.capture.replay()
        results, result_form = tensors_of(kept.capture.results)
        own = [torch.empty_like(result) for result in results]
        copy_each(own, results)  # the next replay overwrites the results
        return with_tensors(result_form, own)

    def _try_to_capture(
        self, key: Hashable, call: Call, given: list[Tensor], live: list[Tensor]
    ) -> None:
        copied = [tensor.clone() for tensor in given]
        try:
            capture = self._capture(call, [*copied, *live])
        except RuntimeError as error:
            self._refused.add(key)
            logger.warning("the meta-gradient is not captured as a CUDA graph: %s", error)
            return
        while len(self.kept) >= MOST_CAPTURES:
            del self.kept[next(iter(self.kept))]
        self.kept[key] = _Kept(copied, live, capture)

    def with_memory(self, call: Callable[[], Any]) -> Any:
        """Make another call; if there is too little memory beside the captures, make it without them."""
        try:
            return call()
        except torch.OutOfMemoryError:
            if not self.kept:
                raise
        self.forget()
        return call()

    def forget(self) -> None:
        """Free all captures. The next call of a function is one without a capture."""
        if self.kept:
            self.kept.clear()
            torch.cuda.empty_cache()  # what a capture has reserved is of use to nothing else
        self._refused.clear()
        self._previous = None


class CudaGraphs:
    """Capture calls as CUDA graphs, each with memory of its own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, call: Call, arguments: list[Tensor]) -> Capture:
        """Capture a call that has been made before.

        Raises:
            RuntimeError: It waits for the GPU, or there is too little memory.
        """
        device = arguments[0].device
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream, current = self._streams[device], torch.cuda.current_stream()
            graph = torch.cuda.CUDAGraph()
            # Autocast keeps the parameters that it has converted: a graph must convert them itself.
            torch.clear_autocast_cache()
            try:
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    call(arguments)  # libraries allocate for each stream what they work with
                current.wait_stream(stream)
                torch.clear_autocast_cache()
                # Other threads, such as those that load tasks, may go on.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    results = call(arguments)
            finally:
                torch.clear_autocast_cache()
        return Capture(results, graph.replay)


def _settings_of_pytorch() -> tuple[object, ...]:
    """Return the switches that decide which kernels run."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


def python_state(owner: object) -> tuple[object, ...]:
    """Return what the code of a module, or of another object, may decide by what it computes.

    Those are the attributes of the module and of its parts; of a bound method, those of its object; of a
    `functools.partial`, its arguments. Numbers, strings, switches and arrays count by their value, also
    in tuples, lists, sets, dicts, dataclasses and namespaces; anything else by its identity, a tensor
    also by its memory.
    """
    return tuple((type(part), _state(attributes)) for part, attributes in _parts(owner))


def plain_tensors(owner: object) -> list[Tensor]:
    """Return the tensors in the attributes of a module and of its parts, besides registered ones."""
    leaves = [leaf for _, attributes in _parts(owner) for leaf in tensors_of(attributes)[0]]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _parts(owner: object) -> list[tuple[object, dict[str, Any]]]:
    if isinstance(owner, partial):
        arguments = {"func": owner.func, "args": owner.args, "keywords": owner.keywords}
        return [(owner, arguments), *_parts(owner.func)]
    if isinstance(owner, MethodType):
        return [(owner, {"function": owner.__func__}), *_parts(owner.__self__)]
    parts = [*owner.modules()] if isinstance(owner, nn.Module) else [owner]
    registered = ("_parameters", "_buffers")
    return [
        (part, {name: v for name, v in getattr(part, "__dict__", {}).items() if name not in registered})
        for part in parts
    ]


class _Same:
    """Equal to itself for the same object only, which it keeps alive: no other gets its identity."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _state(value: object, within: tuple[int, ...] = ()) -> object:
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, Tensor):
        return _Same(value), value.data_ptr(), None if value.is_cuda else version(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, str(value.dtype), value.tobytes()
    if id(value) in within:  # a container that holds itself
        return _Same(value)
    state = partial(_state, within=(*within, id(value)))
    if isinstance(value, tuple | list):
        return type(value), *map(state, value)
    if isinstance(value, set | frozenset):
        return frozenset(map(state, value))
    if isinstance(value, dict):
        return tuple((_state(key), state(of_key)) for key, of_key in value.items())
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        return _Same(value), state(getattr(value, "__dict__", {}))
    return _Same(value)
