"""What a person sees while training goes on."""

from collections.abc import Callable
from typing import Any

import pytest
from pytorch_lightning import LightningModule, Trainer

from maml_pipeline.learner.progress import MetaStepProgressBar
from tests.helpers import CONFIGS


def test_a_log_shows_the_meta_step_of_every_validation(
    maml: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[float] = []
    original = MetaStepProgressBar.on_validation_end

    def spy(self: MetaStepProgressBar, trainer: Trainer, module: LightningModule) -> None:
        original(self, trainer, module)
        shown.append(self.train_progress_bar.n)

    monkeypatch.setattr(MetaStepProgressBar, "on_validation_end", spy)
    settings = ("--trainer.max_steps", 60, "--trainer.val_check_interval", 20, "--data.val_tasks", 2)
    maml("fit", "--config", CONFIGS / "toy.yaml", *settings, "--data.test_tasks", 2)
    assert shown == [20, 40, 60]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_bar_of_a_resumed_run_has_its_total_and_its_own_rate(
    maml: Callable[..., str], monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    shown: list[Any] = []
    original = MetaStepProgressBar.on_train_batch_end

    def spy(self: MetaStepProgressBar, *args: Any) -> None:
        original(self, *args)
        shown.append(self.train_progress_bar.format_dict)

    monkeypatch.setattr(MetaStepProgressBar, "on_train_batch_end", spy)
    run = (
        *("fit", "--config", CONFIGS / "toy.yaml", "--run.dir", "run", "--data.test_tasks", 2),
        *("--trainer.limit_val_batches", 0, "--trainer.accumulate_grad_batches", accumulate),
    )
    maml(*run, "--trainer.max_steps", 20)
    shown.clear()
    maml(*run, "--trainer.max_steps", 60, "--ckpt_path", "last")
    assert len(shown) == 40 * accumulate
    for batches, bar in enumerate(shown, 1):
        # tqdm's rate is (n - initial) / elapsed, and the time left (total - n) / rate.
        assert (bar["prefix"], bar["unit"]) == ("Meta-training", " meta-steps")
        assert (bar["initial"], bar["n"], bar["total"]) == (20, 20 + batches // accumulate, 60)
