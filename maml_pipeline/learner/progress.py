"""What a person sees while a run goes on, and when it has ended."""

import json
import sys
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from maml_pipeline.learner.meta_learner import MetaLearner


class MetaStepProgressBar(TQDMProgressBar):
    """Show the meta-steps done, their rate, the time left and the latest measures."""

    def __init__(self) -> None:
        # A file or a Slurm log keeps every line that a terminal would overwrite.
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 200)

    @property
    def total_train_batches(self) -> int | float:
        """Meta-steps of the whole training, also those before a resumed run started."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return float("inf")

    def init_train_tqdm(self) -> Tqdm:
        """Count in meta-steps."""
        bar = super().init_train_tqdm()
        bar.unit = " meta-steps"
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *args: object) -> None:
        """Start where a resumed run starts, so that its rate and time left are right."""
        super().on_train_epoch_start(trainer, *args)
        bar = self.train_progress_bar
        bar.set_description("Meta-training")
        bar.initial = bar.n = trainer.global_step * trainer.accumulate_grad_batches


class ResultTable(Callback):
    """Print the result of a test or validation as a table, one row an inner step.

    Args:
        folder: Where to write the same as `test.json` or `validate.json`; `None` for nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result over the test tasks."""
        self._show(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result over the validation tasks, unless training goes on after it."""
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module, "val")

    @rank_zero_only
    def _show(self, trainer: Trainer, learner: LightningModule, split: str) -> None:
        assert isinstance(learner, MetaLearner)
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
        result = {key: value for key, value in metrics.items() if key.startswith(f"{split}/")}
        result["meta_step"] = learner.global_step

        order = "first" if learner.inner.first_order else "second"
        table = Table(title=f"{split} after {learner.global_step} meta-steps, {order} order")
        table.add_column("inner steps", justify="right")
        for name in learner.measures:
            table.add_column(f"{name} ± 95 % CI", justify="right")
        for step in range(learner.eval_inner.steps + 1):
            cells = (f"{split}/{name}_step_{step}" for name in learner.measures)
            table.add_row(str(step), *(f"{result[c]:.4f} ± {result[f'{c}_ci95']:.4f}" for c in cells))
        Console().print(table)

        if self.folder is not None:
            (self.folder / f"{split}.json").write_text(json.dumps(result, indent=2) + "\n")
