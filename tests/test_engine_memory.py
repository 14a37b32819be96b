"""Laws of memory: what each engine and method allocates, to the byte."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.meta_gradient import Engine, Learn2LearnEngine, VectorizedEngine
from maml_pipeline.meta_gradient.checkpointed import longest_segment
from maml_pipeline.meta_gradient.chunk_size import largest_fitting_chunk
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import ConvNet
from maml_pipeline.tasks import TaskBatch
from tests.networks import inner_loop

pytestmark = pytest.mark.exhaustive

ENGINES = [VectorizedEngine(), Learn2LearnEngine()]
FLOAT = 4


def bytes_of(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def peak(
    engine: Engine, network: ConvNet, steps: int, order: str = "second", learns_rates: bool = False
) -> int:
    """Measure one task's meta-gradient, with one image per class in each set."""
    ways = network.head.out_features
    x = torch.rand(2, 1, ways, 1, 28, 28, dtype=network.head.weight.dtype)
    y = torch.arange(ways)[None]
    batch = TaskBatch(x[0], y, x[1], y)
    inner = inner_loop(order, 0.1, steps)
    if learns_rates:
        rates = {name: torch.full((steps,), 0.1) for name, _ in network.named_parameters()}
        inner = replace(inner, rates=rates)
    engine.meta_gradient(network, cross_entropy, batch, inner)  # the first call fills caches
    return peak_bytes(lambda: engine.meta_gradient(network, cross_entropy, batch, inner))


@pytest.mark.parametrize("engine", ENGINES)
def test_first_order_is_constant_in_the_inner_steps(engine: Engine) -> None:
    network = ConvNet(5, filters=16)
    one, ten = (peak(engine, network, steps, "first") for steps in (1, 10))
    assert ten - one == 9 * FLOAT  # one loss per step


@pytest.mark.parametrize("engine", ENGINES)
def test_unrolled_second_order_is_affine_in_the_inner_steps(engine: Engine) -> None:
    network = ConvNet(5, filters=16)
    two, six, ten = (peak(engine, network, steps) for steps in (2, 6, 10))
    assert ten - six == six - two > 4 * 300_000


@pytest.mark.parametrize("engine", ENGINES)
def test_truncated_second_order_is_affine_in_the_differentiated_steps(engine: Engine) -> None:
    network = ConvNet(5, filters=16)
    one, three, five = (peak(engine, network, 10, f"truncated-{n}") for n in (1, 3, 5))
    assert five - three == three - one > 2 * 300_000


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["", "-checkpointed", "-hessian-free"])
def test_truncated_second_order_is_constant_in_the_steps_before(engine: Engine, method: str) -> None:
    network = ConvNet(5, filters=16)
    three, ten = (peak(engine, network, steps, f"truncated-2{method}") for steps in (3, 10))
    assert ten - three == 7 * FLOAT


@pytest.mark.parametrize("order", ["checkpointed", "hessian-free"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_reverse_sweep_grows_by_its_parameter_checkpoints(engine: Engine, order: str) -> None:
    network = ConvNet(5, filters=16)
    theta = bytes_of(network)
    base = peak(engine, network, 1, order)
    for steps in (2, 3, 4, 10, 11):
        grown = peak(engine, network, steps, order) - base
        losses = (steps - 1) * FLOAT
        assert grown == (longest_segment(steps) - 1) * theta + losses


@pytest.mark.parametrize("engine", ENGINES)
def test_learned_rates_keep_the_support_gradients_of_first_order_alone(engine: Engine) -> None:
    network = ConvNet(5, filters=16)
    theta, tensors = bytes_of(network), len([*network.parameters()])
    steps = (1, 2, 3, 4, 10, 11)
    one, *more = (peak(engine, network, k, "first", learns_rates=True) for k in steps)
    for k, grown in zip(steps[1:], more, strict=True):  # a rate for each tensor, and a loss
        assert grown - one == (k - 1) * (theta + (tensors + 1) * FLOAT)
    own = 2 if isinstance(engine, Learn2LearnEngine) else 1  # the rates, and those of the task
    one, *more = (peak(engine, network, k, "checkpointed", learns_rates=True) for k in steps)
    for k, grown in zip(steps[1:], more, strict=True):
        rates = (k - 1) * (own * tensors + 1) * FLOAT
        assert grown - one == (longest_segment(k) - 1) * theta + rates
    two, six, ten = (peak(engine, network, k, "second", learns_rates=True) for k in (2, 6, 10))
    assert ten - six == six - two > 0


@pytest.mark.parametrize("filters", [16, 64])
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 4), (torch.float64, 3)])
def test_hessian_free_adds_copies_of_the_parameters_to_first_order_in_double_precision(
    dtype: torch.dtype, copies: int, filters: int
) -> None:
    # Held besides a gradient: the adjoint, the gradient at theta in float64, and one difference.
    engine, network = VectorizedEngine(), ConvNet(5, filters=filters)
    first = peak(engine, network.double(), 1, "first")
    added = peak(engine, network.to(dtype), 1, "hessian-free") - first
    if dtype is torch.float32:
        added -= 5 * 28 * 28 * 8  # the support set in float64
    assert added / bytes_of(network) == pytest.approx(copies, abs=0.01)


def test_the_longest_segment_is_the_smallest_that_covers_all_steps() -> None:
    assert [longest_segment(k) for k in (0, 1, 2, 3, 4, 6, 7, 10, 11, 100)] == [
        *(0, 1, 2, 2, 3, 3, 4, 4, 5, 14)
    ]


@pytest.mark.parametrize(("ways", "of_unrolled", "of_first_order"), [(5, 0.21, 2.14), (20, 0.165, 1.87)])
def test_checkpointing_at_ten_steps(ways: int, of_unrolled: float, of_first_order: float) -> None:
    engine, network = VectorizedEngine(), ConvNet(ways)
    first, unrolled = peak(engine, network, 10, "first"), peak(engine, network, 10)
    checkpointed = peak(engine, network, 10, "checkpointed")
    assert checkpointed / unrolled == pytest.approx(of_unrolled, rel=0.02)
    assert checkpointed / first == pytest.approx(of_first_order, rel=0.02)


def test_a_hundred_checkpointed_steps_need_less_than_ten_unrolled() -> None:
    engine, network = VectorizedEngine(), ConvNet(5, filters=16)
    assert peak(engine, network, 100, "checkpointed") < peak(engine, network, 10) / 2


@pytest.mark.parametrize("order", ["first", "truncated-1", "second", "checkpointed", "hessian-free"])
def test_chunks_bound_the_memory_of_any_number_of_tasks(order: str) -> None:
    network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    inner = inner_loop(order, 0.1, 3)

    def measure(tasks: int, tasks_per_chunk: int | None) -> int:
        batch = TaskBatch(*(torch.rand(tasks, 50, n) for n in (8, 1, 8, 1)))
        engine = VectorizedEngine(tasks_per_chunk)
        engine.meta_gradient(network, mse_loss, batch, inner)
        return peak_bytes(lambda: engine.meta_gradient(network, mse_loss, batch, inner))

    two, twelve = measure(2, None), measure(12, 2)
    results = 10 * (4 + 50) * FLOAT  # losses and query predictions of each task
    gradients = 2 * 6 * bytes_of(network)  # the gradient of each chunk, and the running sum
    assert two <= twelve <= two + results + gradients
    assert measure(12, None) > 4 * two


def test_auto_takes_the_fewest_chunks_that_fit() -> None:
    def measure(tasks: int) -> int:
        return 100 + 10 * tasks

    assert largest_fitting_chunk(measure, tasks=32, available=10_000) == 32
    # Two equal chunks, rather than one of 31 tasks and one of 1.
    assert largest_fitting_chunk(measure, tasks=32, available=100 + 10 * 31) == 16
    assert largest_fitting_chunk(measure, tasks=32, available=100 + 10 * 11) == 11
    assert largest_fitting_chunk(measure, tasks=32, available=50) == 1
    assert largest_fitting_chunk(measure, tasks=1, available=50) == 1


def test_auto_is_one_task_if_two_do_not_fit() -> None:
    def measure(tasks: int) -> int:
        if tasks == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 100

    assert largest_fitting_chunk(measure, tasks=32, available=150) == 1

    def too_large_for_one(tasks: int) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        largest_fitting_chunk(too_large_for_one, tasks=32, available=50)


def test_a_failed_measurement_leaves_nothing_running() -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        peak_bytes(fail)
    assert gc.isenabled()
    assert peak_bytes(lambda: torch.empty(100)) == 100 * FLOAT  # one profiler can run at a time
