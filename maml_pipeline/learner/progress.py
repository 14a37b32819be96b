"""What a person sees while a run goes on, and when it has ended."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.table import Table

from maml_pipeline.files import write_atomically
from maml_pipeline.learner.meta_learner import MetaLearner


class MetaStepProgressBar(TQDMProgressBar):
    """Show the meta-steps done, their rate, the time left and the latest measures.

    Redrawn by the clock and not by the step: reading a measure off a GPU waits for the GPU, and a
    Slurm log keeps every line that a terminal would overwrite.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_terminal = sys.stdout.isatty()
        self.seconds_between = 0.2 if self.on_terminal else 30.0
        self.drawn_at = 0.0

    def init_train_tqdm(self) -> Tqdm:
        """Count in meta-steps, from where a resumed run starts: its rate and time left are its own."""
        steps = self.trainer.max_steps
        return Tqdm(
            desc="Meta-training",
            unit=" meta-steps",
            initial=self.trainer.global_step,
            total=steps if steps > 0 else None,
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def init_validation_tqdm(self) -> Tqdm:
        """Draw validation's own bar on a terminal only."""
        return super().init_validation_tqdm() if self.on_terminal else Tqdm(disable=True)

    def init_test_tqdm(self) -> Tqdm:
        """Draw the test's own bar on a terminal only."""
        return super().init_test_tqdm() if self.on_terminal else Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: Trainer, *args: object) -> None:
        """Leave the bar as it is: Lightning's restarts it, and not in a run that is resumed."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Redraw when it is time, and at the end."""
        self.train_progress_bar.n = trainer.global_step  # which validation's redrawing shows, too
        now = time.monotonic()
        if now - self.drawn_at >= self.seconds_between or trainer.global_step == trainer.max_steps:
            self.drawn_at = now
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_exception(self, trainer: Trainer, *args: object) -> None:
        """End the bar's line, so that the error stands on one of its own."""
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leave out the logger's version number, which says nothing about training."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


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
        trained = learner.loaded_meta_step if trainer.ckpt_path else trainer.global_step
        result["meta_step"] = trained

        order = "first" if learner.inner.first_order else "second"
        table = Table()
        table.add_column("inner steps", justify="right")
        for name in learner.measures:
            table.add_column(f"{name} ± 95 % CI", justify="right")
        for step in range(learner.eval_inner.steps + 1):
            cells = (f"{split}/{name}_step_{step}" for name in learner.measures)
            table.add_row(str(step), *(f"{result[c]:.4f} ± {result[f'{c}_ci95']:.4f}" for c in cells))
        console = Console()
        console.print(f"{split.capitalize()} after {trained} meta-steps, {order} order", highlight=False)
        console.print(table)

        if self.folder is not None:
            write_atomically(self.folder / f"{split}.json", json.dumps(result, indent=2) + "\n")
