"""Lightning's metrics on their way to W&B: one row a meta-step, each once, whatever happens."""

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger

from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.learner.tracking.description import describe, surroundings
from maml_pipeline.learner.tracking.logs import AXIS, last_logged
from maml_pipeline.learner.tracking.session import begin, wandb_id, wanted_mode

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)


class WandbTracker(Logger):
    """Hands every metric to W&B against `meta_step`, and never fails a training.

    A resumed run goes on under the folder's id. What W&B has already is not logged again, and what
    a killed process could not write is filled in from `metrics.csv`: meta-steps only ever increase.

    Args:
        folder: The run's folder.
        config: The whole resolved config.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__()
        self.folder = folder
        self.config = config
        self.run: wandb.Run | None = None
        self._has_begun = False
        self._logged_until = -1

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the config is there from the beginning."""

    def begin(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Start the W&B run where training stands, or go on with it; only the first call does."""
        if self._has_begun:
            return
        self._has_begun = True
        try:
            self._begin(trainer, learner)
        except Exception as error:
            self._give_up(error)

    def _begin(self, trainer: Trainer, learner: MetaLearner) -> None:
        mode = wanted_mode(self.folder)
        if mode == "disabled":
            return
        run_id = wandb_id(self.folder)
        known = last_logged(self.folder, run_id)
        goes_back = Path(str(trainer.ckpt_path)).name == "best.ckpt"
        if goes_back and known is not None and known >= trainer.global_step:
            # W&B takes nothing back: what is trained anew from there is another run.
            run_id, known = wandb_id(self.folder, renew=True), -1
        about = describe(self.config, trainer.world_size)
        made = surroundings(trainer.strategy.root_device, trainer.world_size)
        self.run = begin(self.folder, run_id, mode, about, {**self.config, "made_with": made})
        _define_metrics(self.run, learner, self.config["run"])
        if self.run.resumed:  # online; else what is on this disk is all there is
            known = self.run.step - 1
        # No log at all: the earlier ones were uploaded and cleaned away.
        self._logged_until = trainer.global_step - 1 if known is None else known
        self._fill_in(trainer.global_step)

    def _fill_in(self, before: int) -> None:
        """Log the rows of `metrics.csv` that a killed process could not hand over."""
        table = self.folder / "metrics.csv"
        if before - 1 <= self._logged_until or not table.exists():
            return
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                if step < before:
                    self.log_metrics({key: float(value) for key, value in row.items() if value}, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a meta-step; those that come together are one row."""
        if self.run is None or step is None or step <= self._logged_until:
            return
        # One endless epoch: its number says nothing.
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        try:
            # W&B's own step is the same number: left alone, it begins at 0 again in a resumed run.
            self.run.log({**row, AXIS: step}, step=step)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("W&B gets no more of this run (%s); metrics.csv has all of it", reason)


class BeginTracking(Callback):
    """Starts W&B once the trainer knows its devices and where it stands."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start before the first meta-step."""
        self._begin(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start before the test of a run that had nothing left to train."""
        self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, learner: LightningModule) -> None:
        assert isinstance(learner, MetaLearner)
        for tracker in trainer.loggers:
            if isinstance(tracker, WandbTracker):
                tracker.begin(trainer, learner)


def _define_metrics(run: "wandb.Run", learner: MetaLearner, settings: Mapping[str, Any]) -> None:
    """Set every metric's axis, and what its summary keeps besides the last value."""
    run.define_metric(AXIS)
    run.define_metric("*", step_metric=AXIS)
    monitored = str(settings["monitor"]).partition("/")[2]
    names = [f"train/{measure}" for measure in learner.measures]
    names += [name for name in learner.evaluation_names("val") if not name.endswith("_ci95")]
    for name in names:
        measure = name.partition("/")[2].partition("_step_")[0]
        best = {"loss": "min", "accuracy": "max", monitored: settings["mode"]}.get(measure, "min,max")
        run.define_metric(name, step_metric=AXIS, summary=f"{best},last")
