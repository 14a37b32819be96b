"""Convolution2d agrees with PyTorch's convolution in value and in first and second derivatives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap
from torch.nn.functional import conv2d

from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import trilinear_form
from maml_pipeline.networks.convolution import Convolution2d
from maml_pipeline.networks.trilinear_form import (
    Operand,
    TrilinearForm,
    Way,
    column_products,
    fastest_way,
    grouped_convolution,
)


def convolve(layer: Convolution2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    return y


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 0, 3), (2, 1, 3), (2, 1, 2), (3, 2, 1)])
def test_values_and_derivatives_agree_with_pytorch(stride: int, padding: int, size: int) -> None:
    torch.manual_seed(0)
    layer = Convolution2d(2, 2, size, stride, padding).double()
    assert layer.bias is not None
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 2, 2, size, size, dtype=torch.float64, requires_grad=True)
    biases = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    expected = conv2d(x, layer.weight, layer.bias, stride, padding)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    many = vmap(lambda x, w, b: convolve(layer, x, w, b), in_dims=(None, 0, 0))
    expected = torch.stack(
        [conv2d(x, w, b, stride, padding) for w, b in zip(weights, biases, strict=True)]
    )
    torch.testing.assert_close(many(x, weights, biases), expected, rtol=1e-13, atol=1e-13)

    for function, inputs in (
        (lambda *a: convolve(layer, *a), (x, layer.weight, layer.bias)),
        (many, (x, weights, biases)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_one_task_is_pytorchs_convolution_to_the_bit(bias: bool) -> None:
    layer = Convolution2d(2, 3, 3, 2, 1)
    if not bias:
        layer.bias = None
    x, seen = torch.rand(4, 2, 7, 7), []
    for function in (layer, lambda x: conv2d(x, layer.weight, layer.bias, 2, 1)):
        y = function(x)
        gradients = torch.autograd.grad(y.square().sum(), [*layer.parameters()], create_graph=True)
        second = torch.autograd.grad([g.square().sum() for g in gradients], layer.weight)
        seen.append([y, *gradients, *second])
    assert all(map(torch.equal, *seen))


def test_weights_that_all_tasks_share_are_not_copied() -> None:
    tasks, layer = 32, Convolution2d(64, 64, 3)
    x, shared = torch.rand(tasks, 1, 64, 3, 3), layer.weight.detach().expand(tasks, 64, 64, 3, 3)
    many = vmap(lambda x, w: convolve(layer, x, w, torch.zeros(64)))
    copies = tasks * layer.weight.nbytes
    assert peak_bytes(lambda: many(x, shared)) < copies / 8
    torch.testing.assert_close(many(x, shared), many(x, shared.clone()))


def test_each_partial_derivative_recovers_the_trilinear_form() -> None:
    torch.manual_seed(0)
    form = TrilinearForm((3, 4, 2, 7, 7), (3, 5, 2, 3, 3), stride=2, padding=1)
    x, w = torch.randn(form.x_shape).double(), torch.randn(form.w_shape).double()
    y = torch.randn(3, 4, 5, 4, 4).double()
    values = [
        (y * form.partial_derivative("y", x, w)).sum(),
        (x * form.partial_derivative("x", w, y)).sum(),
        (w * form.partial_derivative("w", x, y)).sum(),
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(values[0], values[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 0, 3), (2, 1, 3), (2, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("wrt", ["x", "w", "y"])
def test_both_ways_compute_the_same(wrt: Operand, stride: int, padding: int, size: int) -> None:
    torch.manual_seed(0)
    form = TrilinearForm((3, 4, 2, 7, 6), (3, 5, 2, size, size), stride, padding)
    height, width = ((n + 2 * padding - size) // stride + 1 for n in (7, 6))
    shapes = {"x": form.x_shape, "w": form.w_shape, "y": (3, 4, 5, height, width)}
    first, second = (torch.randn(shape).double() for name, shape in shapes.items() if name != wrt)
    expected = grouped_convolution(form, wrt, first, second)
    actual = column_products(form, wrt, first, second)
    assert actual.shape == expected.shape == shapes[wrt]
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("times", "fastest"), [([1.0, 2.0], grouped_convolution), ([2.0, 1.0], column_products)]
)
def test_the_faster_way_is_chosen_once_for_each_shape(
    times: list[float], fastest: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trilinear_form, "fastest_ways", {})
    form = TrilinearForm((3, 4, 2, 7, 7), (3, 5, 2, 3, 3), 1, 1)
    x, w, results = torch.rand(form.x_shape), torch.rand(form.w_shape), []

    def seconds(call: Callable[[], Tensor]) -> float:
        results.append(call())
        return times[len(results) % 2 - 1]

    for _ in range(2):
        assert fastest_way(form, "y", x, w, seconds) is fastest
    assert len(results) == 2
    torch.testing.assert_close(*results)
    fastest_way(form, "x", w, results[0], seconds)
    assert len(results) == 4


def test_mixed_precision_agrees_with_pytorch() -> None:
    torch.manual_seed(0)
    layer, x = Convolution2d(2, 3, 3, 2, 1), torch.rand(4, 2, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), conv2d(x, layer.weight, layer.bias, 2, 1)
        assert y.dtype == expected.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(y.float().square().sum(), layer.weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), layer.weight)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert gradient.dtype == second.dtype == torch.float32 and second.isfinite().all()
