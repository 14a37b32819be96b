"""Machine code computes what PyTorch does, for each network, loss and method that it knows."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.errors import UserError
from maml_pipeline.learner import accuracy
from maml_pipeline.meta_gradient import InnerLoop, Loss, MetaGradient, NativeEngine, VectorizedEngine
from maml_pipeline.meta_gradient.checkpointed import longest_segment
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.meta_gradient.native.batch import TaskLosses, batch_losses
from maml_pipeline.meta_gradient.native.job import Job
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native_engine import known_network
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import TaskBatch
from tests.networks import inner_loop, relative_difference
from tests.oracles import PlainLoop, inner_product, linear_closed_form

ENGINE = NativeEngine()
REFERENCE = VectorizedEngine()
LOOPS = {
    "no step": InnerLoop(0.1, 0),
    "first order": InnerLoop(0.1, 3, first_order=True),
    "one step": InnerLoop(0.1, 1),
    "unrolled": InnerLoop(0.1, 4),
    "checkpointed": InnerLoop(0.1, 7, method="checkpointed"),
    "truncated": InnerLoop(0.1, 5, differentiated_steps=2),
    "truncated, checkpointed": InnerLoop(0.1, 7, differentiated_steps=5, method="checkpointed"),
    "truncated to nothing": InnerLoop(0.1, 3, differentiated_steps=0, method="checkpointed"),
}
IMAGE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: ConvNet(ways=3, filters=4, in_channels=2),
    "strided, flattened": lambda: ConvNet(ways=3, filters=4, in_channels=2, image_size=19),
    "pooled": lambda: ConvNet(ways=3, filters=4, in_channels=2, downsampling="max_pool"),
    "pooled, flattened": lambda: ConvNet(3, 4, "max_pool", in_channels=2, image_size=19),
}
VECTOR_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(2, 3, (8, 8)),
    "one layer": lambda: nn.Sequential(nn.Linear(2, 3)),
    "layers of unequal widths": lambda: nn.Sequential(
        *(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
    ),
}
NETWORKS = IMAGE_NETWORKS | VECTOR_NETWORKS


def case(
    name: str, loss: Loss, tasks: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, TaskBatch]:
    """Build a network that machine code knows, with tasks of more query than support examples."""
    torch.manual_seed(len(name))
    network = NETWORKS[name]().to(dtype)
    with torch.no_grad():  # away from zero biases
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    shape = (2, 19, 19) if name in IMAGE_NETWORKS else (2,)
    support_x, query_x = (torch.randn(tasks, n, *shape, dtype=dtype) for n in (6, 7))
    if loss is mse_loss:
        support_y, query_y = (torch.randn(tasks, n, 3, dtype=dtype) for n in (6, 7))
    else:
        support_y, query_y = (torch.randint(3, (tasks, n)) for n in (6, 7))
    batch = TaskBatch(support_x, support_y, query_x, query_y)
    assert known_network(network, loss, batch, InnerLoop(0.1)) is not None
    return network, batch


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(result: MetaGradient) -> list[Tensor]:
    return [result.loss, result.inner_losses, *result.gradient.values()]


@pytest.mark.parametrize("loss", [cross_entropy, mse_loss])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradients_are_those_of_autograd(name: str, loop: str, loss: Loss) -> None:
    network, batch = case(name, loss)
    metric = accuracy if loss is cross_entropy else None
    expected = REFERENCE.meta_gradient(network, loss, batch, LOOPS[loop], metric)
    actual = ENGINE.meta_gradient(network, loss, batch, LOOPS[loop], metric)
    assert [*actual.gradient] == [*expected.gradient]
    assert relative_difference(actual, expected) <= 1e-10
    torch.testing.assert_close(actual.inner_losses, expected.inner_losses, rtol=1e-12, atol=0)
    if metric is not None:
        assert actual.metric is not None and expected.metric is not None
        assert torch.equal(actual.metric, expected.metric)


@pytest.mark.parametrize("name", ["strided", "pooled, flattened", "mlp"])
def test_second_order_agrees_with_finite_differences(name: str) -> None:
    network, batch = case(name, cross_entropy)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    inner = InnerLoop(0.01, 2)
    expected = PlainLoop(network, cross_entropy, inner).slope(batch, direction, h=1e-6)
    gradient = ENGINE.meta_gradient(network, cross_entropy, batch, inner).gradient
    assert inner_product(gradient, direction) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 5, 11])
@pytest.mark.parametrize("first_order", [True, False])
def test_a_linear_network_agrees_with_the_closed_form(first_order: bool, steps: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 6, 2).double(), torch.randn(2, 3, 6, 1).double()
    batch, linear = TaskBatch(x[0], y[0], x[1], y[1]), nn.Linear(2, 1).double()
    inner = InnerLoop(0.1, steps, first_order)
    actual = ENGINE.meta_gradient(nn.Sequential(linear), mse_loss, batch, inner).gradient
    flat = torch.cat([g.flatten() for g in actual.values()])
    expected = linear_closed_form(linear, batch, inner)
    assert (flat - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_evaluations_are_those_of_autograd(name: str, transductive: bool) -> None:
    network, batch = case(name, cross_entropy)
    network.eval()
    inner = InnerLoop(0.1, 3)
    measures: dict[str, Loss] = {"loss": cross_entropy, "accuracy": accuracy}
    with torch.inference_mode():
        expected, actual = (
            engine.adaptation_curves(network, measures, cross_entropy, batch, inner, transductive)
            for engine in (REFERENCE, ENGINE)
        )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    support = batch.support_x[0], batch.support_y[0]
    adapted = ENGINE.adapted_parameters(network, cross_entropy, *support, inner)
    expected = REFERENCE.adapted_parameters(network, cross_entropy, *support, inner)
    torch.testing.assert_close(adapted, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["strided", "mlp"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    network, batch = case(name, cross_entropy, tasks=70, dtype=torch.float32)
    results = []
    for number in (1, 2, 5):
        with threads(number):
            results.append(ENGINE.meta_gradient(network, cross_entropy, batch, InnerLoop(0.1, 2)))
    for result in results[1:]:
        assert all(map(torch.equal, bits(result), bits(results[0])))


@pytest.mark.parametrize("name", ["strided", "pooled", "mlp"])
def test_the_other_tasks_change_no_bit_of_a_task(name: str) -> None:
    network, batch = case(name, cross_entropy, tasks=40, dtype=torch.float32)
    inner = InnerLoop(0.1, 2)
    together = ENGINE.meta_gradient(network, cross_entropy, batch, inner).inner_losses
    for task in (0, 1, 39):
        alone = TaskBatch(*(tensor[task : task + 1] for tensor in batch))
        losses = ENGINE.meta_gradient(network, cross_entropy, alone, inner).inner_losses
        assert torch.equal(losses[0], together[task])


@pytest.mark.parametrize("name", ["strided", "pooled", "mlp"])
def test_float32_rounds_like_autograd(name: str) -> None:
    network, batch = case(name, cross_entropy)
    inner = InnerLoop(0.01, 2)
    exact = ENGINE.meta_gradient(network, cross_entropy, batch, inner)
    network, batch = case(name, cross_entropy, dtype=torch.float32)
    network.load_state_dict(case(name, cross_entropy)[0].state_dict())
    batch = TaskBatch(*(t.float() if t.is_floating_point() else t for t in case(name, cross_entropy)[1]))
    errors = [
        max((g.double() - exact.gradient[name]).norm() for name, g in result.gradient.items())
        for result in (
            engine.meta_gradient(network, cross_entropy, batch, inner) for engine in (ENGINE, REFERENCE)
        )
    ]
    assert errors[0] <= 4 * errors[1]


def test_a_loss_that_is_not_finite_is_returned() -> None:
    network, batch = case("strided", mse_loss)
    result = ENGINE.meta_gradient(network, mse_loss, batch, InnerLoop(1e200, 3, first_order=True))
    assert not result.loss.isfinite()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("loop", ["first order", "unrolled"])
@pytest.mark.parametrize("part", ["support_x", "query_x"])
def test_one_number_of_a_task_that_is_not_finite_is_seen_in_the_loss(
    name: str, loop: str, part: str
) -> None:
    network, batch = case(name, cross_entropy)
    getattr(batch, part)[0, 0].view(-1)[0] = torch.nan
    assert known_network(network, cross_entropy, batch, LOOPS[loop]) is not None
    assert not ENGINE.meta_gradient(network, cross_entropy, batch, LOOPS[loop]).loss.isfinite()


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


# Memory ----------------------------------------------------------------------------------------------


def peak(name: str, steps: int, order: str = "second") -> int:
    network, batch = case(name, cross_entropy, tasks=1, dtype=torch.float32)
    inner = inner_loop(order, 0.1, steps)
    ENGINE.meta_gradient(network, cross_entropy, batch, inner)  # the first call fills caches
    return peak_bytes(lambda: ENGINE.meta_gradient(network, cross_entropy, batch, inner))


@pytest.mark.parametrize("name", ["strided", "pooled", "mlp"])
def test_memory_obeys_the_laws_of_the_methods(name: str) -> None:
    loss = 4
    first, more = (peak(name, steps, "first") for steps in (1, 10))
    assert more - first == 9 * loss
    two, six, ten = (peak(name, steps) for steps in (2, 6, 10))
    assert ten - six == six - two > 0
    one, three, five = (peak(name, 10, f"truncated-{n}") for n in (1, 3, 5))
    assert five - three == three - one > 0
    assert peak(name, 12, "truncated-3") - three == 2 * loss
    theta = 4 * sum(p.numel() for n, p in case(name, cross_entropy)[0].named_parameters())
    if name in IMAGE_NETWORKS:  # the biases of its four convolutions are not needed
        theta -= 4 * 4 * 4
    one = peak(name, 1, "checkpointed")
    for steps in (2, 3, 4, 10, 11):
        grown = peak(name, steps, "checkpointed") - one
        assert grown == (longest_segment(steps) - 1) * theta + (steps - 1) * loss


def test_memory_grows_by_one_gradient_a_task_and_by_one_task_a_thread() -> None:
    network, batch = case("strided", cross_entropy, tasks=12, dtype=torch.float32)
    inner = InnerLoop(0.1, 1)
    peaks = {}
    for number in (1, 2, 3):
        for tasks in (4, 8, 12):
            part = TaskBatch(*(tensor[:tasks] for tensor in batch))
            with threads(number):
                ENGINE.meta_gradient(network, cross_entropy, part, inner)
                call = partial(ENGINE.meta_gradient, network, cross_entropy, part, inner)
                peaks[number, tasks] = peak_bytes(call)
    for number in (1, 2, 3):
        assert peaks[number, 12] - peaks[number, 8] == peaks[number, 8] - peaks[number, 4]
    assert peaks[3, 4] - peaks[2, 4] == peaks[2, 4] - peaks[1, 4] > 0


def test_memory_is_free_even_if_a_thread_lets_go_of_its_work_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, batch = case("strided", cross_entropy, tasks=12, dtype=torch.float32)
    call = partial(ENGINE.meta_gradient, network, cross_entropy, batch, InnerLoop(0.1, 1))

    def thrice() -> None:
        for _ in range(3):
            call()

    kept: list[object] = []
    submit = ThreadPoolExecutor.submit

    def submit_and_keep(
        self: ThreadPoolExecutor, function: Callable[..., Any], *args: Any
    ) -> Future[Any]:
        kept.append((function, args))
        return submit(self, function, *args)

    with threads(3):
        call()
        expected = peak_bytes(thrice)
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_keep)
        assert peak_bytes(thrice) == expected and kept


def test_a_thread_that_cannot_be_started_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = case("strided", cross_entropy, tasks=12)
    run, submit = Job.run, ThreadPoolExecutor.submit
    finished: list[object] = []
    started: list[Future[Any]] = []

    def submit_once(self: Any, function: Callable[..., Any], *args: Any) -> Future[Any]:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(submit(self, function, *args))
        return started[0]

    def run_slowly(self: Job, *args: Any) -> None:
        time.sleep(0.1)
        run(self, *args)
        finished.append(args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_once)
    monkeypatch.setattr(Job, "run", run_slowly)
    with threads(3), pytest.raises(RuntimeError, match="can't start"):
        ENGINE.meta_gradient(network, cross_entropy, batch, InnerLoop(0.1, 1))
    assert started[0].done() and len(finished) <= 1


def test_an_interrupt_waits_for_the_threads_that_write_to_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, batch = case("strided", cross_entropy, tasks=12)
    run, has_started, finished = Job.run, threading.Event(), []

    def run_slowly(self: Job, *args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            assert has_started.wait(60)
            raise KeyboardInterrupt
        has_started.set()
        time.sleep(0.1)
        run(self, *args)
        finished.append(args)

    monkeypatch.setattr(Job, "run", run_slowly)
    with threads(2), pytest.raises(KeyboardInterrupt):
        ENGINE.meta_gradient(network, cross_entropy, batch, InnerLoop(0.1, 1))
    assert len(finished) == 1, "and no further task begins"


# Losses alone ----------------------------------------------------------------------------------------


def losses_run_as_machine_code(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tasks of each call."""
    calls: list[int] = []

    def counted(network: FeedForward, theta: Tensor, x: Tensor, y: Tensor) -> TaskLosses:
        calls.append(len(x))
        return batch_losses(network, theta, x, y)

    monkeypatch.setattr("maml_pipeline.meta_gradient.native.chunk_losses.batch_losses", counted)
    return calls


@pytest.mark.parametrize("loss", [cross_entropy, mse_loss])
@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_free_meta_gradients_are_those_of_exact_second_order(
    name: str, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = losses_run_as_machine_code(monkeypatch)
    network, tasks = case(name, loss)
    inner = InnerLoop(0.1, 3, method="hessian_free")
    actual = ENGINE.meta_gradient(network, loss, tasks, inner)
    assert calls == [3] * len(calls), "not machine code"
    assert len(calls) >= 3 + 1 + 3 * 3
    expected = REFERENCE.meta_gradient(network, loss, tasks, InnerLoop(0.1, 3))
    assert relative_difference(actual, expected) < 1e-5
    assert torch.allclose(actual.inner_losses, expected.inner_losses, rtol=1e-10)


@pytest.mark.parametrize("name", ["strided", "pooled, flattened", "mlp"])
def test_learned_rates_have_the_gradients_of_autograd_in_first_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = losses_run_as_machine_code(monkeypatch)
    network, tasks = case(name, cross_entropy)
    rates = {n: torch.rand(2, dtype=torch.float64) for n, _ in network.named_parameters()}
    inner = InnerLoop(0.1, 3, first_order=True, rates=rates)
    actual = ENGINE.meta_gradient(network, cross_entropy, tasks, inner)
    assert calls, "not machine code"
    expected = REFERENCE.meta_gradient(network, cross_entropy, tasks, inner)
    assert relative_difference(actual, expected) < 1e-10
    for parameter, of_rates in expected.rates.items():
        assert torch.allclose(actual.rates[parameter], of_rates, rtol=1e-10, atol=1e-14)


def test_the_number_of_threads_changes_no_bit_of_losses() -> None:
    network, tasks = case("strided", cross_entropy, tasks=5, dtype=torch.float32)
    inner = InnerLoop(0.1, 2, method="hessian_free")
    results = []
    for number in (1, 3):
        with threads(number):
            results.append(bits(ENGINE.meta_gradient(network, cross_entropy, tasks, inner)))
    assert all(map(torch.equal, *results))
