"""What makes a batch cheaper under the Trainer changes nothing that a user sees."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.profilers import PassThroughProfiler, Profiler, SimpleProfiler
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.cli.fit_callbacks import fit_callbacks
from maml_pipeline.learner.lightning_internals import BATCH_HOOKS
from maml_pipeline.learner.loss_with_gradient import deposit_gradient, loss_with_gradient
from maml_pipeline.learner.no_profiler import NoProfiler
from maml_pipeline.learner.outer_optimizer import release_gradients
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.learner.tracking import StartTracking
from maml_pipeline.meta_gradient import InnerLoop, VectorizedEngine
from maml_pipeline.networks import MLP
from maml_pipeline.run_folder import RunSettings
from maml_pipeline.runs.results import ResultTable
from maml_pipeline.tasks import Lines, TaskBatch
from tests.helpers import SHORT, Maml, make_trainer, network_weights


def callbacks_of_fit(folder: Path) -> list[Callback]:
    return fit_callbacks(folder, RunSettings(), ProbeSettings(), 0, ResultTable(None), True).ordered


def test_no_hook_that_a_callback_of_fit_defines_is_skipped(tmp_path: Path) -> None:
    for callback in callbacks_of_fit(tmp_path):
        for hook in BATCH_HOOKS:
            is_defined = getattr(type(callback), hook) is not getattr(Callback, hook)
            assert callable(getattr(callback, hook)) == is_defined, f"{type(callback).__name__}.{hook}"


def train(folder: Path, *callbacks: Callback, **settings: Any) -> MetaLearner:
    torch.manual_seed(0)
    learner = MetaLearner(MLP(hidden_features=[4]), loss=mse_loss, inner_lr=0.1)
    settings = {"max_steps": 12, "accumulate_grad_batches": 2, **settings}
    make_trainer(callbacks=[*callbacks], **settings).fit(
        learner, datamodule=TaskDataModule(Lines(), 4, val_tasks=4)
    )
    return learner


def test_the_weights_are_those_of_a_plain_trainer(tmp_path: Path) -> None:
    plain = train(tmp_path)
    ours = [c for c in callbacks_of_fit(tmp_path) if not isinstance(c, StartTracking)]
    quick = train(
        tmp_path, *ours, profiler=NoProfiler(), enable_checkpointing=True, enable_progress_bar=True,
        default_root_dir=tmp_path,
    )  # fmt: skip
    assert torch.equal(network_weights(plain), network_weights(quick))


class EveryHook(Callback):
    """A user's callback that counts the calls of every hook of a batch, and notes the profiler."""

    calls: ClassVar[dict[str, int]] = {}
    profilers: ClassVar[list[Profiler]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.profilers.append(trainer.profiler)  # type: ignore[attr-defined]


def _counted(hook: str) -> Any:
    def count(self: EveryHook, *args: Any, **kwargs: Any) -> None:
        self.calls[hook] = self.calls.get(hook, 0) + 1

    return count


for _hook in BATCH_HOOKS:
    setattr(EveryHook, _hook, _counted(_hook))

WITH_EVERY_HOOK = (*SHORT, "--trainer.callbacks+=tests.test_time_of_a_batch.EveryHook")


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    EveryHook.calls.clear()
    EveryHook.profilers.clear()


def test_every_hook_of_a_users_callback_is_called(maml: Maml, tmp_path: Path) -> None:
    maml("fit", *WITH_EVERY_HOOK, "--run.dir", tmp_path / "run")
    assert EveryHook.calls == dict.fromkeys(BATCH_HOOKS, 12)
    assert {type(profiler) for profiler in EveryHook.profilers} == {NoProfiler}


def test_a_users_profiler_measures_the_hooks_that_are_defined(maml: Maml, tmp_path: Path) -> None:
    maml("fit", *WITH_EVERY_HOOK, "--trainer.profiler", "simple", "--run.dir", tmp_path / "run")
    profiler = EveryHook.profilers[0]
    assert isinstance(profiler, SimpleProfiler)
    durations = profiler.recorded_durations
    for hook in BATCH_HOOKS:
        assert len(durations[f"[Callback]EveryHook.{hook}"]) == 12
    assert len(durations["[Callback]LastCheckpoint.on_train_batch_end"]) == 12
    assert "[Callback]LastCheckpoint.on_after_backward" not in durations


def test_no_profiler_lets_errors_pass_and_may_be_nested() -> None:
    profiler = NoProfiler()
    assert isinstance(profiler, PassThroughProfiler)
    with pytest.raises(ZeroDivisionError), profiler.profile("outer"), profiler.profile("inner"):
        _ = 1 / 0
    with profiler.profile("again"):
        pass


class CountsZeroGrad(torch.optim.SGD):
    """An optimizer with a `zero_grad` of its own."""

    calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls += 1
        super().zero_grad(set_to_none)


def test_gradients_are_released_as_the_optimizer_would() -> None:
    layer, frozen = nn.Linear(2, 1), nn.Parameter(torch.ones(1))
    frozen.grad = torch.ones(1)
    groups: list[Any] = [{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.1}]
    for optimizer in (torch.optim.SGD(groups, lr=1), CountsZeroGrad(groups, lr=1)):
        layer(torch.ones(1, 2)).sum().backward()
        release_gradients(optimizer)
        assert layer.weight.grad is None and layer.bias.grad is None
        assert frozen.grad is not None, "the optimizer does not own it"
    assert optimizer.calls == 1  # type: ignore[attr-defined]
    plain: Any = torch.optim.SGD(layer.parameters(), lr=1)
    called: list[bool] = []
    plain.zero_grad = lambda: called.append(True)
    release_gradients(plain)
    assert called == [True]


def test_finite_losses_whose_sum_overflows_are_accepted() -> None:
    learner = MetaLearner(MLP(), loss=lambda x, y: 0 * mse_loss(x, y) + 1e38, inner_lr=0.1)
    batch = TaskBatch.stack([Lines().task(0, "train", index) for index in range(3)])
    # One loss before the inner step and one after it: 6e38, more than float32 can hold.
    assert all(gradient.isfinite().all() for gradient in learner.meta_gradient(batch).values())


LINES = TaskBatch.stack([Lines().task(0, "train", index) for index in range(3)])


def loss_of(network: nn.Module) -> Tensor:
    """Return a loss with a gradient; the elements of the first weight's lie in another order."""
    result = VectorizedEngine().meta_gradient(network, mse_loss, LINES, InnerLoop(0.1, 1))
    first, *_ = result.gradient
    result.gradient[first] = result.gradient[first].T.contiguous().T
    return loss_with_gradient(result, network)


def test_a_gradient_is_deposited_as_by_autograd() -> None:
    network = MLP(hidden_features=[4, 3])
    (loss_of(network) / 1).backward()  # type: ignore[no-untyped-call]
    expected = [p.grad for p in network.parameters()]
    network.zero_grad()
    assert deposit_gradient(loss_of(network) / 1)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert parameter.grad is not None and gradient is not None
        assert torch.equal(parameter.grad, gradient)
        assert parameter.grad.stride() == gradient.stride() == parameter.stride()


def test_autograd_is_left_what_a_deposit_would_change() -> None:
    network = MLP(hidden_features=[4])
    weight = next(network.parameters())
    others: list[Callable[[Tensor], Tensor]] = [
        lambda loss: loss,
        lambda loss: 2 * loss / 1,
        lambda loss: loss / 1 * 2,
        lambda loss: (loss + weight.sum()) / 1,
        lambda loss: loss / 1 + weight.sum(),
    ]
    for change in others:
        assert not deposit_gradient(change(loss_of(network)))
    watched = loss_of(network) / 1
    watched.register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]
    assert not deposit_gradient(watched)
    handle = weight.register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]
    assert not deposit_gradient(loss_of(network) / 1)
    handle.remove()
    weight.grad = torch.zeros_like(weight)
    assert not deposit_gradient(loss_of(network) / 1)
    assert all(p.grad is None for p in network.parameters() if p is not weight)
    weight.grad = None
    assert deposit_gradient(loss_of(network) / 1)


class TwiceTheLoss(MetaLearner):
    """A user's learner that changes the loss."""

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        return 2 * super().training_step(batch, batch_idx)


def test_a_loss_that_a_subclass_changes_has_its_own_gradient() -> None:
    weights = []
    for kind, lr in ((MetaLearner, 0.2), (TwiceTheLoss, 0.1)):
        torch.manual_seed(0)
        network = MLP(hidden_features=[4])
        sgd = partial(torch.optim.SGD, lr=lr)
        learner = kind(network, loss=mse_loss, inner_lr=0.1, optimizer=sgd)
        make_trainer(max_steps=3).fit(learner, datamodule=TaskDataModule(Lines(), 4, val_tasks=4))
        weights.append(network_weights(learner))
    torch.testing.assert_close(*weights)


class CountGradients(Callback):
    """A user's callback that sees every gradient of a parameter, as `wandb.watch` does."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        next(pl_module.parameters()).register_hook(self._count)  # type: ignore[no-untyped-call]

    def _count(self, gradient: Tensor) -> None:
        self.seen += 1


def test_hooks_of_parameters_are_called(tmp_path: Path) -> None:
    count = CountGradients()
    watched = train(tmp_path, count, accumulate_grad_batches=1)
    assert count.seen == 12
    plain = train(tmp_path, accumulate_grad_batches=1)
    assert torch.equal(network_weights(watched), network_weights(plain))


def test_a_batch_moves_as_its_tensors_do() -> None:
    batch = TaskBatch.stack([Lines().task(0, "train", index) for index in range(3)])
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, TaskBatch) and all(map(torch.equal, batch, moved))
    assert {tensor.device.type for tensor in batch.to(torch.device("meta"))} == {"meta"}
