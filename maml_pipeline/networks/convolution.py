"""A convolution whose derivatives of every order are convolutions, also with many weights at once.

A convolution y = x * w is half of a form that is linear in each of three tensors, <y, x * w>. Its
partial derivatives are the only operations needed, ever: by y the convolution itself, by x and by w
what a backward pass computes; and the derivative of each of the three is the other two.

PyTorch differentiates a convolution twice just as exactly, but where every task has weights of its
own (a grouped convolution under vmap) it then loops over the tasks, and it copies weights that all
tasks still share. Here neither happens.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

Operand = Literal["x", "w", "y"]
OTHERS: dict[Operand, tuple[Operand, Operand]] = {"x": ("w", "y"), "w": ("x", "y"), "y": ("x", "w")}


class Convolution2d(nn.Conv2d):
    """`torch.nn.Conv2d` without groups: `(S, C, H, W)` -> `(S, O, H', W')`, zero-padded.

    Under `torch.func.vmap` over weights it runs as one convolution for as long as they are one
    tensor, expanded, and as one grouped convolution after that.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: Height and width of the kernel.
        stride: Stride in both directions.
        padding: Zeros on each side.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        form = ConvolutionForm(
            (1, *x.shape), (1, *self.weight.shape), int(self.stride[0]), int(self.padding[0])
        )
        # squeeze, since the derivative of [0] would fill a tensor with zeros first
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):  # its derivatives get no casts of their own
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        y: Tensor = Partial.apply("y", form, x[None], weight[None]).squeeze(0)
        return y if bias is None else y + bias[:, None, None]


class ConvolutionForm(NamedTuple):
    """The form <y, x * w> of T tasks: the shapes of x `(T, S, C, H, W)` and w `(T, O, C, h, w)`."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    stride: int
    padding: int

    def partial(self, by: Operand, first: Tensor, second: Tensor) -> Tensor:
        """Differentiate the form by one operand, given the other two in the order x, w, y."""
        if by == "w":
            gradient = self._backward(
                _beside_each_other(second), _beside_each_other(first), None, self.w_shape[0], by
            )
            return _split(gradient, self.w_shape[0])
        weight = second if by == "y" else first
        operand = first if by == "y" else second
        shared = weight.stride(0) == 0 or len(weight) == 1
        fold = _one_after_another if shared else _beside_each_other
        folded, weight = fold(operand), weight[0] if shared else weight.flatten(0, 1)
        groups = 1 if shared else self.w_shape[0]
        if by == "y":
            result = torch.conv2d(folded, weight, None, self.stride, self.padding, 1, groups)
        else:
            result = self._backward(folded, None, weight, groups, by)
        if shared:
            return _split(result, self.x_shape[0])
        return _split(result.transpose(0, 1), groups).transpose(1, 2)

    def _backward(
        self, y: Tensor, x: Tensor | None, w: Tensor | None, groups: int, by: Operand
    ) -> Tensor:
        """Call PyTorch's backward pass, which reads the shape alone of what it differentiates by."""
        T, S, C, H, W = self.x_shape
        if x is None:
            x = y.new_empty(1).expand((T * S, C, H, W) if groups == 1 else (S, T * C, H, W))
        if w is None:
            w = y.new_empty(1).expand(T * self.w_shape[1], *self.w_shape[2:])
        stride, padding = [self.stride] * 2, [self.padding] * 2
        wanted = [by == "x", by == "w", False]
        gradients = torch.ops.aten.convolution_backward(
            y, x, w, None, stride, padding, [1, 1], False, [0, 0], groups, wanted
        )
        gradient: Tensor = gradients[0 if by == "x" else 1]
        return gradient


def _one_after_another(x: Tensor) -> Tensor:
    """Lay tasks along the batch, `(T, S, C, ...)` -> `(T * S, C, ...)`: all share their weights."""
    return x.flatten(0, 1)


def _beside_each_other(x: Tensor) -> Tensor:
    """Lay tasks along the channels, `(T, S, C, ...)` -> `(S, T * C, ...)`: a group for each task."""
    return x.transpose(0, 1).flatten(1, 2)


def _split(x: Tensor, parts: int) -> Tensor:
    """Undo a flattening of the two leading dimensions: `(T * S, ...)` -> `(T, S, ...)`."""
    return x.view(parts, -1, *x.shape[1:])


class Partial(Function):
    """The derivative of a `ConvolutionForm` by one operand, as an operation of autograd.

    Takes the operand's name, the form, and the other two operands in the order x, w, y.
    """

    @staticmethod
    def forward(by: Operand, form: ConvolutionForm, first: Tensor, second: Tensor) -> Tensor:
        return form.partial(by, first, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Operand, ConvolutionForm, Tensor, Tensor], _: Any) -> None:
        ctx.by, ctx.form, first, second = inputs
        ctx.save_for_backward(first, second)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate by each operand with the gradient in the place of the result."""
        first, second = OTHERS[ctx.by]
        tensors = {ctx.by: gradient, first: ctx.saved_tensors[0], second: ctx.saved_tensors[1]}
        gradients = [
            Partial.apply(name, ctx.form, *(tensors[other] for other in OTHERS[name]))
            if needed
            else None
            for name, needed in zip(OTHERS[ctx.by], ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None, *gradients

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[None, None, int | None, int | None],
        by: Operand,
        form: ConvolutionForm,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, int]:
        """Make the mapped dimension part of the tasks'."""
        mapped = [
            (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in ((first, in_dims[2]), (second, in_dims[3]))
        ]
        tasks = info.batch_size * form.x_shape[0]
        mapped_form = form._replace(
            x_shape=(tasks, *form.x_shape[1:]), w_shape=(tasks, *form.w_shape[1:])
        )
        result: Tensor = Partial.apply(by, mapped_form, *mapped)
        return _split(result, info.batch_size), 0
