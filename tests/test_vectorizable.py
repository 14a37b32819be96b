"""Networks and losses that an engine rejects, since its meta-gradient would be wrong."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import Engine, InnerLoop, Learn2LearnEngine, Loss, VectorizedEngine
from maml_pipeline.tasks import TaskBatch
from tests.networks import inner_loop, relative_difference

BATCH = TaskBatch(*(torch.rand(3, 4, n) for n in (2, 1, 2, 1)))


def sequential(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1))


class DataDependent(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x)[0])
        return y


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (sequential(nn.Dropout(0.5)), "draws random numbers, as dropout does: use engine learn2learn"),
        (DataDependent(2, 1), "cannot run network DataDependent.*use engine learn2learn"),
    ],
)
def test_vectorized_rejects_random_numbers_and_data_dependence(network: nn.Module, message: str) -> None:
    for first_order in (True, False):
        with pytest.raises(UserError, match=message) as rejected:
            VectorizedEngine().meta_gradient(network, mse_loss, BATCH, InnerLoop(0.1, 1, first_order))
        assert "\n" not in str(rejected.value)
    with pytest.raises(UserError, match=message):
        VectorizedEngine().adaptation_curves(network, {}, mse_loss, BATCH, InnerLoop(0.1))
    # The remedy: learn2learn runs it.
    result = Learn2LearnEngine().meta_gradient(network, mse_loss, BATCH, InnerLoop(0.1, 2))
    assert torch.isfinite(result.loss)


@pytest.mark.parametrize("engine", [VectorizedEngine(), Learn2LearnEngine()])
@pytest.mark.parametrize("order", ["first", "second", "checkpointed", "hessian-free"])
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: sequential(nn.BatchNorm1d(4)),
            "changes its buffer 1.running_mean when called: .*track_running_stats=False",
        ),
        (
            lambda: sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
            "changes its buffer 1.parametrizations.weight.0._[uv] when called: .*matrix_norm",
        ),
        (Counting, "network Counting changes its buffer calls"),
    ],
)
def test_every_engine_rejects_state_that_a_call_changes(
    build: Callable[[], nn.Module], message: str, order: str, engine: Engine
) -> None:
    inner = inner_loop(order, 0.1, 1)
    with pytest.raises(UserError, match=message):
        engine.meta_gradient(build(), mse_loss, BATCH, inner)


def test_vectorized_rejects_recurrent_layers() -> None:
    with pytest.raises(UserError, match=r"cannot run network Recurrent.*aten::lstm"):
        VectorizedEngine().meta_gradient(Recurrent(), mse_loss, BATCH, InnerLoop(0.1))


@pytest.mark.parametrize("order", ["checkpointed", "hessian-free"])
def test_a_reverse_sweep_rejects_steps_that_do_not_repeat(order: str) -> None:
    inner = inner_loop(order, 0.1, 2)
    with pytest.raises(UserError, match="set method to unrolled"):
        Learn2LearnEngine().meta_gradient(sequential(nn.Dropout(0.5)), mse_loss, BATCH, inner)


def test_rejecting_changes_neither_the_network_nor_the_random_state() -> None:
    normalisation = nn.BatchNorm1d(4)
    for network in (sequential(normalisation), sequential(nn.Dropout())):
        random_state = torch.get_rng_state()
        with pytest.raises(UserError):
            VectorizedEngine().meta_gradient(network, mse_loss, BATCH, InnerLoop(0.1))
        assert torch.equal(torch.get_rng_state(), random_state)
    assert normalisation.running_mean is not None
    assert normalisation.running_mean.count_nonzero() == 0


def test_dropout_is_accepted_in_evaluation() -> None:
    network = sequential(nn.Dropout(0.5)).eval()
    measures: dict[str, Loss] = {"loss": mse_loss}
    inner = InnerLoop(0.1, 2)
    engines = VectorizedEngine(), Learn2LearnEngine()
    curves = [e.adaptation_curves(network, measures, mse_loss, BATCH, inner)["loss"] for e in engines]
    torch.testing.assert_close(*curves)


def test_a_loss_without_reduction_is_rejected_with_its_shape() -> None:
    def unreduced(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square()

    with pytest.raises(UserError, match=r"the loss of one task is \(4, 1\); it must be a scalar"):
        VectorizedEngine().meta_gradient(nn.Linear(2, 1), unreduced, BATCH, InnerLoop(0.1))


@pytest.mark.parametrize("engine", [VectorizedEngine(), Learn2LearnEngine()])
def test_second_order_through_pytorchs_weight_norm_is_rejected(engine: Engine) -> None:
    network = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
    with pytest.raises(UserError, match=r"weight normalisation, at parametrizations.*wrong second"):
        engine.meta_gradient(network, mse_loss, BATCH, InnerLoop(0.1))


def test_layers_may_be_frozen_and_thawed_between_meta_steps() -> None:
    network, engine, inner = sequential(nn.Tanh()), VectorizedEngine(), InnerLoop(0.1, 2)
    for frozen in (True, False, True):
        network[0].requires_grad_(not frozen)
        actual = engine.meta_gradient(network, mse_loss, BATCH, inner)
        expected = Learn2LearnEngine().meta_gradient(network, mse_loss, BATCH, inner)
        assert relative_difference(actual, expected) <= 1e-5


def test_a_copied_engine_computes_with_the_copied_network() -> None:
    network, engine, inner = sequential(nn.Tanh()), VectorizedEngine(2), InnerLoop(0.1, 1)
    network[0].requires_grad_(False)
    engine.meta_gradient(network, mse_loss, BATCH, inner)
    pickle.dumps(engine)
    copied, copied_engine = copy.deepcopy((network, engine))
    assert copied_engine.tasks_per_chunk == 2
    with torch.no_grad():
        next(copied.parameters()).add_(1.0)
    actual = copied_engine.meta_gradient(copied, mse_loss, BATCH, inner)
    expected = Learn2LearnEngine().meta_gradient(copied, mse_loss, BATCH, inner)
    assert relative_difference(actual, expected) <= 1e-5
