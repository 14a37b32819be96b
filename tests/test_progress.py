"""What a person sees while training goes on."""

from collections.abc import Callable

import pytest
from pytorch_lightning import LightningModule, Trainer

from maml_pipeline.learner.progress import MetaStepProgressBar
from tests.conftest import CONFIGS


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
