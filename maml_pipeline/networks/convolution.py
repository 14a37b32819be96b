"""A convolution that stays fast when every task has its own weights and is differentiated twice.

MAML convolves T tasks with T different weights, which is a grouped convolution under `torch.func.vmap`,
and second order differentiates it twice. `torch.nn.Conv2d` gives the same numbers, but PyTorch's second
derivative of a grouped convolution loops over the groups, and vmap copies weights that all tasks still
share in the first inner step. `Convolution2d` avoids both.

The idea: a convolution y = x * w is one derivative of the trilinear form <y, x * w>. The form's partial
derivatives are the three operations of a convolution: with respect to y the convolution itself, with
respect to x and w the two halves of its backward pass. The derivative of each is again one of the three,
so no other operation is needed for derivatives of any order.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from maml_pipeline.torch_internals import is_transformed

Operand = Literal["x", "w", "y"]
OTHERS: dict[Operand, tuple[Operand, Operand]] = {"x": ("w", "y"), "w": ("x", "y"), "y": ("x", "w")}


class Convolution2d(nn.Conv2d):
    """2D convolution without groups or dilation, made for many tasks at once.

    A drop-in replacement for `torch.nn.Conv2d`: the same parameters, initialisation, values and
    derivatives. Under `torch.func.vmap` over weights it runs as one convolution while all tasks share
    their weights, and as one grouped convolution afterwards. Called for one task, without a transform
    of `torch.func`, it is `torch.nn.Conv2d`, which is then faster.

    Args:
        in_channels: Input channels C.
        out_channels: Output channels O.
        kernel_size: Height and width of the kernel.
        stride: Stride in both directions.
        padding: Zeros added on each side.

    Shapes: `(S, C, H, W)` -> `(S, O, H', W')`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        if not is_transformed():
            return super().forward(x)
        form = TrilinearForm(
            (1, *x.shape), (1, *self.weight.shape), int(self.stride[0]), int(self.padding[0])
        )
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):  # autocast does not see into PartialDerivative
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        # squeeze, because the derivative of indexing with [0] would allocate a tensor of zeros.
        y: Tensor = PartialDerivative.apply("y", form, x[None], weight[None]).squeeze(0)
        return y if bias is None else y + bias[:, None, None]


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
        if wrt == "w":
            gradient = self._backward(
                _tasks_to_channels(second), _tasks_to_channels(first), None, self.w_shape[0], wrt
            )
            return _unflatten(gradient, self.w_shape[0])
        weight = second if wrt == "y" else first
        operand = first if wrt == "y" else second
        shared = weight.stride(0) == 0 or len(weight) == 1
        fold = _tasks_to_batch if shared else _tasks_to_channels
        folded, weight = fold(operand), weight[0] if shared else weight.flatten(0, 1)
        groups = 1 if shared else self.w_shape[0]
        if wrt == "y":
            result = torch.conv2d(folded, weight, None, self.stride, self.padding, 1, groups)
        else:
            result = self._backward(folded, None, weight, groups, wrt)
        if shared:
            return _unflatten(result, self.x_shape[0])
        return _unflatten(result.transpose(0, 1), groups).transpose(1, 2)

    def _backward(
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


class PartialDerivative(Function):
    """A partial derivative of a `TrilinearForm`, as an autograd function.

    Takes the arguments of `TrilinearForm.partial_derivative`, with the form after `wrt`.
    """

    @staticmethod
    def forward(wrt: Operand, form: TrilinearForm, first: Tensor, second: Tensor) -> Tensor:
        return form.partial_derivative(wrt, first, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Operand, TrilinearForm, Tensor, Tensor], _: Any) -> None:
        ctx.wrt, ctx.form, first, second = inputs
        ctx.save_for_backward(first, second)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate with respect to both operands, with `gradient` as the third."""
        first, second = OTHERS[ctx.wrt]
        tensors = {ctx.wrt: gradient, first: ctx.saved_tensors[0], second: ctx.saved_tensors[1]}
        gradients = [
            PartialDerivative.apply(name, ctx.form, *(tensors[other] for other in OTHERS[name]))
            if needed
            else None
            for name, needed in zip(OTHERS[ctx.wrt], ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None, *gradients

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[None, None, int | None, int | None],
        wrt: Operand,
        form: TrilinearForm,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, int]:
        """Merge the mapped dimension into the task dimension T."""
        mapped = [
            (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in ((first, in_dims[2]), (second, in_dims[3]))
        ]
        tasks = info.batch_size * form.x_shape[0]
        mapped_form = form._replace(
            x_shape=(tasks, *form.x_shape[1:]), w_shape=(tasks, *form.w_shape[1:])
        )
        result: Tensor = PartialDerivative.apply(wrt, mapped_form, *mapped)
        return _unflatten(result, info.batch_size), 0


def _tasks_to_batch(x: Tensor) -> Tensor:
    """Flatten `(T, S, C, ...)` -> `(T * S, C, ...)`, where all tasks share their weights."""
    return x.flatten(0, 1)


def _tasks_to_channels(x: Tensor) -> Tensor:
    """Flatten `(T, S, C, ...)` -> `(S, T * C, ...)`, where each task is a group of channels."""
    return x.transpose(0, 1).flatten(1, 2)


def _unflatten(x: Tensor, parts: int) -> Tensor:
    """Split the first dimension: `(T * S, ...)` -> `(T, S, ...)`."""
    return x.view(parts, -1, *x.shape[1:])
