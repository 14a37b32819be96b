"""What no adapted parameter influences is computed once per meta-step, wherever that is exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import InnerLoop, VectorizedEngine
from maml_pipeline.meta_gradient.exactness import Workarounds, verification
from maml_pipeline.meta_gradient.fixed_prefix import FixedPrefix, find_fixed_prefix
from maml_pipeline.meta_gradient.inner_loop import adapted_names
from maml_pipeline.networks import ConvNet
from tests.networks import case, largest_relative_difference
from tests.oracles import PlainLoop, inner_product

METHODS: dict[str, dict[str, Any]] = {
    "first order": {"first_order": True},
    "unrolled": {"first_order": False},
    "checkpointed": {"first_order": False, "method": "checkpointed"},
    "truncated": {"first_order": False, "differentiated_steps": 1},
    "truncated, checkpointed": {"differentiated_steps": 2, "method": "checkpointed"},
    "hessian-free": {"first_order": False, "method": "hessian_free"},
}


class Layers(nn.Module):
    """Three linear layers, between which `call` decides what happens."""

    def __init__(self, call: Callable[["Layers", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.body = nn.Sequential(self.a, nn.Tanh(), self.b, nn.Tanh())
        self.call = call
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def through_body(self: Layers, x: Tensor) -> Tensor:
    y: Tensor = self.head(self.body(x))
    return y


def with_skip_connection(self: Layers, x: Tensor) -> Tensor:
    early = torch.tanh(self.a(x))
    y: Tensor = self.head(torch.tanh(self.b(early)) + early)
    return y


def twice(self: Layers, x: Tensor) -> Tensor:
    hidden = torch.tanh(self.a(x))
    y: Tensor = self.head(torch.tanh(self.b(torch.tanh(self.b(hidden)))))
    return y


def without_calling_the_head(self: Layers, x: Tensor) -> Tensor:
    scaled = torch.tanh(self.a(x)) * self.head.weight.mean()
    return linear(torch.tanh(self.b(scaled)), self.head.weight, self.head.bias)


def changing_features(self: Layers, x: Tensor) -> Tensor:
    y: Tensor = self.head(self.b(torch.tanh(self.a(x))).mul_(0.7))
    return y


def detached_dependence(self: Layers, x: Tensor) -> Tensor:
    scale = self.head.weight.detach().mean()
    y: Tensor = self.head(torch.tanh(self.b(torch.tanh(self.a(x * scale)))))
    return y


def through_an_attribute(self: Layers, x: Tensor) -> Tensor:
    y: Tensor = self.head(self.body(x) + self.hidden)
    return y


def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
    KEPT["network"].hidden = output


KEPT: dict[str, Layers] = {}


def remembering() -> nn.Module:
    """Build a network whose forward hook keeps an activation that is read later."""
    network = Layers(through_an_attribute)
    network.a.register_forward_hook(keep)
    KEPT["network"] = network
    return network


class Attention(nn.Module):
    """A block whose attention returns a tuple and reads the weights of one of its parts directly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 1)
        self.first, self.second = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[..., None])
        x = self.norm(x + self.first(x, x, x)[0])
        x = x + self.second(x, x, x)[0]
        y: Tensor = self.head(x.mean(1))
        return y


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[str, ...]]] = {
    "body": (lambda: Layers(through_body), ["head.*"], ("body",)),
    "part of the body": (lambda: Layers(through_body), ["b.*"], ("body.1",)),
    "everything": (lambda: Layers(through_body), ["a.*", "head.*"], ()),
    "skip connection": (lambda: Layers(with_skip_connection), ["head.*"], ("a", "b")),
    "twice": (lambda: Layers(twice), ["head.*"], ("a",)),
    "head that is not called": (lambda: Layers(without_calling_the_head), ["head.*"], ("a",)),
    "changed in place": (lambda: Layers(changing_features), ["head.*"], ()),
    "read through detach": (lambda: Layers(detached_dependence), ["head.*"], ()),
    "remembered by a hook": (remembering, ["head.*"], ()),
    "attention": (Attention, ["head.*"], ("embed", "norm")),
    "part of an attention": (Attention, ["second.out_proj.*"], ("embed", "norm")),
}
"""Networks, what adapts, and the modules whose outputs are replayed."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_replayed_only_where_that_is_exact(name: str, method: str) -> None:
    build, adapt, recorded = NETWORKS[name]
    network, loss, batch = case("linear", build, tasks=3)
    inner = InnerLoop(0.1, 3, adapt=adapt, **METHODS[method])
    if (name, method) == ("read through detach", "hessian-free"):
        with pytest.raises(UserError, match="is not that of its loss values"):
            VectorizedEngine().meta_gradient(network, loss, batch, inner)
        return
    result = VectorizedEngine(tasks_per_chunk=2).meta_gradient(network, loss, batch, inner)
    assert replayed_in(network) == recorded
    oracle = PlainLoop(network, loss, inner)
    if inner.first_order:
        assert largest_relative_difference(result.gradient, oracle.first_order(batch)) <= 1e-10
    elif name != "read through detach":  # autograd's derivative is not that of the loss values
        for part in (True, False):
            direction = {
                name: torch.randn_like(p) * ((name in oracle.moves) == part)
                for name, p in oracle.theta.items()
            }
            slope = oracle.slope(batch, direction, h=1e-4)
            assert inner_product(result.gradient, direction) == pytest.approx(slope, rel=1e-5)


def replayed_in(network: nn.Module) -> tuple[str, ...]:
    ((workarounds, _),) = verification._verified[network].values()
    assert isinstance(workarounds, Workarounds)
    return workarounds.fixed_prefix.recorded


@pytest.mark.parametrize(("method", "calls"), [("first order", 2), ("unrolled", 2), ("checkpointed", 3)])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_prefix_is_called_once_for_each_set_whatever_the_inner_steps(
    method: str, calls: int, steps: int
) -> None:
    network, loss, batch = case("strided", lambda: ConvNet(3, filters=4), tasks=3)
    inner = InnerLoop(0.1, steps, adapt=["head.*"], **METHODS[method])
    engine = VectorizedEngine()
    engine.meta_gradient(network, loss, batch, inner)
    counted: dict[str, int] = {"features": 0, "head": 0}
    network.features[3].register_forward_hook(  # type: ignore[index, union-attr]
        lambda *arguments: counted.update(features=counted["features"] + 1)
    )
    network.head.register_forward_hook(  # type: ignore[union-attr]
        lambda *arguments: counted.update(head=counted["head"] + 1)
    )
    engine.meta_gradient(network, loss, batch, inner)
    assert counted["features"] == calls  # the support set, the query set, and the adjoint
    assert counted["head"] > steps


def test_of_a_chain_only_the_last_output_is_kept() -> None:
    network, _, batch = case("strided", lambda: ConvNet(3, filters=4), tasks=1)
    names = adapted_names(network, ["features.6.*"])
    assert find_fixed_prefix(network, names, batch.support_x[0]) == FixedPrefix(
        ("features.5",), tuple(f"features.{layer}" for layer in range(5))
    )
    assert not [m for m in network.modules() if "forward" in m.__dict__]
