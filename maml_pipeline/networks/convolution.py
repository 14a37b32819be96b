"""A convolution that stays fast when every task has its own weights and is differentiated twice.

MAML convolves T tasks with T different weights, which is a grouped convolution under `torch.func.vmap`,
and second order differentiates it twice. `torch.nn.Conv2d` gives the same numbers, but PyTorch's second
derivative of a grouped convolution loops over the groups, and vmap copies weights that all tasks still
share in the first inner step. `Convolution2d` avoids both.

The idea: a convolution is a partial derivative of a trilinear form (trilinear_form.py), and so are the
two halves of its backward pass. The derivative of each is again one of the three, so no other operation
is needed for derivatives of any order.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from maml_pipeline.networks.trilinear_form import Operand, TrilinearForm
from maml_pipeline.torch_internals import is_transformed

OTHERS: dict[Operand, tuple[Operand, Operand]] = {"x": ("w", "y"), "w": ("x", "y"), "y": ("x", "w")}


class Convolution2d(nn.Conv2d):
    """2D convolution without groups or dilation, made for many tasks at once.

    A drop-in replacement for `torch.nn.Conv2d`: the same parameters, initialisation, values and
    derivatives. Under `torch.func.vmap` over weights it runs as one convolution while all tasks share
    their weights, and afterwards as a grouped convolution or a matrix product. Called for one task,
    without a transform of `torch.func`, it is `torch.nn.Conv2d`, which is then faster.

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
        return result.view(info.batch_size, -1, *result.shape[1:]), 0
