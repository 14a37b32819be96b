"""`MetaLearner.adapt` returns the network that `maml test` measures on the same task, bit for bit."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline import MetaLearner, TaskBatch
from maml_pipeline.errors import UserError
from maml_pipeline.learner import accuracy
from maml_pipeline.learner.adaptation import NonTransductive
from maml_pipeline.meta_gradient import InnerLoop, Loss
from maml_pipeline.meta_gradient.exactness.preservation import RandomState
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import Lines, SineWaves, TaskDistribution
from tests.networks import IMAGE_NETWORKS, VECTOR_NETWORKS, case
from tests.zoo import ZOO, build

TASKS = 5
STEPS = 3
REGRESSIONS: dict[str, tuple[TaskDistribution, Callable[[], nn.Module]]] = {
    "lines": (Lines(), lambda: nn.Linear(1, 1)),
    "sine": (SineWaves(shots=10), MLP),
    "sine, wide": (SineWaves(shots=20), lambda: MLP(hidden_features=[256])),
}
PLAIN_NETWORKS = VECTOR_NETWORKS | IMAGE_NETWORKS
LARGE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "64 filters, strided": lambda: ConvNet(ways=3, filters=64),
    "64 filters, max_pool": lambda: ConvNet(ways=3, filters=64, downsampling="max_pool"),
}
ENGINES = ("learn2learn", "vectorized")


def float32_case(name: str) -> tuple[nn.Module, Loss, TaskBatch]:
    """Return a network, its loss and T tasks in float32, whose rounding depends on the kernels."""
    if name in REGRESSIONS:
        tasks, build = REGRESSIONS[name]
        torch.manual_seed(0)
        return build(), mse_loss, tasks.batch(0, "test", range(TASKS))
    if name in LARGE_NETWORKS:
        _, loss, batch = case("strided", IMAGE_NETWORKS["strided"], TASKS)
        network: nn.Module = LARGE_NETWORKS[name]()
    else:
        network, loss, batch = case(name, PLAIN_NETWORKS[name], TASKS)
    as_float = (t.float() if t.is_floating_point() else t for t in batch)
    return network.float(), loss, TaskBatch(*as_float)


def evaluate(learner: MetaLearner, batch: TaskBatch) -> dict[str, Tensor]:
    """Return the adaptation curves as an evaluation computes them."""
    learner.network.eval()
    with torch.inference_mode():
        return learner.engine.adaptation_curves(
            learner.network,
            learner.measures,
            learner.loss,
            batch,
            learner.eval_inner,
            learner.transductive,
        )


def make_learner(network: nn.Module, loss: Loss, **settings: Any) -> MetaLearner:
    defaults: dict[str, Any] = {"inner_lr": 0.1, "eval_inner_steps": STEPS, "engine": "vectorized"}
    return MetaLearner(network, loss=loss, **(defaults | settings))


def unaligned(tensor: Tensor) -> Tensor:
    """Return a copy whose memory starts at an odd address of the allocator's blocks."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


# The law -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("name", [*REGRESSIONS, *PLAIN_NETWORKS])
def test_the_adapted_network_predicts_what_the_evaluation_measures(
    name: str, transductive: bool, engine: str
) -> None:
    network, loss, batch = float32_case(name)
    metric = accuracy if loss is cross_entropy else None
    learner = make_learner(network, loss, metric=metric, transductive=transductive, engine=engine)
    curves = evaluate(learner, batch)
    for index, task in enumerate(batch.tasks()):
        adapted = learner.adapt(task.support_x, task.support_y)
        with torch.no_grad():
            prediction = adapted(unaligned(task.query_x))
        for measure, function in learner.measures.items():
            assert torch.equal(function(prediction, task.query_y), curves[measure][index, -1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LARGE_NETWORKS)
def test_the_law_holds_for_large_networks(name: str, engine: str) -> None:
    test_the_adapted_network_predicts_what_the_evaluation_measures(name, True, engine)


UNCOPYABLE = ("lambda", "weight normalisation, old")
"""Networks that an engine evaluates, but of which PyTorch makes no independent copy."""


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about single layers
@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.random])
def test_the_law_holds_for_networks_as_users_write_them(name: str, engine: str) -> None:
    network, batch = build(ZOO[name])
    batch = TaskBatch(*(t.float() if t.is_floating_point() else t for t in batch))
    loss = ZOO[name].loss
    learner = make_learner(network.float(), loss, engine=engine)
    try:
        measured = evaluate(learner, batch)["loss"][:, -1]
    except UserError:
        return  # `tests/test_exactness.py` holds the reasons
    for index, task in enumerate(batch.tasks()):
        if name in UNCOPYABLE:
            with pytest.raises(UserError, match="cannot be copied"):
                learner.adapt(task.support_x, task.support_y)
            continue
        adapted = learner.adapt(task.support_x, task.support_y)
        assert torch.equal(loss(adapted(task.query_x.clone()), task.query_y.clone()), measured[index])


@pytest.mark.parametrize("steps", range(STEPS + 1))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["sine", "strided"])
def test_the_law_holds_for_any_number_of_steps(name: str, engine: str, steps: int) -> None:
    network, loss, batch = float32_case(name)
    measured = evaluate(make_learner(network, loss, engine=engine, eval_inner_steps=steps), batch)
    learner = make_learner(network, loss, engine=engine)
    for index, task in enumerate(batch.tasks()):
        adapted = learner.adapt(task.support_x, task.support_y, steps=steps)
        assert torch.equal(loss(adapted(task.query_x), task.query_y), measured["loss"][index, -1])


@pytest.mark.parametrize("name", ["sine", "strided"])
def test_the_law_holds_in_mixed_precision(name: str) -> None:
    network, loss, batch = float32_case(name)
    learner = make_learner(network, loss)
    with torch.autocast("cpu", torch.bfloat16):
        measured = evaluate(learner, batch)["loss"][:, -1]
        for index, task in enumerate(batch.tasks()):
            adapted = learner.adapt(task.support_x, task.support_y)
            assert torch.equal(loss(adapted(task.query_x), task.query_y), measured[index])


@pytest.mark.parametrize("name", [*REGRESSIONS, *PLAIN_NETWORKS])
def test_an_evaluation_is_the_same_for_any_chunks_and_batches(name: str) -> None:
    network, loss, batch = float32_case(name)
    whole = evaluate(make_learner(network, loss), batch)["loss"]
    for size in (1, 2, 3):
        chunks = evaluate(make_learner(network, loss, tasks_per_chunk=size), batch)["loss"]
        assert torch.equal(chunks, whole)
    single = [
        evaluate(make_learner(network, loss), TaskBatch.stack([task]))["loss"] for task in batch.tasks()
    ]
    assert torch.equal(torch.cat(single), whole)


def test_the_adaptation_is_gradient_descent_with_the_given_steps_and_rate() -> None:
    network, loss, batch = float32_case("sine")
    task = next(iter(batch.tasks()))
    expected = MLP()
    expected.load_state_dict(network.state_dict())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        loss(expected(task.support_x), task.support_y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    adapted = make_learner(network, loss).adapt(task.support_x, task.support_y, steps=4, inner_lr=0.02)
    for name, parameter in adapted.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name))
    unchanged = make_learner(network, loss).adapt(task.support_x, task.support_y, steps=0)
    assert all(map(torch.equal, unchanged.parameters(), network.parameters()))


# What comes out, and what stays -------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_result_is_a_plain_network_of_its_own(engine: str) -> None:
    network, loss, batch = float32_case("sine")
    task = next(iter(batch.tasks()))
    adapted = make_learner(network, loss, engine=engine).adapt(task.support_x, task.support_y)
    assert type(adapted) is MLP and not any(module.training for module in adapted.modules())
    for parameter, own in zip(adapted.parameters(), network.parameters(), strict=True):
        assert isinstance(parameter, nn.Parameter) and parameter.is_leaf and parameter.requires_grad
        assert parameter.grad is None and parameter.data_ptr() != own.data_ptr()
    loss(adapted(task.query_x), task.query_y).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in adapted.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_learner_is_left_unchanged(engine: str) -> None:
    network, loss, batch = float32_case("strided")
    learner = make_learner(network, loss, engine=engine)
    network.train()
    next(network.children()).eval()
    for parameter in network.parameters():
        parameter.grad = torch.rand_like(parameter)
    state = {name: value.clone() for name, value in learner.state_dict().items()}
    gradients = [
        parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None
    ]
    modes = [module.training for module in learner.modules()]
    random = RandomState(torch.device("cpu"))
    for task in batch.tasks():
        learner.adapt(task.support_x, task.support_y)
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())
    assert all(
        parameter.grad is not None and torch.equal(parameter.grad, gradient)
        for parameter, gradient in zip(network.parameters(), gradients, strict=True)
    )
    assert modes == [module.training for module in learner.modules()]
    assert random.is_current()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_adapts_in_every_gradient_mode(
    engine: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    network, loss, batch = float32_case("strided")
    learner = make_learner(network, loss, engine=engine)
    task = next(iter(batch.tasks()))
    expected = learner.adapt(task.support_x, task.support_y)
    with mode():
        adapted = learner.adapt(task.support_x.clone(), task.support_y.clone())
    assert all(map(torch.equal, adapted.parameters(), expected.parameters()))
    loss(adapted(task.query_x), task.query_y).backward()  # type: ignore[no-untyped-call]  # no inference tensor


def test_threads_that_adapt_at_once_take_turns() -> None:
    class Observed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            inside.append(threading.get_ident())
            time.sleep(0.002)  # lets another thread run
            return super().forward(x)

    inside: list[int] = []
    learner = make_learner(Observed(1, 1), mse_loss, engine="vectorized")
    task = SineWaves(shots=5).task(0, "test", 0)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    (expected,) = (dict(learner.adapt(task.support_x, task.support_y).named_parameters()),)
    inside.clear()
    with ThreadPoolExecutor(4) as pool:
        adapted = [*pool.map(lambda _: learner.adapt(task.support_x, task.support_y), range(4))]
    assert len({*inside}) > 1
    assert len([*groupby(inside)]) == 4, "a call of one thread lies within that of another"
    for network in adapted:
        for name, value in network.named_parameters():
            assert torch.equal(value, expected[name])
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_stay_and_shared_ones_stay_shared(engine: str) -> None:
    frozen, shared = nn.Linear(4, 4), nn.Linear(4, 4)
    frozen.weight.requires_grad_(False)
    network = nn.Sequential(nn.Linear(1, 4), frozen, shared, nn.Tanh(), shared, nn.Linear(4, 1))
    task = SineWaves(shots=5).task(0, "test", 0)
    adapted = make_learner(network, mse_loss, engine=engine).adapt(task.support_x, task.support_y)
    values = adapted.state_dict(keep_vars=True)
    assert values["2.weight"] is values["4.weight"]
    assert not torch.equal(values["2.weight"], shared.weight)
    assert torch.equal(values["1.weight"], frozen.weight) and not values["1.weight"].requires_grad
    assert not torch.equal(values["1.bias"], frozen.bias)


def test_lazy_layers_take_their_shapes_from_the_support_set() -> None:
    learner = make_learner(nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1)), mse_loss)
    task = SineWaves().task(0, "test", 0)
    assert learner.adapt(task.support_x, task.support_y)(task.query_x).shape == task.query_y.shape


def test_a_non_transductive_network_predicts_each_point_by_itself() -> None:
    network, loss, batch = float32_case("strided")
    task = next(iter(batch.tasks()))
    adapted = make_learner(network, loss, transductive=False).adapt(task.support_x, task.support_y)
    assert isinstance(adapted, NonTransductive) and type(adapted.network) is ConvNet
    whole = adapted(task.query_x)
    assert all(torch.equal(adapted(x[None])[0], y) for x, y in zip(task.query_x, whole, strict=True))
    assert not torch.allclose(adapted.network(task.query_x), whole)
    assert adapted.double()(task.query_x.double()).dtype == torch.float64  # the support set moves along


# What it says -------------------------------------------------------------------------------------

X, Y = torch.rand(5, 1, 28, 28), torch.arange(5)
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no batch dimension": (X[0], Y[:1], {}, r"support set of 1 inputs of shape \(28, 28\) float32"),
    "channels": (X.repeat(1, 3, 1, 1), Y, {}, r"5 inputs of shape \(3, 28, 28\).*to have 1 channels"),
    "fewer labels": (X, Y[:4], {}, r"support_x has shape \(5, 1, 28, 28\) and support_y \(4,\)"),
    "label above": (X, Y + 1, {}, "values up to 5: Target 5 is out of bounds"),
    "label below": (X, Y - 1, {}, "Target -1 is out of bounds"),
    "float labels": (X, Y.float(), {}, r"targets \(5,\) float32.*Long"),
    "empty": (X[:0], Y[:0], {}, r"support_x has shape \(0, 1, 28, 28\).*at least 1"),
    "one label": (X, torch.tensor(3), {}, r"support_y has shape \(\)"),
    "a list": (X.tolist(), Y, {}, "support_x is list of 5; it must be a tensor"),
    "an array": (X.numpy(), Y, {}, "support_x is ndarray; it must be a tensor"),
    "bytes": ((255 * X).byte(), Y, {}, r"inputs of shape \(1, 28, 28\) uint8"),
    "steps": (X, Y, {"steps": -1}, "steps is -1; it must be at least 0"),
    "half a step": (X, Y, {"steps": 1.5}, "steps is 1.5; it must be a whole number"),
    "steps as text": (X, Y, {"steps": "3"}, "steps is 3; it must be a whole number"),
    "inner_lr as text": (X, Y, {"inner_lr": "a"}, "inner_lr is a; it must be a finite number above 0"),
    "sparse": (X.to_sparse(), Y, {}, r"support_x is a sparse tensor; .* support_x.to_dense\(\)"),
    "inner_lr": (X, Y, {"inner_lr": 0}, "inner_lr is 0; it must be a finite number above 0"),
    "nan": (X * torch.nan, Y, {}, "not finite after 3 inner steps with inner_lr 0.1: lower inner_lr"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", REFUSED)
def test_it_says_what_is_wrong_with_a_support_set(name: str, engine: str) -> None:
    x, y, settings, message = REFUSED[name]
    learner = make_learner(ConvNet(5, filters=4), cross_entropy, engine=engine)
    with pytest.raises(UserError, match=message) as refused:
        learner.adapt(x, y, **settings)
    assert len(str(refused.value).splitlines()) == 1


def test_targets_that_would_broadcast_are_refused() -> None:
    with pytest.raises(UserError, match=r"targets \(5,\) float32 .* different to the input size"):
        make_learner(nn.Linear(1, 1), mse_loss).adapt(torch.rand(5, 1), torch.rand(5))


class OnceMore(nn.Module):
    """Refer to a layer in a closure, which a copy does not follow."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(1, 1)
        self.layer = layer
        self.call: Callable[[Tensor], Tensor] = lambda x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def test_a_network_whose_copy_would_not_adapt_is_refused() -> None:
    task = Lines().task(0, "test", 0)
    with pytest.raises(
        UserError, match=r"OnceMore cannot be copied: .*refers to parameters.*attributes"
    ):
        make_learner(OnceMore(), mse_loss).adapt(task.support_x, task.support_y)


def test_an_engine_adapts_without_a_learner() -> None:
    network, loss, batch = float32_case("sine")
    task = next(iter(batch.tasks()))
    learner = make_learner(network, loss)
    parameters = learner.engine.adapted_parameters(
        network, loss, task.support_x, task.support_y, InnerLoop(0.1, STEPS)
    )
    adapted = learner.adapt(task.support_x, task.support_y)
    assert all(torch.equal(parameters[name], p) for name, p in adapted.named_parameters())
