"""The benchmark gives other libraries native layers, and every contender a row."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from maml_pipeline.meta_gradient import InnerLoop, Learn2LearnEngine
from maml_pipeline.networks.convnet import BatchStatisticsNorm2d
from maml_pipeline.networks.convolution import Convolution2d
from scripts import benchmark_engines
from scripts.benchmark_contenders import BASELINE, CONTENDERS, Setting, meta_step_flops
from scripts.benchmark_engines import CASES, markdown, measure
from scripts.benchmark_peers import learn2learn_loop, with_native_layers
from scripts.machine_limits import Limits
from tests.networks import IMAGE_NETWORKS, case


@pytest.mark.parametrize("name", ["strided", "max_pool"])
def test_native_layers_are_plain_pytorch_and_compute_the_same(name: str) -> None:
    network, loss, batch = case(name, IMAGE_NETWORKS[name], tasks=2)
    native = with_native_layers(network)
    ours = (Convolution2d, BatchStatisticsNorm2d)
    assert any(isinstance(module, ours) for module in network.modules())
    assert not any(isinstance(module, ours) for module in native.modules())
    assert sum(type(module) is nn.Conv2d for module in native.modules()) == 4

    inner = InnerLoop(0.1, 2)
    learn2learn_loop(native.double(), loss, batch, inner)
    expected = Learn2LearnEngine().meta_gradient(network, loss, batch, inner).gradient
    for name, parameter in native.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("first_order", [True, False])
def test_the_table_has_every_contender_that_supports_the_case(
    monkeypatch: pytest.MonkeyPatch, first_order: bool
) -> None:
    monkeypatch.setattr(benchmark_engines, "machine_limits", lambda device: Limits(1e11, 1e10))
    sine = CASES["sine-k1"]()
    ordered = replace(sine, steps_per_turn=2, inner=replace(sine.inner, first_order=first_order))
    chosen = [BASELINE, "vectorized", "vectorized-trainer", "checkpointed"]
    result = measure(ordered, chosen, repeats=2, setting=Setting(torch.device("cpu"), loggers=[]))

    names = {CONTENDERS[key].name for key in chosen if CONTENDERS[key].supports(ordered)}
    assert set(result["contenders"]) == names and len(names) == (3 if first_order else 4)
    assert result["contenders"][CONTENDERS[BASELINE].name]["ratio"] == 1
    for timing in result["contenders"].values():
        share = result["flops"] / 1e11 / timing["milliseconds"] * 1e3
        assert timing["share_of_limit"] == pytest.approx(share)
    table = markdown([result])
    assert all(f"| {name} |" in table for name in names)
    assert "100 GFLOP/s" in table


def test_flops_are_those_of_the_matrix_products() -> None:
    # Two forward and two backward passes of a 1-40-40-1 network over 10 points, for 25 tasks; the
    # first layer's inputs need no gradient.
    layers = [(1, 40), (40, 40), (40, 1)]
    product = [2 * 10 * a * b for a, b in layers]
    forward, backward = sum(product), 2 * sum(product) - product[0]
    sine = CASES["sine-k1"]()
    first = replace(sine, inner=replace(sine.inner, first_order=True))
    assert meta_step_flops(first) == 25 * 2 * (forward + backward)
