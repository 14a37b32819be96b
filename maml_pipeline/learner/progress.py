"""The progress bar of a training."""

import sys
import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.utilities.types import STEP_OUTPUT


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
