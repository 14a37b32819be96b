"""Losses and metrics are functions or class instances, named in a config or passed from Python."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, huber_loss, mse_loss
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from maml_pipeline import MetaLearner, TaskBatch
from maml_pipeline.errors import UserError
from maml_pipeline.learner import accuracy
from maml_pipeline.learner.model_checks import check_compatibility
from maml_pipeline.meta_gradient import Engine, InnerLoop, Learn2LearnEngine, Loss, VectorizedEngine
from maml_pipeline.tasks.lines import ONE_POINT_TASK
from tests.helpers import CONFIGS, make_trainer
from tests.networks import VECTOR_NETWORKS, case, flatten

ENGINES: dict[str, type[Engine]] = {"learn2learn": Learn2LearnEngine, "vectorized": VectorizedEngine}
MY_MEASURES = """
import torch

def bare(prediction, target):
    return (prediction - target).square().mean()

unnamed = lambda prediction, target: (prediction - target).square().mean()
instance = torch.nn.MSELoss()

class Scaled:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, prediction, target):
        return self.scale * (prediction - target).square().mean()

class NotCallable:
    pass

NUMBER = 3

def one_argument(prediction):
    return prediction.mean()

def unreduced(prediction, target):
    return (prediction - target).square()

def number(prediction, target):
    return 0.5

def whole(prediction, target):
    return (prediction > target).sum()

def constant(prediction, target):
    return (prediction.detach() - target).square().mean()

def raises(prediction, target):
    raise KeyError("weights")

class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, prediction, target):
        return self.scale * (prediction - target).square().mean()
"""
TOY = [
    *(
        "fit",
        "--config",
        CONFIGS / "toy.yaml",
        "--run.dir",
        "run",
        "--trainer.enable_progress_bar",
        "false",
    ),
    *("--trainer.max_steps", 3, "--trainer.val_check_interval", 3),
    *("--data.val_tasks", 4, "--data.test_tasks", 4),
    *("--probes.memory", "false", "--probes.speed", "false", "--probes.order_gap", "false"),
]


@pytest.fixture
def my_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_measures.py").write_text(MY_MEASURES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_measures", raising=False)


def spec(class_path: str, **init_args: Any) -> str:
    return json.dumps({"class_path": class_path, "init_args": init_args})


@pytest.mark.usefixtures("my_measures")
@pytest.mark.parametrize(
    ("key", "loss", "name", "factor"),
    [
        ("loss", "torch.nn.MSELoss", "loss", 1),
        ("loss", "my_measures.bare", "loss", 1),
        ("loss", "my_measures.unnamed", "loss", 1),
        ("loss", "my_measures.instance", "loss", 1),
        ("metric", "torch.nn.MSELoss", "mseloss", 1),
        ("metric", "my_measures.bare", "bare", 1),
        ("metric", "my_measures.Scaled", "scaled", 1),
        ("metric", spec("my_measures.Scaled", scale=2.0), "scaled", 2),
        ("metric", spec("torch.nn.MSELoss", reduction="sum"), "mseloss", 10),
    ],
)
def test_a_config_accepts_functions_and_classes(
    maml: Callable[..., str], tmp_path: Path, key: str, loss: str, name: str, factor: int
) -> None:
    maml(*TOY, "--run.dir", "expected")
    maml(*TOY, f"--model.{key}", loss)
    expected, actual = (
        json.loads((tmp_path / run / "test.json").read_text()) for run in ("expected", "run")
    )
    assert actual["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-6)
    assert actual[f"test/{name}"] == pytest.approx(factor * expected["test/loss"], rel=1e-6)
    # The resolved config reproduces the run.
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"][key]
    value = kept if isinstance(kept, str) else json.dumps(kept)
    maml(*TOY, f"--model.{key}", value, "--run.dir", "again")
    assert json.loads((tmp_path / "again" / "test.json").read_text()) == actual


def test_a_config_sets_the_arguments_of_a_loss(maml: Callable[..., str], tmp_path: Path) -> None:
    results = set()
    for number, settings in enumerate(
        [
            ["torch.nn.functional.huber_loss"],
            ["torch.nn.HuberLoss"],
            [spec("torch.nn.HuberLoss", delta=0.25)],
            ["torch.nn.HuberLoss", "--model.loss.delta", "0.25"],
        ]
    ):
        maml(*TOY, "--model.loss", *settings, "--run.dir", f"run{number}")
        results.add(json.loads((tmp_path / f"run{number}" / "test.json").read_text())["test/loss"])
    assert len(results) == 2


@pytest.mark.usefixtures("my_measures")
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "loss",
            "my_measures.NotCallable",
            "Expected 'my_measures.NotCallable' to be a class that inst",
        ),
        ("loss", "my_measures.NUMBER", "Unexpected import object 3"),
        ("loss", "my_measures.missing", "module 'my_measures' has no attribute 'missing'"),
        ("loss", "missing.missing", "No module named 'missing'"),
        ("loss", "mse_loss", "import path"),
        ("loss", "null", "model.loss"),
        ("loss", "torch.nn.Linear", "in_features"),
        ("loss", spec("torch.nn.HuberLoss", dellta=1), "dellta"),
        ("loss", "my_measures.one_argument", "one_argument() takes 1 positional argument but 2 were"),
        ("loss", "my_measures.unreduced", "loss unreduced returns (5, 1) float32; it must return one"),
        ("loss", spec("torch.nn.MSELoss", reduction="none"), "loss mseloss returns (5, 1) float32; it"),
        ("loss", "my_measures.number", "loss number returns a float; it must return a tensor with one"),
        ("loss", "my_measures.constant", "no gradient reaches network Linear from loss constant"),
        ("loss", "my_measures.raises", "KeyError: 'weights' (my_measures.py, line "),
        (
            "loss",
            "my_measures.Learned",
            "loss learned has trainable parameters, but only those",
        ),
        ("metric", "my_measures.NUMBER", "Unexpected import object 3"),
        ("metric", "my_measures.one_argument", "metric one_argument does not fit predictions (5, 1)"),
        ("metric", "my_measures.unreduced", "metric unreduced returns (5, 1) float32; it must return"),
        ("metric", "my_measures.number", "metric number returns a float; it must return a tensor with"),
        (
            "metric",
            "my_measures.whole",
            "metric whole returns () int64; it must return one floating-poi",
        ),
        ("metric", "my_measures.raises", "metric raises does not fit predictions (5, 1) float32 and ta"),
        ("metric", "my_measures.unnamed", "metric <lambda> has no name to log it under"),
        ("metric", "my_measures.Learned", "metric learned has trainable parameters"),
    ],
)
def test_invalid_losses_and_metrics_are_rejected_before_the_run_folder_exists(
    maml_error: Callable[..., str], tmp_path: Path, key: str, value: str, message: str
) -> None:
    assert message in maml_error(*TOY, f"--model.{key}", value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss, "loss is the class MSELoss; it must be a function"),
        (3, "loss is 3; it must be a function"),
        (None, "loss is None; it must be a function"),
    ],
)
def test_the_learner_rejects_invalid_losses(loss: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MetaLearner(nn.Linear(1, 1), loss=loss, inner_lr=0.1)


@dataclass
class Unhashable:
    """A loss compared by value, which makes it unhashable."""

    scale: float

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * mse_loss(prediction, target)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize(
    ("instance", "function"),
    [
        (nn.MSELoss(), mse_loss),
        (nn.HuberLoss(delta=0.3), partial(huber_loss, delta=0.3)),
        (Unhashable(2.0), lambda prediction, target: 2 * mse_loss(prediction, target)),
    ],
)
def test_an_instance_and_its_function_give_the_same_meta_gradient(
    instance: Any, function: Any, first_order: bool, engine: str
) -> None:
    network, _, batch = case("tanh", VECTOR_NETWORKS["tanh"], tasks=3)
    inner = InnerLoop(0.1, 2, first_order)
    expected, actual = (
        ENGINES[engine]().meta_gradient(network, loss, batch, inner) for loss in (function, instance)
    )
    torch.testing.assert_close(flatten(actual.gradient), flatten(expected.gradient), rtol=1e-12, atol=0)


def classification() -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 6, 2).double(), torch.arange(3).repeat(4, 2)
    return nn.Linear(2, 3).double(), TaskBatch(x[0], y, x[1], y)


WEIGHT, OTHER_WEIGHT = torch.tensor([[1.0, 2.0, 4.0], [4.0, 2.0, 1.0]]).double()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1}, {"weight": WEIGHT}, {"ignore_index": 1}])
def test_cross_entropy_uses_its_settings(settings: dict[str, Any], engine: str) -> None:
    network, batch = classification()
    loss, one_engine = nn.CrossEntropyLoss(**settings), ENGINES[engine]()

    def gradient(engine: Engine, loss: Loss) -> Tensor:
        return flatten(engine.meta_gradient(network, loss, batch, InnerLoop(0.1, 2), accuracy).gradient)

    def agrees(**settings: Any) -> bool:
        expected = gradient(Learn2LearnEngine(), partial(cross_entropy, **settings))
        return torch.allclose(gradient(one_engine, loss), expected, rtol=1e-10, atol=0)

    assert agrees(**settings)
    assert not agrees()
    if "weight" in settings:  # another tensor in the same loss, as after `.to(device)`
        loss.weight = OTHER_WEIGHT
        assert agrees(weight=OTHER_WEIGHT)


def test_a_loss_that_cannot_be_vectorized_is_rejected_by_name() -> None:
    network, batch = classification()
    both = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)
    gradient = Learn2LearnEngine().meta_gradient(network, both, batch, InnerLoop(0.1, 1)).gradient
    assert flatten(gradient).norm() > 0
    with pytest.raises(UserError, match=r"Linear or its loss under vmap.*engine learn2learn"):
        VectorizedEngine().meta_gradient(network, both, batch, InnerLoop(0.1, 1))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_torchmetrics_metric_measures_each_task_without_accumulating(engine: Any) -> None:
    network, batch = classification()
    metric = MulticlassAccuracy(num_classes=3, average="micro")
    learner = MetaLearner(network, loss=cross_entropy, inner_lr=0.1, metric=metric, engine=engine)
    expected = MetaLearner(network, loss=cross_entropy, inner_lr=0.1, metric=accuracy)
    loader: DataLoader[TaskBatch] = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    tested, by_function = (
        make_trainer(precision="64-true").test(m, dataloaders=loader, verbose=False)[0]
        for m in (learner, expected)
    )
    assert tested["test/multiclassaccuracy"] == pytest.approx(by_function["test/accuracy"])
    assert tested["test/multiclassaccuracy_ci95"] == pytest.approx(by_function["test/accuracy_ci95"])
    make_trainer(max_steps=1, precision="64-true").fit(learner, loader, loader)
    assert metric.update_count == 0


def test_an_engine_distinguishes_two_instances_of_a_loss() -> None:
    network, _, batch = case("tanh", VECTOR_NETWORKS["tanh"], tasks=2)
    engine, inner = VectorizedEngine(), InnerLoop(0.1, 1)
    one, two = (engine.meta_gradient(network, Unhashable(s), batch, inner).loss for s in (1.0, 2.0))
    assert one != two


class Returning(nn.Module):
    """A network that does not return a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return {"tuple": (y, x), "dict": {"y": y}, "NoneType": None, "list": [y]}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "list", "NoneType"])
def test_a_network_that_does_not_return_a_tensor_is_rejected(kind: str) -> None:
    learner = MetaLearner(Returning(kind), loss=mse_loss, inner_lr=0.1)
    with pytest.raises(UserError, match=f"network Returning returns a {kind}.*must return one tensor"):
        learner.check_task(ONE_POINT_TASK)
    with pytest.raises(UserError, match=f"network Returning returns a {kind}"):
        learner.meta_gradient(TaskBatch.stack([ONE_POINT_TASK]))


class Counting(nn.Module):
    """A network with dropout and a buffer that changes as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.dropout = nn.Dropout()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(self.dropout(x))
        return y


class Uncopied(Counting):
    """A network that cannot be copied: it stores a tensor computed from its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.layer.weight * 2


@pytest.mark.parametrize("kind", [Counting, Uncopied])
def test_the_compatibility_check_preserves_network_and_random_state(kind: type[Counting]) -> None:
    network = kind()
    state = torch.get_rng_state()
    with torch.inference_mode():
        check_compatibility(network, mse_loss, None, ONE_POINT_TASK)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.calls == 0
    assert all(p.grad is None for p in network.parameters())


def test_an_engine_is_checked_under_inference_mode() -> None:
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    with torch.inference_mode():
        learner.check_task(ONE_POINT_TASK)
    assert all(p.grad is None for p in learner.parameters())
