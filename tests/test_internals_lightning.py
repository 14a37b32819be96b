"""Canaries: private parts of Lightning still do what this package relies on."""

import inspect
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, Timer, TQDMProgressBar
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor
from torch.utils.data import DataLoader

from maml_pipeline.learner import lightning_internals
from tests.helpers import make_trainer


class Regression(LightningModule):
    """The smallest module that trains, validates and tests."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layer(batch).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor) -> None:
        self.log("loss", 0.0)

    def test_step(self, batch: Tensor) -> None:
        self.log("loss", 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(batches: int = 12) -> DataLoader[Tensor]:
    return DataLoader(list(torch.ones(batches, 1, 1)), batch_size=None)  # type: ignore[arg-type]


@contextmanager
def still_holds(function: str) -> Iterator[None]:
    """Report any failure within the context as a change of Lightning."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"Lightning {version('pytorch-lightning')} changed what `{function}` relies on; "
            f"see learner/lightning_internals.py: {type(error).__name__}: {error}"
        )


class AskAfterBatch(Callback):
    """Records the result of a function after each batch, and whether a validation follows."""

    def __init__(self, function: str) -> None:
        self.function = getattr(lightning_internals, function)
        self.answers: list[bool] = []
        self.validated: list[bool] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.answers.append(self.function(trainer))
        self.steps.append(trainer.global_step)
        self.validated.append(False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated[-1] = True


def ask(function: str, **settings: Any) -> AskAfterBatch:
    asked = AskAfterBatch(function)
    make_trainer(callbacks=[asked], **settings).fit(Regression(), data(), data(2))
    return asked


class Actions(PassThroughProfiler):
    """Records the names of the profiled actions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def start(self, action_name: str) -> None:
        self.names.add(action_name)


class Empty(Callback):
    """Defines no hook."""


class OneHook(Callback):
    """Defines one hook of a batch."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass


class RegressionWithOneHook(Regression):
    """Defines one hook of a batch."""

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        pass


def test_skip_empty_hooks() -> None:
    with still_holds("skip_empty_hooks"):
        called: dict[bool, set[str]] = {}
        for skips in (False, True):
            actions, callbacks, module = Actions(), [Empty(), OneHook()], RegressionWithOneHook()
            if skips:
                lightning_internals.skip_empty_hooks([*callbacks, module])
            make_trainer(max_steps=2, profiler=actions, callbacks=callbacks).fit(module, data(), data(2))
            called[skips] = actions.names
        every = {
            f"{owner}.{hook}"
            for owner in (
                "[Callback]Empty",
                "[Callback]OneHook",
                f"[LightningModule]{type(module).__name__}",
            )
            for hook in lightning_internals.BATCH_HOOKS
        }
        defined = {
            "[Callback]OneHook.on_after_backward",
            "[LightningModule]RegressionWithOneHook.on_before_zero_grad",
        }
        assert called[False] - called[True] == every - defined
        assert called[True] <= called[False]


class SetAttributes(Regression):
    """Counts how often each attribute is set."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "counts" and "counts" in vars(self):
            self.counts[name] += 1


def test_current_hook() -> None:
    with still_holds("CURRENT_HOOK"):
        module = SetAttributes()
        make_trainer(max_steps=10).fit(module, data(), data(2))
        # It is the only attribute that Lightning sets in every batch; it reads it from the instance.
        often = [name for name, count in module.counts.items() if count >= 10]
        assert often == [lightning_internals.CURRENT_HOOK]
        assert lightning_internals.CURRENT_HOOK in vars(module)


def test_remember_signature() -> None:
    with still_holds("remember_signature"):
        received: list[int] = []

        class Receives(Regression):
            @lightning_internals.remember_signature
            def training_step(self, batch: Tensor, batch_idx: int = -1) -> Tensor:
                received.append(batch_idx)
                return super().training_step(batch)

        make_trainer(max_steps=3).fit(Receives(), data(), data(2))
        assert received == [0, 1, 2]
        # Lightning reads the remembered signature: without `batch_idx` in it, it passes none.
        step: Any = Receives.training_step
        step.__signature__ = inspect.signature(Regression.training_step)
        make_trainer(max_steps=3).fit(Receives(), data(), data(2))
        assert received[3:] == [-1, -1, -1]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 2, "val_check_interval": 5},
        {"max_steps": 10, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_epochs": 2, "check_val_every_n_epoch": 2},
    ],
)
def test_validates_next(settings: dict[str, Any]) -> None:
    with still_holds("validates_next"):
        asked = ask("validates_next", **settings)
        assert True in asked.answers and False in asked.answers
        assert asked.answers == asked.validated


def test_is_within_meta_step() -> None:
    with still_holds("is_within_meta_step"):
        asked = ask("is_within_meta_step", accumulate_grad_batches=3, max_epochs=1)
        assert asked.answers == [True, True, False] * 4
        assert asked.steps == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_ends_epoch() -> None:
    with still_holds("ends_epoch"):
        asked = ask("ends_epoch", limit_train_batches=4, max_epochs=2)
        assert asked.answers == [False, False, False, True] * 2


class Steps(DummyLogger):
    """Records the logged steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(kwargs.get("step"))


class SaveAfterBatch(Callback):
    """Saves a checkpoint in the same hook as `LastCheckpoint`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_align_logged_step(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    make_trainer(max_steps=3, callbacks=[SaveAfterBatch(path)]).fit(Regression(), data(), data(2))
    with still_holds("align_logged_step"):
        resumed = make_trainer(max_steps=3, log_every_n_steps=1, logger=(logger := Steps()))
        module = Regression()
        resumed.fit(module, data(), data(2), ckpt_path=path)
        resumed.test(module, data(2), verbose=False)
        lightning_internals.align_logged_step(resumed)
        resumed.test(module, data(2), verbose=False)
        # If the first is 3, Lightning has fixed its count, and the function can be removed.
        assert logger.steps == [2, 3]


class Handlers(Callback):
    """Records the handler of SIGTERM during training."""

    handler: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lightning_internals.disable_signal_handlers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)


def test_disable_signal_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with still_holds("disable_signal_handlers"):
        seen = Handlers()
        make_trainer(max_steps=1, callbacks=[seen]).fit(Regression(), data(), data(2))
        assert seen.handler == before


@pytest.mark.parametrize(
    ("strategy", "expected"), [("auto", True), ("ddp", True), ("ddp_spawn", False), ("ddp_fork", False)]
)
def test_starts_ranks_by_script(strategy: str, expected: bool) -> None:
    with still_holds("starts_ranks_by_script"):
        several = {} if strategy == "auto" else {"devices": 2}
        built = make_trainer(strategy=strategy, **several)
        assert lightning_internals.starts_ranks_by_script(built) is expected


def test_launched_processes() -> None:
    with still_holds("launched_processes"):
        assert lightning_internals.launched_processes(make_trainer(devices=1)) == []
        launcher: Any = make_trainer(strategy="ddp", devices=2).strategy.launcher
        assert launcher.procs == [], "the launcher keeps its processes in `procs`"


def test_chosen_cluster_environment() -> None:
    with still_holds("chosen_cluster_environment"):
        given = SLURMEnvironment(auto_requeue=False)
        assert lightning_internals.chosen_cluster_environment(make_trainer(plugins=[given])) is given
        assert isinstance(
            lightning_internals.chosen_cluster_environment(make_trainer()), LightningEnvironment
        )


@pytest.mark.parametrize(("given", "expected"), [(True, True), (False, False), (None, False)])
def test_checks_at_epoch_end(given: bool | None, expected: bool) -> None:
    with still_holds("checks_at_epoch_end"):
        callback = EarlyStopping("loss", check_on_train_epoch_end=given)
        assert lightning_internals.checks_at_epoch_end(callback) is expected


class CountChecks(EarlyStopping):
    """Counts its comparisons after validations and at the ends of epochs."""

    def __init__(self) -> None:
        super().__init__("loss", patience=10**6)
        self.after_validation = self.after_epoch = 0

    def setup(self, *args: Any, **kwargs: Any) -> None:
        super().setup(*args, **kwargs)
        lightning_internals.check_after_validation(self)

    def on_validation_end(self, *args: Any) -> None:
        before = self.wait_count
        super().on_validation_end(*args)
        self.after_validation += self.wait_count != before

    def on_train_epoch_end(self, *args: Any) -> None:
        before = self.wait_count
        super().on_train_epoch_end(*args)
        self.after_epoch += self.wait_count != before


def test_check_after_validation() -> None:
    with still_holds("check_after_validation"):
        callback = CountChecks()
        make_trainer(max_epochs=2, val_check_interval=4, callbacks=[callback]).fit(
            Regression(), data(), data(2)
        )
        # The first of the six validations sets the best value, which the others do not improve on.
        assert (callback.after_validation, callback.after_epoch) == (5, 0)


def test_checks_every_step() -> None:
    with still_holds("checks_every_step"):
        assert lightning_internals.checks_every_step(Timer(interval="step"))
        assert not lightning_internals.checks_every_step(Timer(interval="epoch"))


def test_close_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with still_holds("close_progress_bars"):
        progress = TQDMProgressBar()
        lightning_internals.close_progress_bars(progress)  # none is open
        make_trainer(max_steps=1, enable_progress_bar=True, callbacks=[progress]).fit(
            Regression(), data(), data(2)
        )
        progress.train_progress_bar.disable = False
        lightning_internals.close_progress_bars(progress)
        assert progress.train_progress_bar.disable


def test_every_function_has_a_canary() -> None:
    functions = {
        name
        for name, value in vars(lightning_internals).items()
        if inspect.isfunction(value) and value.__module__ == lightning_internals.__name__
    }
    assert {f"test_{name}" for name in functions} <= globals().keys()
