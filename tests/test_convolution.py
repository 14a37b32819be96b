"""The convolution against PyTorch's own, to every order of differentiation that is used."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap
from torch.nn.functional import conv2d

from maml_pipeline.networks.convolution import Convolution2d, ConvolutionForm


def convolve(layer: Convolution2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    return y


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 0, 3), (2, 1, 3), (2, 1, 2), (3, 2, 1)])
def test_it_is_pytorchs_convolution_and_so_are_its_derivatives(
    stride: int, padding: int, size: int
) -> None:
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


def test_an_expanded_weight_runs_as_one_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    original = torch.conv2d

    def spy(*arguments: object) -> Tensor:
        groups.append(arguments[-1])  # type: ignore[arg-type]
        result: Tensor = original(*arguments)  # type: ignore[call-overload]
        return result

    monkeypatch.setattr(torch, "conv2d", spy)
    layer = Convolution2d(2, 3, 3)
    x, weight = torch.rand(5, 4, 2, 7, 7), layer.weight.expand(5, 3, 2, 3, 3)
    many = vmap(lambda x, w: convolve(layer, x, w, torch.zeros(3)))
    together, apart = many(x, weight), many(x, weight.clone())
    assert groups == [1, 5]
    torch.testing.assert_close(together, apart)


def test_the_form_is_linear_in_each_operand_with_its_partials_as_slopes() -> None:
    torch.manual_seed(0)
    form = ConvolutionForm((3, 4, 2, 7, 7), (3, 5, 2, 3, 3), stride=2, padding=1)
    x, w = torch.randn(form.x_shape).double(), torch.randn(form.w_shape).double()
    y = torch.randn(3, 4, 5, 4, 4).double()
    values = [
        (y * form.partial("y", x, w)).sum(),
        (x * form.partial("x", w, y)).sum(),
        (w * form.partial("w", x, y)).sum(),
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(values[0], values[2], rtol=1e-12, atol=0)


def test_it_runs_in_mixed_precision_as_pytorchs_does() -> None:
    torch.manual_seed(0)
    layer, x = Convolution2d(2, 3, 3, 2, 1), torch.rand(4, 2, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), conv2d(x, layer.weight, layer.bias, 2, 1)
        assert y.dtype == expected.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(y.float().square().sum(), layer.weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), layer.weight)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert gradient.dtype == second.dtype == torch.float32 and second.isfinite().all()
