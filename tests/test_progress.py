"""The progress bar: meta-steps, rate and time left."""

import re
import sys
from collections.abc import Callable
from io import StringIO
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pytorch_lightning import Callback, Trainer
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner
from maml_pipeline.learner.progress_bar import MetaStepProgressBar
from maml_pipeline.networks import MLP
from tests.helpers import CONFIGS


def test_a_log_shows_the_meta_step_of_every_validation(maml: Callable[..., str]) -> None:
    settings = ("--trainer.max_steps", 60, "--trainer.val_check_interval", 20, "--data.val_tasks", 2)
    printed = maml("fit", "--config", CONFIGS / "toy.yaml", *settings, "--data.test_tasks", 2)
    shown = re.findall(r"Meta-step (\d+)/60 ", printed)
    assert {"20", "40", "60"} <= set(shown)


class FakeTime:
    """A clock that is advanced by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A trainer, a learner and a bar of a terminal of some width, without training."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, columns: int, max_steps: int, step: int = 0
    ) -> None:
        self.time = FakeTime()
        self.first_order = False
        self.bar = MetaStepProgressBar(self.time)
        self.bar.seconds_between = 0.0
        self.learner = MetaLearner(MLP(hidden_features=[2]), loss=mse_loss, inner_lr=0.1)
        self.trainer: Any = SimpleNamespace(global_step=step, max_steps=max_steps)
        self.metrics: dict[str, float] = {}
        monkeypatch.setattr(MetaStepProgressBar, "trainer", self.trainer)
        monkeypatch.setattr(self.bar, "get_metrics", lambda *_: self.metrics)
        monkeypatch.setattr(MetaLearner, "takes_first_order", lambda _: self.first_order)
        self.screen = StringIO()
        monkeypatch.setattr("sys.stdout", self.screen)
        self.bar.train_progress_bar = self.bar.init_train_tqdm()
        tqdm: Any = self.bar.train_progress_bar
        tqdm.dynamic_ncols = lambda _: (columns, 24)

    def meta_step(self, seconds: float) -> None:
        self.bar.on_train_batch_start(self.trainer, self.learner, None, 0)
        self.time.now += seconds
        self.trainer.global_step += 1
        self.bar.on_train_batch_end(self.trainer, self.learner, None, None, 0)

    def line(self) -> str:
        return str(self.bar.train_progress_bar)


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, ["10/s", "33:18 left", "loss 0.312", "val/loss 0.298"]),
        (120, ["10/s", "33:18 left", "loss 0.312", "val/loss 0.298", "val/accuracy 0.953"]),
    ],
)
def test_the_bar_is_readable_in_a_terminal(
    columns: int, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch, columns, max_steps=20000)
    terminal.metrics = {
        "train/loss": 0.31234567,
        "val/loss": 0.29841,
        "val/accuracy": 0.95312,
    }
    for _ in range(20):
        terminal.meta_step(0.1)
    line = terminal.line()
    count, bar, text = line.split("|")
    assert count == "Meta-step 20/20000 "
    assert len(bar) >= 8 and len(line) == columns
    assert text.strip().split(", ") == shown


def test_rate_and_time_left_leave_out_the_first_meta_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 120, max_steps=120, step=100)  # resumed
    terminal.meta_step(35.0)
    assert "left" not in terminal.line()
    for _ in range(10):
        terminal.meta_step(0.5)
    assert terminal.line().endswith("| 2/s, 00:04 left")


def test_the_rate_is_measured_separately_for_each_gradient_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal(monkeypatch, 120, max_steps=100)
    terminal.first_order = True
    for _ in range(50):
        terminal.meta_step(0.25)
    terminal.first_order = False
    for seconds in (60.0, *[2.0] * 9):
        terminal.meta_step(seconds)
    assert terminal.line().endswith("| 2 s each, 01:20 left")


class RecordBar(Callback):
    """Records the progress bar before each batch."""

    shown: ClassVar[list[tuple[int, int, int]]] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        progress: Any = trainer.progress_bar_callback
        bar = progress.train_progress_bar.format_dict
        self.shown.append((bar["initial"], bar["n"], bar["total"]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_bar_of_a_resumed_run_starts_at_its_meta_step(
    maml: Callable[..., str], accumulate: int
) -> None:
    run = (
        *("fit", "--config", CONFIGS / "toy.yaml", "--run.dir", "run", "--data.test_tasks", 2),
        *("--trainer.limit_val_batches", 0, "--trainer.accumulate_grad_batches", accumulate),
        *("--trainer.callbacks", "tests.test_progress.RecordBar"),
    )
    maml(*run, "--trainer.max_steps", 20)
    RecordBar.shown.clear()
    printed = maml(*run, "--trainer.max_steps", 60, "--ckpt_path", "last")
    batches = range(40 * accumulate)
    assert RecordBar.shown == [(20, 20 + batch // accumulate, 60) for batch in batches]
    assert "Meta-step 60/60 " in printed


@pytest.mark.parametrize(
    ("command", "drawn"),
    [("fit", ["Validation", "Test"]), ("validate", ["Validation"]), ("test", ["Test"])],
)
def test_a_terminal_shows_a_short_bar_of_each_evaluation_and_leaves_none(
    command: str, drawn: list[str], maml: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    tasks = ("--data.val_tasks", 20, "--data.test_tasks", 20)
    steps = ("--trainer.max_steps", 20, "--trainer.val_check_interval", 20)
    printed = maml(command, "--config", CONFIGS / "toy.yaml", *tasks, *steps)
    assert "DataLoader" not in printed and "Testing" not in printed
    lines = re.split(r"[\r\n]|\x1b\[A", printed)
    for name in drawn:
        bars = [line for line in lines if line.startswith(f"{name}: ")]
        assert any(re.match(rf"{name}: batch 3/3 +\|█+\| 00:00 left", bar) for bar in bars)
        assert max(map(len, bars)) <= 80
    assert {line.partition(":")[0] for line in lines if ": batch" in line} == {*drawn}
    # The last bar is erased before the result is printed.
    before = printed[: printed.index(" of ")].splitlines()[-1].rpartition("\r")[0]
    assert before.rpartition("\r")[2].strip() == ""
