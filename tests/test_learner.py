"""MetaLearner under Lightning: training follows the meta-gradient, evaluation every inner step."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline import MetaLearner, TaskBatch, TaskDataModule
from maml_pipeline.errors import UserError
from maml_pipeline.learner import accuracy
from maml_pipeline.meta_gradient import InnerLoop, Learn2LearnEngine
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import MLP
from maml_pipeline.tasks import SineWaves
from maml_pipeline.tasks.lines import ONE_POINT_TASK
from tests.helpers import make_trainer, network_weights


def sine_batch(tasks: int = 4, seed: int = 0) -> TaskBatch:
    return SineWaves(shots=5).batch(seed, "train", range(tasks))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def make_learner(**settings: Any) -> MetaLearner:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"loss": mse_loss, "inner_lr": 0.01, "optimizer": sgd}
    return MetaLearner(MLP(hidden_features=[8]), **(defaults | settings))


@pytest.mark.parametrize("first_order", [True, False])
def test_training_descends_the_meta_gradient(first_order: bool) -> None:
    learner = make_learner(first_order=first_order)
    data = TaskDataModule(SineWaves(shots=5), meta_batch_size=4)
    before = network_weights(learner)
    gradients = torch.cat([g.flatten() for g in learner.meta_gradient(sine_batch()).values()])
    make_trainer(max_steps=1).fit(learner, datamodule=data)
    torch.testing.assert_close(network_weights(learner), before - 0.1 * gradients, rtol=0, atol=1e-7)


def test_the_orders_differ() -> None:
    first, second = (make_learner(first_order=order).meta_gradient(sine_batch()) for order in (1, 0))
    assert all((first[name] - second[name]).abs().max() > 1e-6 for name in first)


def test_accumulation_averages_meta_batches() -> None:
    accumulated, whole = make_learner(), make_learner()
    tasks = SineWaves(shots=5)
    in_parts, at_once = make_trainer(max_steps=3, accumulate_grad_batches=2), make_trainer(max_steps=3)
    in_parts.fit(accumulated, datamodule=TaskDataModule(tasks, meta_batch_size=3))
    at_once.fit(whole, datamodule=TaskDataModule(tasks, meta_batch_size=6))
    logged, expected = (trainer.logged_metrics["train/loss"] for trainer in (in_parts, at_once))
    torch.testing.assert_close(logged, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(network_weights(accumulated), network_weights(whole), rtol=0, atol=1e-6)


def test_clipping_bounds_the_meta_gradient() -> None:
    learner = make_learner()
    before = network_weights(learner)
    make_trainer(max_steps=1, gradient_clip_val=1e-3).fit(
        learner, datamodule=TaskDataModule(SineWaves(), meta_batch_size=4)
    )
    assert (network_weights(learner) - before).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_bfloat16_training_keeps_float32_weights() -> None:
    learner = make_learner()
    before = network_weights(learner)
    make_trainer(max_steps=2, precision="bf16-mixed").fit(
        learner, datamodule=TaskDataModule(SineWaves(), meta_batch_size=4)
    )
    assert network_weights(learner).dtype == torch.float32
    assert not torch.equal(network_weights(learner), before)


def test_the_outer_schedule_steps_once_a_meta_step() -> None:
    learner = make_learner(lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
    lightning = make_trainer(max_steps=3)
    lightning.fit(learner, datamodule=TaskDataModule(SineWaves(), meta_batch_size=2))
    assert lightning.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_evaluation_adapts_in_every_gradient_mode(mode: Any) -> None:
    learner = make_learner()
    with mode():
        batch = sine_batch()
        curves = Learn2LearnEngine().adaptation_curves(
            learner.network, {"loss": mse_loss}, mse_loss, batch, InnerLoop(0.01, 2)
        )
    # By hand: two steps of gradient descent on each task.
    for task, curve in zip(sine_batch().tasks(), curves["loss"], strict=True):
        network = make_learner().network
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for step in range(3):
            query_loss = mse_loss(network(task.query_x), task.query_y)
            assert curve[step].item() == pytest.approx(query_loss.item(), rel=1e-5)
            optimizer.zero_grad()
            mse_loss(network(task.support_x), task.support_y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert torch.equal(network_weights(learner), network_weights(make_learner()))


def test_evaluation_memory_grows_neither_with_steps_nor_with_tasks() -> None:
    network = MLP(hidden_features=[64])

    def peak(tasks: int, steps: int) -> int:
        batch = sine_batch(tasks)
        inner = InnerLoop(0.01, steps)
        Learn2LearnEngine().check_evaluation(network.eval(), mse_loss, batch, inner)
        measured = peak_bytes(
            lambda: Learn2LearnEngine().adaptation_curves(
                network, {"loss": mse_loss}, mse_loss, batch, inner
            )
        )
        return measured - sum(t.numel() * t.element_size() for t in batch)

    # One scalar per task and step may remain (64 bytes in the allocator).
    assert peak(2, 10) - peak(2, 2) <= 2 * 8 * 256
    assert peak(10, 2) - peak(2, 2) <= 8 * 3 * 256


def test_evaluation_reports_mean_and_confidence_interval_by_inner_step() -> None:
    learner = make_learner(inner_steps=1, eval_inner_steps=3)
    data = TaskDataModule(SineWaves(shots=5), meta_batch_size=4, test_tasks=10)
    lightning = make_trainer()
    (result,) = lightning.test(learner, datamodule=data, verbose=False)
    tasks = SineWaves(shots=5).batch(0, "test", range(10))
    curves = Learn2LearnEngine().adaptation_curves(
        learner.network, {"loss": mse_loss}, mse_loss, tasks, InnerLoop(0.01, 3)
    )["loss"]
    assert curves.shape == (10, 4)
    for step in range(4):
        assert result[f"test/loss_step_{step}"] == pytest.approx(curves[:, step].mean().item())
        ci95 = 1.96 * curves[:, step].std().item() / 10**0.5
        assert result[f"test/loss_step_{step}_ci95"] == pytest.approx(ci95)
    assert result["test/loss"] == result["test/loss_step_3"]


def test_accuracy_is_the_share_of_correct_predictions() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.1]])
    assert accuracy(logits, torch.tensor([0, 0, 0, 1])).item() == 0.75


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    learner = make_learner(inner_lr=1e6, inner_steps=8)
    data = TaskDataModule(SineWaves(), meta_batch_size=2)
    with pytest.raises(UserError, match=r"loss is (inf|nan) at meta-step 0, inner step \d.*1000000"):
        make_trainer(max_steps=1).fit(learner, datamodule=data)
    with pytest.raises(UserError, match=r"loss is (inf|nan) at the test after meta-step 0, inner step"):
        make_trainer().test(learner, datamodule=data, verbose=False)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    learner = make_learner()
    lightning = make_trainer(max_steps=1)
    lightning.fit(learner, datamodule=TaskDataModule(SineWaves(), meta_batch_size=2))
    with torch.no_grad():
        next(learner.network.parameters())[0] = torch.nan
    with pytest.raises(UserError, match="the parameters are not finite at meta-step 1"):
        lightning.save_checkpoint(tmp_path / "checkpoint.ckpt")
    assert not (tmp_path / "checkpoint.ckpt").exists()


def test_a_checkpoint_of_another_network_is_rejected_by_name(tmp_path: Path) -> None:
    lightning = make_trainer(max_steps=1)
    data = TaskDataModule(SineWaves(), meta_batch_size=2)
    lightning.fit(make_learner(), datamodule=data)
    path = tmp_path / "checkpoint.ckpt"
    lightning.save_checkpoint(path)
    assert "state_dict" in torch.load(path, weights_only=True)

    other = MetaLearner(MLP(hidden_features=[9]), loss=mse_loss, inner_lr=0.01)
    message = r"another network: network.0.bias is \(8,\) there and \(9,\) here"
    with pytest.raises(UserError, match=message):
        make_trainer(max_steps=1).fit(other, datamodule=data, ckpt_path=path, weights_only=True)


def test_a_network_that_does_not_fit_the_tasks_is_rejected_with_shapes() -> None:
    learner = MetaLearner(nn.Linear(3, 1), loss=mse_loss, inner_lr=0.1)
    with pytest.raises(UserError, match=r"Linear and loss mse_loss do not fit.*support_x is \(1, 1\)"):
        learner.check_task(ONE_POINT_TASK)
    classifier = MetaLearner(nn.Linear(1, 2), loss=cross_entropy, inner_lr=0.1)
    task = ONE_POINT_TASK._replace(support_y=torch.tensor([4]))
    with pytest.raises(UserError, match="values up to 4: Target 4 is out of bounds"):
        classifier.check_task(task)


def test_any_module_and_any_loss_work() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().mean()

    learner = MetaLearner(Scale(), loss=absolute_error, inner_lr=0.1)
    gradient = learner.meta_gradient(sine_batch())
    assert gradient.keys() == {"factor"} and gradient["factor"].shape == ()


def test_batches_reach_the_learner_as_task_batches() -> None:
    data = TaskDataModule(SineWaves(shots=5), meta_batch_size=3)
    for batch in islice(data.train_dataloader(), 2):
        assert isinstance(batch, TaskBatch)
        assert batch.support_x.shape == (3, 5, 1)


@pytest.mark.parametrize("settings", [{}, {"tasks_per_chunk": 3}, {"method": "checkpointed"}])
@pytest.mark.parametrize("order", [{"first_order": True}, {"differentiated_steps": 1}, {}])
def test_engines_train_the_same_weights(order: dict[str, Any], settings: dict[str, Any]) -> None:
    if "first_order" in order and "method" in settings:
        return  # refused
    data = TaskDataModule(SineWaves(shots=5), meta_batch_size=4, test_tasks=20)
    reference = make_learner(inner_steps=2, **order)
    vectorized = make_learner(inner_steps=2, engine="vectorized", **order, **settings)
    for learner in (reference, vectorized):
        make_trainer(max_steps=5).fit(learner, datamodule=data)
    torch.testing.assert_close(
        network_weights(vectorized), network_weights(reference), rtol=0, atol=1e-6
    )
    results = [
        make_trainer().test(m, datamodule=data, verbose=False)[0] for m in (reference, vectorized)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
def test_annealing_trains_first_order_then_second_order(engine: str) -> None:
    data = TaskDataModule(SineWaves(shots=5), meta_batch_size=4)

    def trained(steps: int, **settings: Any) -> Tensor:
        learner = make_learner(engine=engine, **settings)
        make_trainer(max_steps=steps).fit(learner, datamodule=data)
        return network_weights(learner)

    assert torch.equal(trained(3, first_order_meta_steps=3), trained(3, first_order=True))
    assert not torch.equal(trained(4, first_order_meta_steps=3), trained(4, first_order=True))
    assert not torch.equal(trained(4, first_order_meta_steps=3), trained(4))
    # With first_order there is nothing to anneal to.
    annealed = trained(4, first_order_meta_steps=3, first_order=True)
    assert torch.equal(annealed, trained(4, first_order=True))


def test_annealing_is_logged_and_resumes_exactly(tmp_path: Path) -> None:
    data = TaskDataModule(SineWaves(shots=5), meta_batch_size=4)

    class Orders(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, *arguments: object) -> None:
            self.seen.append(trainer.callback_metrics["train/first_order"].item())

    whole, orders = make_learner(first_order_meta_steps=3), Orders()
    make_trainer(max_steps=6, callbacks=[orders]).fit(whole, datamodule=data)
    assert orders.seen == [1, 1, 1, 0, 0, 0]

    first, resumed, later = (
        make_learner(first_order_meta_steps=3),
        make_learner(first_order_meta_steps=3),
        Orders(),
    )
    lightning = make_trainer(max_steps=2)
    lightning.fit(first, datamodule=data)
    lightning.save_checkpoint(tmp_path / "stopped.ckpt")
    make_trainer(max_steps=6, callbacks=[later]).fit(
        resumed, datamodule=data, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    assert later.seen == [1, 0, 0, 0]
    assert torch.equal(network_weights(resumed), network_weights(whole))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bag(x.long().clamp(0, 4))
        return y


# vmap warns that it runs this layer task by task.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
def test_a_layer_without_a_second_derivative_is_named(engine: Any) -> None:
    learner = MetaLearner(Bag(), loss=mse_loss, inner_lr=0.1, engine=engine)
    message = r"Bag with first_order false: the derivative for .*or set method to hessian_free or "
    with pytest.raises(UserError, match=message):
        learner.check_task(SineWaves().task(0, "train", 0))
    with pytest.raises(UserError, match=message):
        learner.meta_gradient(sine_batch())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
def test_hessian_free_trains_a_layer_without_a_second_derivative(engine: Any) -> None:
    network = nn.Sequential(Bag(), nn.Tanh(), nn.Linear(1, 1))
    learner = MetaLearner(
        network, loss=mse_loss, inner_lr=0.01, inner_steps=2, method="hessian_free", engine=engine
    )
    before = network_weights(learner)
    make_trainer(max_steps=3).fit(learner, datamodule=TaskDataModule(SineWaves(), meta_batch_size=4))
    assert not torch.equal(network_weights(learner), before)


@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
def test_lazy_layers_take_their_shapes_from_the_tasks(engine: Any) -> None:
    network = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))
    learner = MetaLearner(network, loss=mse_loss, inner_lr=0.1, engine=engine)
    with pytest.raises(UserError, match=r"has an uninitialised lazy layer at 0\.weight"):
        learner.engine.meta_gradient(network, mse_loss, sine_batch(), learner.inner)
    assert learner.meta_gradient(sine_batch())["0.weight"].shape == (8, 1)


def test_a_rejected_network_stays_in_training_mode() -> None:
    network = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    learner = MetaLearner(network, loss=mse_loss, inner_lr=0.1)
    with pytest.raises(UserError, match="track_running_stats=False"):
        learner.check_task(SineWaves().task(0, "train", 0))
    assert all(module.training for module in network.modules())


def test_a_loss_scaling_without_effect_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(Callback):
        """Gives the precision a scaler, as 16-mixed has on a GPU, while training starts."""

        def on_train_start(self, trainer: Trainer, *args: Any) -> None:
            trainer.precision_plugin.scaler = object()  # type: ignore[attr-defined]

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            trainer.precision_plugin.scaler = None  # type: ignore[attr-defined]

    for callbacks in ([], [Scaled()]):
        trainer = make_trainer(max_steps=1, precision="bf16-mixed", callbacks=callbacks)
        trainer.fit(make_learner(), datamodule=TaskDataModule(SineWaves(), 1))
        warned = [message for message in caplog.messages if "loss scaling cannot protect" in message]
        assert len(warned) == len(callbacks)


def test_an_engine_is_checked_on_two_different_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, batches = make_learner(), []
    monkeypatch.setattr(
        learner.engine, "check", lambda network, loss, batch, inner: batches.append(batch)
    )
    learner.check_task(SineWaves(shots=3).task(0, "train", 0))
    ((batch,),) = [batches]
    assert len(batch.support_x) == 2
    assert not torch.equal(*batch.support_x) and not torch.equal(*batch.query_x)
