"""Capture a computation on a GPU as a CUDA graph, and replay it: one launch instead of thousands.

A GPU computes the meta-gradient of a small network in less time than Python needs to launch its kernels.
A replay reads the same tensors as the captured call, where they are, and computes with the same Python
values. So everything else that a result depends on belongs to the key under which a capture is kept.
"""

import logging
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maml_pipeline.torch_internals import copy_each, tensors_of, with_tensors

logger = logging.getLogger(__name__)

MOST_CAPTURES = 4
"""Captures that are kept at once; training takes two, if it changes its gradient order."""

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

    The first call fills caches and chooses kernels, the second one in a row is captured, later ones
    replay it. Functions that take turns are never captured. One that cannot be captured, because it
    waits for the GPU or there is too little memory, is called as it is.

    Args:
        capture: Captures a call with some arguments.
        device: Type of the device on which it can.
    """

    def __init__(self, capture: Callable[[Call, list[Tensor]], Capture], device: str = "cuda") -> None:
        self.device = device
        self._capture = capture
        self._kept: dict[Hashable, _Kept] = {}
        self._refused: set[Hashable] = set()
        self._previous: Hashable = None

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
            *(key, form, live_form),
            *(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
            *((t.shape, t.dtype, t.device) for t in copied),
            *((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in read),
        )
        is_repeated, self._previous = key == self._previous, key
        if is_repeated and key not in self._kept and key not in self._refused:

            def call(tensors: list[Tensor]) -> Any:
                number = len(copied)
                return function(
                    with_tensors(form, tensors[:number]), with_tensors(live_form, tensors[number:])
                )

            self._try_to_capture(key, call, copied, read)
        if key not in self._kept:
            return function(given, live)
        kept = self._kept[key]
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
        while len(self._kept) >= MOST_CAPTURES:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = _Kept(copied, live, capture)

    def forget(self) -> None:
        """Free all captures. The next call of a function is one without a capture."""
        self._kept.clear()
        self._previous = None


class CudaGraphs:
    """Capture calls as CUDA graphs, which share their memory, since no two of them run at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, call: Call, arguments: list[Tensor]) -> Capture:
        """Capture a call that has been made before.

        Raises:
            RuntimeError: It waits for the GPU, or there is too little memory.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Autocast keeps the parameters that it has converted: a graph must convert them itself.
        torch.clear_autocast_cache()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            call(arguments)  # libraries allocate what they need on a stream of their own
        current.wait_stream(side)
        torch.clear_autocast_cache()
        # Other threads, such as those that load tasks, may go on.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = call(arguments)
        torch.clear_autocast_cache()
        return Capture(results, graph.replay)


def python_state(module: object) -> tuple[object, ...]:
    """Return the numbers, strings and switches that are attributes of a module and of its parts.

    The module's code may decide by them what it computes, such as a rate that a callback changes.
    """
    if not isinstance(module, nn.Module):
        return ()
    return tuple(
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, bool | int | float | str | None)
    )
