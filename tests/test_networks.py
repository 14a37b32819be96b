"""Networks: shapes, sizes, and the derivatives of the normalisation."""

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.networks.convnet import BatchStatisticsNorm2d


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


@pytest.mark.parametrize(("downsampling", "stride"), [("stride", (2, 2)), ("max_pool", (1, 1))])
def test_only_the_strided_network_strides(downsampling: str, stride: tuple[int, int]) -> None:
    network = ConvNet(5, downsampling=downsampling)  # type: ignore[arg-type]
    assert {m.stride for m in network.modules() if isinstance(m, nn.Conv2d)} == {stride}


def test_normalisation_agrees_with_pytorch_to_the_second_derivative() -> None:
    own = BatchStatisticsNorm2d(3).double()
    with torch.no_grad():
        own.weight.normal_()
        own.bias.normal_()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    native = batch_norm(x, None, None, own.weight, own.bias, training=True, eps=own.eps)
    for order in range(3):
        if order == 0:
            pair = (own(x), native)
        else:
            loss = [(value**3).mean() for value in pair]
            pair = tuple(torch.autograd.grad(one, x, create_graph=True)[0] for one in loss)  # type: ignore[assignment]
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


def test_normalisation_is_the_same_in_training_and_evaluation() -> None:
    norm, x = BatchStatisticsNorm2d(2), torch.rand(4, 2, 3, 3)
    assert torch.equal(norm.train()(x), norm.eval()(x))
