"""The progress bar of training: meta-steps done, rate, time left and the latest measures."""

import sys
import time
from collections.abc import Callable
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.utilities.types import STEP_OUTPUT

from maml_pipeline.learner import lightning_internals
from maml_pipeline.learner.meta_learner import MetaLearner

NARROWEST_BAR = 8
"""Fewest columns of the bar; measures that would leave it fewer are not shown."""


class MetaStepProgressBar(TQDMProgressBar):
    """Show the meta-steps done, their rate, the time left and the latest measures.

    The rate is that of this process without the first meta-step of each gradient order, in which
    caches fill. It includes validations.

    The bar is redrawn at intervals, not in every meta-step: reading a measure from a GPU waits for the
    GPU, and a Slurm log keeps every line that a terminal would overwrite.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.clock = clock
        self.on_terminal = sys.stdout.isatty()
        self.seconds_between = 0.2 if self.on_terminal else 30.0
        self.drawn_at = float("-inf")
        self._measured_from: tuple[int, float] | None = None
        self._orders_seen: set[bool] = set()
        self._first_step = 0

    def init_train_tqdm(self) -> Tqdm:
        """Build the bar; it starts at the meta-step from which a run is resumed."""
        steps = self.trainer.max_steps
        return Tqdm(
            initial=self.trainer.global_step,
            total=steps if steps > 0 else None,
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format="Meta-step {n_fmt}/{total_fmt} |{bar}| {desc}"
            if steps > 0
            else "Meta-step {n_fmt} {desc}",
        )

    def init_validation_tqdm(self) -> Tqdm:
        """Draw the bar of a validation on a terminal only."""
        return self._evaluation_bar("Validation", position=int(self.trainer.state.fn == "fit"))

    def init_test_tqdm(self) -> Tqdm:
        """Draw the bar of a test on a terminal only."""
        return self._evaluation_bar("Test", position=0)

    def _evaluation_bar(self, name: str, position: int) -> Tqdm:
        """Build a bar that counts batches of tasks and disappears at the end.

        Args:
            name: The first word of the line.
            position: Lines below the bar of training.
        """
        return Tqdm(
            position=2 * self.process_position + position,
            disable=self.is_disabled or not self.on_terminal,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=f"{name}: batch {{n_fmt}}/{{total_fmt}} |{{bar}}| {{remaining}} left",
        )

    def on_train_epoch_start(self, trainer: Trainer, *args: object) -> None:
        """Keep the bar, which Lightning would restart at every epoch."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restart the rate when the gradient order changes."""
        first_order = isinstance(pl_module, MetaLearner) and pl_module.takes_first_order()
        if first_order in self._orders_seen:
            return
        self._orders_seen.add(first_order)
        self._measured_from, self._first_step = None, trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Redraw at intervals, and at the end."""
        now, step = self.clock(), trainer.global_step
        self.train_progress_bar.n = step
        if self._measured_from is None and step > self._first_step:
            self._measured_from = (step, now)
        if now - self.drawn_at >= self.seconds_between or step == trainer.max_steps:
            self.drawn_at = now
            self._draw(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the results of the validation."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module)

    def on_exception(self, *args: object) -> None:
        """End the bar's line, so that the error is printed on its own line."""
        lightning_internals.close_progress_bars(self)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leave out the logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bar = self.train_progress_bar
        if bar.disable:
            return
        speed = self._speed(trainer)
        values = self.get_metrics(trainer, pl_module).items()
        measures = [f"{name.removeprefix('train/')} {float(value):.3g}" for name, value in values]
        width = bar.format_dict["ncols"]
        counts = len(f"Meta-step {bar.n}/{bar.total} || ")
        room = None if width is None else width - counts - NARROWEST_BAR
        bar.set_description_str(_joined(speed, measures, room))

    def _speed(self, trainer: Trainer) -> list[str]:
        """Return the rate and the time left, once they are known."""
        if self._measured_from is None:
            return []
        step, start = self._measured_from
        steps, seconds = trainer.global_step - step, self.clock() - start
        if steps == 0 or seconds <= 0:
            return []
        rate = steps / seconds
        shown = [f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"]
        if trainer.max_steps > 0:
            left = (trainer.max_steps - trainer.global_step) / rate
            shown.append(f"{Tqdm.format_interval(left)} left")
        return shown


def _joined(speed: list[str], measures: list[str], room: int | None) -> str:
    """Join the rate, the time left and as many measures as fit.

    Args:
        speed: Always shown.
        measures: In order; those that do not fit are left out.
        room: Columns; `None` for any number.
    """
    text = ", ".join(speed)
    for measure in measures:
        longer = f"{text}, {measure}" if text else measure
        if room is None or len(longer) <= room:
            text = longer
    return text
