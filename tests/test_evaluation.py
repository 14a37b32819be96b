"""Evaluation predicts each query set as one batch, or each point alone with the support set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from maml_pipeline import MetaLearner, TaskBatch, TaskDataModule
from maml_pipeline.learner import accuracy
from maml_pipeline.meta_gradient import Engine, InnerLoop, Learn2LearnEngine, Loss, VectorizedEngine
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.runs.results import points_interact
from maml_pipeline.tasks import SineWaves
from tests.helpers import CONFIGS, make_trainer
from tests.networks import IMAGE_NETWORKS, VECTOR_NETWORKS, batch_norm_network, case
from tests.oracles import PlainLoop

ENGINES: dict[str, Engine] = {
    "learn2learn": Learn2LearnEngine(),
    "vectorized": VectorizedEngine(),
    "vectorized, chunks": VectorizedEngine(tasks_per_chunk=2),
}
BATCH_NORMALISED = {"strided": IMAGE_NETWORKS["strided"], "batch_norm": batch_norm_network}
INDEPENDENT = VECTOR_NETWORKS | {"group_and_layer_norm": IMAGE_NETWORKS["group_and_layer_norm"]}
INNER = InnerLoop(0.1, 2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("name", BATCH_NORMALISED)
def test_curves_agree_with_plain_gradient_descent(name: str, transductive: bool, engine: str) -> None:
    network, loss, batch = case(name, BATCH_NORMALISED[name], tasks=3)
    with torch.inference_mode():
        curves = ENGINES[engine].adaptation_curves(
            network, {"loss": loss}, loss, batch, INNER, transductive
        )["loss"]
    expected = PlainLoop(network, loss, INNER).curves(batch, transductive)
    torch.testing.assert_close(curves, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", INDEPENDENT | BATCH_NORMALISED)
def test_the_protocol_matters_only_where_points_interact(name: str, engine: str) -> None:
    network, loss, batch = case(name, (INDEPENDENT | BATCH_NORMALISED)[name], tasks=3)
    whole, single = (
        ENGINES[engine].adaptation_curves(network, {"loss": loss}, loss, batch, INNER, transductive)
        for transductive in (True, False)
    )
    difference = ((single["loss"] - whole["loss"]) / whole["loss"]).abs()
    if name in INDEPENDENT:
        assert difference.max() <= 1e-12
    else:
        assert difference.min() > 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_non_transductive_prediction_ignores_other_query_points(engine: str) -> None:
    network, _, batch = case("strided", IMAGE_NETWORKS["strided"], tasks=2)

    def first_loss(query_x: Tensor, transductive: bool) -> Tensor:
        def of_first_point(prediction: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(prediction[:1], target[:1])

        measures: dict[str, Loss] = {"first": of_first_point}
        tasks = batch._replace(query_x=query_x)
        return ENGINES[engine].adaptation_curves(
            network, measures, cross_entropy, tasks, INNER, transductive
        )["first"]

    others = batch.query_x.clone()
    others[:, 1:] = torch.rand_like(others[:, 1:])
    assert torch.equal(first_loss(batch.query_x, False), first_loss(others, False))
    assert not torch.equal(first_loss(batch.query_x, True), first_loss(others, True))


@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
def test_memory_does_not_grow_with_the_query_set(engine: str) -> None:
    network, loss = MLP(hidden_features=[256]), nn.MSELoss()

    def peak(queries: int) -> int:
        tasks = SineWaves(shots=5, query_shots=queries).batch(0, "train", range(4))

        def measure() -> Any:
            return ENGINES[engine].adaptation_curves(
                network, {"loss": loss}, loss, tasks, INNER, transductive=False
            )

        measure()
        return peak_bytes(measure) - sum(t.numel() * t.element_size() for t in tasks)

    # Only predictions may grow: two numbers per point (64 bytes each in the allocator).
    assert peak(60) - peak(10) <= 2 * 4 * 50 * 64


@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
def test_the_learner_follows_the_key_transductive(engine: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 6, 1, 28, 28), torch.arange(3).repeat(3, 2)
    batch = TaskBatch(x[0], y, x[1], y)
    network = ConvNet(ways=3, filters=4)
    loader: DataLoader[TaskBatch] = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    for transductive in (True, False):
        learner = MetaLearner(
            network, loss=cross_entropy, inner_lr=0.1, inner_steps=2, engine=engine,
            metric=accuracy, transductive=transductive,
        )  # fmt: skip
        (result,) = make_trainer().test(learner, dataloaders=loader, verbose=False)
        measures: dict[str, Loss] = {"loss": cross_entropy, "accuracy": accuracy}
        curves = Learn2LearnEngine().adaptation_curves(
            network, measures, cross_entropy, batch, INNER, transductive
        )
        for name, curve in curves.items():
            for step, value in enumerate(curve.mean(0)):
                assert result[f"test/{name}_step_{step}"] == pytest.approx(value.item(), rel=1e-4)


def test_the_protocol_never_changes_training() -> None:
    weights = []
    for transductive in (True, False):
        torch.manual_seed(0)
        learner = MetaLearner(
            MLP(hidden_features=[8]), loss=nn.MSELoss(), inner_lr=0.01, transductive=transductive
        )
        make_trainer(max_steps=3).fit(learner, datamodule=TaskDataModule(SineWaves(), meta_batch_size=2))
        weights.append(nn.utils.parameters_to_vector(learner.network.parameters()).detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", [*BATCH_NORMALISED, *INDEPENDENT])
def test_points_interact_only_through_batch_normalisation(name: str) -> None:
    network, _, batch = case(name, (BATCH_NORMALISED | INDEPENDENT)[name], tasks=1)
    interact = points_interact(network, batch.query_x[0], batch.support_x[0])
    assert interact == (name in BATCH_NORMALISED)


def test_the_table_names_the_protocol_where_query_points_interact(
    maml: Callable[..., str], tmp_path: Path
) -> None:
    short = [
        *("fit", "--config", CONFIGS / "toy.yaml", "--trainer.max_steps", 1, "--data.test_tasks", 2),
        *("--trainer.enable_progress_bar", "false"),
    ]
    network = [
        *("--model.network", "torch.nn.BatchNorm1d", "--model.network.num_features", 1),
        *("--model.network.track_running_stats", "false"),
    ]
    assert "transductive" not in maml(*short, "--run.dir", "toy")
    default = " ".join(maml(*short, *network, "--run.dir", "a").split())
    assert "transductive: each query set is predicted as one batch" in default
    single = maml(*short, *network, "--run.dir", "b", "--model.transductive", "false")
    assert "not transductive: each query point is predicted by itself" in " ".join(single.split())
