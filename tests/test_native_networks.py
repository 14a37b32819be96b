"""Which networks, losses and tasks run as machine code; any other runs as in the vectorized engine."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import InnerLoop, Loss
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.meta_gradient.native_engine import known_network
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import TaskBatch
from tests.native_cases import ENGINE, REFERENCE, bits, case


def hooked() -> nn.Module:
    network = MLP(2, 3, (8,))
    network[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


def frozen() -> nn.Module:
    network = MLP(2, 3, (8,))
    network[0].bias.requires_grad_(False)
    return network


class Doubled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = 2 * super().forward(x)  # type: ignore[no-untyped-call]
        return doubled


def twice() -> nn.Module:
    relu, layer = nn.ReLU(), nn.Linear(3, 3)
    return nn.Sequential(nn.Linear(2, 3), relu, layer, relu, layer)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "another activation": lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)),
    "a layer without bias": lambda: nn.Sequential(nn.Linear(2, 3, bias=False)),
    "a hook": hooked,
    "a frozen parameter": frozen,
    "a subclass": lambda: Doubled(2, 3, (8,)),
    "a layer twice": twice,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_networks_run_as_in_the_vectorized_engine(name: str) -> None:
    torch.manual_seed(0)
    network = UNKNOWN[name]().double()
    x, y = torch.randn(2, 3, 6, 2).double(), torch.randint(3, (2, 3, 6))
    batch, inner = TaskBatch(x[0], y[0], x[1], y[1]), InnerLoop(0.1, 2)
    assert known_network(network, cross_entropy, batch, inner) is None
    actual = ENGINE.meta_gradient(network, cross_entropy, batch, inner)
    expected = REFERENCE.meta_gradient(network, cross_entropy, batch, inner)
    assert all(map(torch.equal, bits(actual), bits(expected)))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            y = layer(x)
            x = y + x if y.shape == x.shape else y
        return x


def edited(edit: Callable[[ConvNet], object], downsampling: Literal["stride", "max_pool"]) -> ConvNet:
    network = ConvNet(ways=3, filters=4, in_channels=2, downsampling=downsampling)
    edit(network)
    return network


def replace_features(kind: type[nn.Sequential], layers: slice) -> Callable[[ConvNet], object]:
    def edit(network: ConvNet) -> None:
        network.features = kind(*[*network.features][layers])

    return edit


def set_of_layer(number: int, **attributes: object) -> Callable[[ConvNet], object]:
    return lambda network: vars(network.features[number]).update(attributes)


EDITED = {
    "a pooling that overlaps": edited(set_of_layer(3, stride=1), "max_pool"),
    "a pooling that keeps an odd row": edited(set_of_layer(3, ceil_mode=True), "max_pool"),
    "dropout at the end": edited(lambda network: network.features.append(nn.Dropout(0.0)), "stride"),
    "three blocks": edited(replace_features(nn.Sequential, slice(9)), "stride"),
    "a block": edited(replace_features(nn.Sequential, slice(3)), "stride"),
    "its own order of layers": edited(replace_features(Residual, slice(12)), "stride"),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_network_runs_as_in_the_vectorized_engine(name: str) -> None:
    _, batch = case("strided", cross_entropy)
    network, inner = EDITED[name].double(), InnerLoop(0.1, 2)
    assert known_network(network, cross_entropy, batch, inner) is None
    actual = ENGINE.meta_gradient(network, cross_entropy, batch, inner)
    expected = REFERENCE.meta_gradient(network, cross_entropy, batch, inner)
    assert all(map(torch.equal, bits(actual), bits(expected)))


def test_a_convolution_that_is_made_to_dilate_is_refused() -> None:
    _, batch = case("strided", cross_entropy)
    network = edited(set_of_layer(0, dilation=(2, 2)), "stride").double()
    with pytest.raises(UserError, match="engine vectorized would compute a wrong meta-gradient"):
        ENGINE.meta_gradient(network, cross_entropy, batch, InnerLoop(0.1, 2))


def test_parameters_of_another_size_than_a_layer_was_made_with_count() -> None:
    network, batch = case("mlp", cross_entropy)
    first, _, second, *_ = (layer for layer in network.children())
    with torch.no_grad():
        first.weight, first.bias = (nn.Parameter(p[:6]) for p in first.parameters())
        second.weight = nn.Parameter(torch.randn(8, 6).double())
    inner = InnerLoop(0.1, 2)
    assert known_network(network, cross_entropy, batch, inner) is not None
    actual = ENGINE.meta_gradient(network, cross_entropy, batch, inner)
    expected = REFERENCE.meta_gradient(network, cross_entropy, batch, inner)
    for ours, theirs in zip(bits(actual), bits(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    second.bias = nn.Parameter(torch.randn(1).double())  # which PyTorch repeats
    assert known_network(network, cross_entropy, batch, inner) is None


def test_sets_of_other_numbers_of_tasks_are_not_known() -> None:
    network, batch = case("mlp", cross_entropy)
    fewer = batch._replace(query_x=batch.query_x[:2], query_y=batch.query_y[:2])
    assert known_network(network, cross_entropy, fewer, InnerLoop(0.1)) is None


def test_a_large_query_set_is_evaluated_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = case("pooled", cross_entropy)

    def curves() -> Tensor:
        measures: dict[str, Loss] = {"loss": cross_entropy}
        evaluate = partial(ENGINE.adaptation_curves, network, measures, cross_entropy, batch)
        return evaluate(InnerLoop(0.1, 2), transductive=False)["loss"]

    whole, peak_of_whole = curves(), peak_bytes(curves)
    monkeypatch.setattr("maml_pipeline.meta_gradient.native_engine.BYTES_OF_SETS", 1)
    assert torch.equal(curves(), whole)
    assert peak_bytes(curves) < peak_of_whole / 2


def test_other_losses_types_and_labels_are_not_known() -> None:
    network, batch = case("mlp", cross_entropy)
    inner = InnerLoop(0.1)
    assert known_network(network, nn.CrossEntropyLoss(), batch, inner) is not None
    assert known_network(network, nn.CrossEntropyLoss(label_smoothing=0.1), batch, inner) is None
    assert known_network(network, nn.CrossEntropyLoss(ignore_index=0), batch, inner) is None
    assert known_network(network, lambda x, y: cross_entropy(x, y), batch, inner) is None
    assert known_network(network.half(), cross_entropy, batch, inner) is None
    network, batch = case("mlp", cross_entropy)
    ignored = batch._replace(query_y=torch.full_like(batch.query_y, -100))
    assert known_network(network, cross_entropy, ignored, inner) is None
    assert known_network(network, cross_entropy, batch, InnerLoop(0.1, adapt=["*.bias"])) is None
