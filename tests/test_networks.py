"""Networks: shapes, sizes, and the derivatives of the normalisation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.functional import batch_norm, cross_entropy

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import InnerLoop, Learn2LearnEngine, VectorizedEngine
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.networks.convnet import BatchStatisticsNorm2d
from maml_pipeline.tasks import TaskBatch
from tests.networks import relative_difference


def test_mlp_matches_the_paper() -> None:
    network = MLP()
    assert network(torch.rand(7, 1)).shape == (7, 1)
    assert [tuple(p.shape) for p in network.parameters() if p.dim() == 2] == [(40, 1), (40, 40), (1, 40)]


@pytest.mark.parametrize("downsampling", ["stride", "max_pool"])
@pytest.mark.parametrize("ways", [5, 20])
def test_convnet_maps_images_to_logits(downsampling: str, ways: int) -> None:
    network = ConvNet(ways, downsampling=downsampling)  # type: ignore[arg-type]
    assert network(torch.rand(3, 1, 28, 28)).shape == (3, ways)
    # Four blocks: a 3x3 convolution with bias, and a scale and shift per channel.
    convolutions = 9 * 64 + 64 + 3 * (9 * 64 * 64 + 64)
    assert sum(p.numel() for p in network.parameters()) == convolutions + 4 * 128 + 64 * ways + ways


def test_convnet_for_mini_imagenet_is_the_network_of_the_paper() -> None:
    network = ConvNet(5, filters=32, downsampling="max_pool", in_channels=3, image_size=84)
    x = torch.rand(3, 3, 84, 84)
    sizes = []
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(32, 42, 42), (32, 21, 21), (32, 10, 10), (32, 5, 5)]
    # The checkpoint published with the paper's code has 32,773 numbers: it shifts normalised channels
    # but does not scale them, which are 4 x 32 parameters more here.
    convolutions = 9 * 3 * 32 + 32 + 3 * (9 * 32 * 32 + 32)
    shifts, head = 4 * 32, 800 * 5 + 5
    assert convolutions + shifts + head == 32_773
    assert sum(p.numel() for p in network.parameters()) == 32_773 + 4 * 32


@pytest.mark.parametrize("downsampling", ["stride", "max_pool"])
@pytest.mark.parametrize("image_size", [16, 17, 28, 32, 84])
def test_the_head_fits_every_image_size(downsampling: str, image_size: int) -> None:
    network = ConvNet(3, 4, downsampling, in_channels=3, image_size=image_size)  # type: ignore[arg-type]
    assert network(torch.rand(2, 3, image_size, image_size)).shape == (2, 3)


def test_averaged_features_take_any_image_and_flattened_ones_refuse_another_size() -> None:
    assert ConvNet(3, 4)(torch.rand(2, 1, 20, 40)).shape == (2, 3)
    with pytest.raises(UserError, match="image_size is 32, but an image is 20x40"):
        ConvNet(3, 4, image_size=32)(torch.rand(2, 1, 20, 40))


def test_images_must_not_vanish() -> None:
    with pytest.raises(UserError, match="image_size is 15; it must be at least 16"):
        ConvNet(5, downsampling="max_pool", image_size=15)
    with pytest.raises(UserError, match="image_size is 0; it must be at least 1"):
        ConvNet(5, image_size=0)


@pytest.mark.exhaustive  # large images
@pytest.mark.parametrize("first_order", [True, False])
def test_engines_agree_on_the_network_for_mini_imagenet(first_order: bool) -> None:
    network = ConvNet(5, 32, "max_pool", in_channels=3, image_size=84).double()
    x, y = torch.rand(2, 2, 5, 3, 84, 84, dtype=torch.float64), torch.arange(5).repeat(2, 1)
    batch, inner = TaskBatch(x[0], y, x[1], y), InnerLoop(0.01, 5, first_order)
    expected = Learn2LearnEngine().meta_gradient(network, cross_entropy, batch, inner)
    methods = [inner] if first_order else [inner, replace(inner, method="checkpointed")]
    for method in methods:
        actual = VectorizedEngine().meta_gradient(network, cross_entropy, batch, method)
        assert relative_difference(actual, expected) <= 1e-10


@pytest.mark.parametrize(("downsampling", "stride"), [("stride", (2, 2)), ("max_pool", (1, 1))])
def test_only_the_strided_network_strides(downsampling: str, stride: tuple[int, int]) -> None:
    network = ConvNet(5, downsampling=downsampling)  # type: ignore[arg-type]
    assert {m.stride for m in network.modules() if isinstance(m, nn.Conv2d)} == {stride}


def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parameters = {"weight": weight, "bias": bias}
    y: Tensor = functional_call(BatchStatisticsNorm2d(3), parameters, (x,))
    return y


def normalisation_inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (4, 3, 2, 3), (3,), (3,)
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


def test_normalisation_has_the_derivatives_of_finite_differences() -> None:
    inputs = normalisation_inputs()
    assert gradcheck(normalise, inputs) and gradgradcheck(normalise, inputs)
    tasks = tuple(torch.stack([one, one + 0.1]) for one in inputs)
    assert gradcheck(vmap(normalise), tasks) and gradgradcheck(vmap(normalise), tasks)


def test_normalisation_is_the_same_for_one_task_under_vmap_and_in_pytorch() -> None:
    x, weight, bias = normalisation_inputs()
    native = batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
    results = [
        normalise(x, weight, bias),
        vmap(normalise)(*(one[None] for one in (x, weight, bias)))[0],
        native,
    ]
    for order in range(3):
        if order > 0:
            losses = [(result**3).mean() for result in results]
            results = [torch.autograd.grad(one, x, create_graph=True)[0] for one in losses]
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


def test_normalisation_is_right_under_gradients_of_torch_func() -> None:
    x, weight, bias = normalisation_inputs()

    def slope(x: Tensor) -> Tensor:
        first: Tensor = grad(lambda x: (normalise(x, weight, bias) ** 3).sum())(x)
        return first

    with_func = grad(lambda x: (slope(x) ** 2).sum())(x)
    (first,) = torch.autograd.grad((normalise(x, weight, bias) ** 3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad((first**2).sum(), x)
    torch.testing.assert_close(with_func, expected, rtol=1e-10, atol=1e-10)


def test_normalisation_of_a_single_value_is_the_shift() -> None:
    _, weight, bias = normalisation_inputs()
    one = torch.rand(1, 3, 1, 1, dtype=torch.float64)
    assert torch.equal(normalise(one, weight, bias), bias[None, :, None, None])


def test_normalisation_has_the_same_precision_under_autocast_and_vmap() -> None:
    norm, x = BatchStatisticsNorm2d(3), torch.rand(4, 3, 2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        alone, many = norm(x), vmap(norm)(x[None])[0]
    assert alone.dtype == many.dtype == torch.float32
    torch.testing.assert_close(alone, many, rtol=0.05, atol=0.05)


def test_normalisation_is_the_same_in_training_and_evaluation() -> None:
    norm, x = BatchStatisticsNorm2d(2), torch.rand(4, 2, 3, 3)
    assert torch.equal(norm.train()(x), norm.eval()(x))
