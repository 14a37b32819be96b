"""The three operations of a convolution for many tasks: the partial derivatives of <y, x * w>.

A convolution y = x * w is one derivative of this trilinear form; those with respect to x and w are the
two halves of its backward pass. While all tasks share their weights, each is one convolution.
Afterwards there are two ways: a grouped convolution with a group for each task, and a batched matrix
product with columns, the patches of x that the kernel meets. Which one is faster depends on the GPU,
the shapes and the version of cuDNN, so on a GPU both are timed, once for each shape in a process. On a
CPU it is the grouped convolution.
"""

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import fold, unfold

Operand = Literal["x", "w", "y"]

TIMED_CALLS = 3


class TrilinearForm(NamedTuple):
    """The form <y, x * w> of T tasks, with x `(T, S, C, H, W)`, w `(T, O, C, h, w)`, y `(T, S, O, ...)`.

    Args:
        x_shape: Shape of x.
        w_shape: Shape of w.
        stride: Stride in both directions.
        padding: Zeros added on each side.
    """

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    stride: int
    padding: int

    def partial_derivative(self, wrt: Operand, first: Tensor, second: Tensor) -> Tensor:
        """Differentiate the form with respect to one operand.

        Args:
            wrt: Name of the operand.
            first: The first of the other two operands, in the order x, w, y.
            second: The second of them.

        Returns:
            A tensor of the operand's shape.
        """
        weight = second if wrt == "y" else first
        if wrt != "w" and (weight.stride(0) == 0 or len(weight) == 1):
            return shared_convolution(self, wrt, first, second)
        way = fastest_way(self, wrt, first, second) if first.is_cuda else grouped_convolution
        return way(self, wrt, first, second)

    def convolution_backward(
        self, y: Tensor, x: Tensor | None, w: Tensor | None, groups: int, wrt: Operand
    ) -> Tensor:
        """Call PyTorch's backward pass, which uses only the shape of the operand `wrt`."""
        T, S, C, H, W = self.x_shape
        if x is None:
            x = y.new_empty(1).expand((T * S, C, H, W) if groups == 1 else (S, T * C, H, W))
        if w is None:
            w = y.new_empty(1).expand(T * self.w_shape[1], *self.w_shape[2:])
        stride, padding = [self.stride] * 2, [self.padding] * 2
        output_mask = [wrt == "x", wrt == "w", False]
        gradients = torch.ops.aten.convolution_backward(
            y, x, w, None, stride, padding, [1, 1], False, [0, 0], groups, output_mask
        )
        gradient: Tensor = gradients[0 if wrt == "x" else 1]
        return gradient


Way = Callable[[TrilinearForm, Operand, Tensor, Tensor], Tensor]
"""Computes `TrilinearForm.partial_derivative`."""


def shared_convolution(form: TrilinearForm, wrt: Operand, first: Tensor, second: Tensor) -> Tensor:
    """Differentiate with respect to x or y where the first task's weights are those of all tasks."""
    weight, operand = (second, first) if wrt == "y" else (first, second)
    if wrt == "y":
        result = torch.conv2d(operand.flatten(0, 1), weight[0], None, form.stride, form.padding)
    else:
        result = form.convolution_backward(operand.flatten(0, 1), None, weight[0], 1, wrt)
    return _unflatten(result, form.x_shape[0])


def grouped_convolution(form: TrilinearForm, wrt: Operand, first: Tensor, second: Tensor) -> Tensor:
    """Differentiate by convolutions in which each task is a group of channels."""
    tasks = form.w_shape[0]
    if wrt == "w":
        x, y = _tasks_to_channels(first), _tasks_to_channels(second)
        return _unflatten(form.convolution_backward(y, x, None, tasks, wrt), tasks)
    if wrt == "y":
        x, w = _tasks_to_channels(first), second.flatten(0, 1)
        result = torch.conv2d(x, w, None, form.stride, form.padding, 1, tasks)
    else:
        w, y = first.flatten(0, 1), _tasks_to_channels(second)
        result = form.convolution_backward(y, None, w, tasks, wrt)
    return _unflatten(result.transpose(0, 1), tasks).transpose(1, 2)


def column_products(form: TrilinearForm, wrt: Operand, first: Tensor, second: Tensor) -> Tensor:
    """Differentiate by one batched matrix product, with a matrix of columns for each task."""
    tasks, points, *_, height, width = form.x_shape
    kernel, stride, padding = form.w_shape[3:], form.stride, form.padding

    def columns(x: Tensor) -> Tensor:
        patches = unfold(x.flatten(0, 1), kernel, 1, padding, stride)  # (T * S, C * h * w, positions)
        return _unflatten(patches, tasks).transpose(1, 2).flatten(2)  # (T, C * h * w, S * positions)

    def points_last(y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)  # (T, O, S * positions)

    def points_first(matrix: Tensor) -> Tensor:
        return matrix.view(*matrix.shape[:2], points, -1).transpose(1, 2)  # (T, S, rows, positions)

    if wrt == "w":
        return (points_last(second) @ columns(first).mT).view(form.w_shape)
    if wrt == "y":
        rows = (height + 2 * padding - kernel[0]) // stride + 1
        y = points_first(second.flatten(2) @ columns(first))
        return y.view(*y.shape[:3], rows, -1)
    patches = points_first(first.flatten(2).mT @ points_last(second)).flatten(0, 1)
    return _unflatten(fold(patches, (height, width), kernel, 1, padding, stride), tasks)


WAYS: tuple[Way, ...] = (grouped_convolution, column_products)
fastest_ways: dict[Hashable, Way] = {}
"""What was chosen in this process, by shapes and device."""


def seconds_on_gpu(call: Callable[[], Tensor]) -> float:
    """Time a call on the current GPU; infinity if there is too little memory for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    try:
        call()  # chooses kernels, and allocates
        start.record()
        for _ in range(TIMED_CALLS):
            call()
        end.record()
        end.synchronize()
    except torch.OutOfMemoryError:
        return float("inf")
    return float(start.elapsed_time(end)) / 1e3 / TIMED_CALLS


def fastest_way(
    form: TrilinearForm,
    wrt: Operand,
    first: Tensor,
    second: Tensor,
    seconds: Callable[[Callable[[], Tensor]], float] = seconds_on_gpu,
) -> Way:
    """Return the way that takes less time for these shapes on this device.

    They are timed on the first call, which waits for the device. Capturing a CUDA graph forbids that:
    an unknown shape then takes the grouped convolution. So it does where PyTorch's deterministic
    algorithms are asked for, since times differ from process to process.

    Args:
        form: See `TrilinearForm.partial_derivative`, as for the next three.
        wrt: Name of an operand.
        first: One of the others.
        second: The other one.
        seconds: Times a call.
    """
    key = form, wrt, first.dtype, first.device
    if torch.are_deterministic_algorithms_enabled():
        return grouped_convolution
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        is_capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
        if key not in fastest_ways and not is_capturing:
            fastest_ways[key] = min(WAYS, key=lambda way: seconds(lambda: way(form, wrt, first, second)))
    return fastest_ways.get(key, grouped_convolution)


def _tasks_to_channels(x: Tensor) -> Tensor:
    """Flatten `(T, S, C, ...)` -> `(S, T * C, ...)`, where each task is a group of channels."""
    return x.transpose(0, 1).flatten(1, 2)


def _unflatten(x: Tensor, parts: int) -> Tensor:
    """Split the first dimension: `(T * S, ...)` -> `(T, S, ...)`."""
    return x.view(parts, -1, *x.shape[1:])
