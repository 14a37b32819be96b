"""Lightning's metrics on their way to W&B: one row a meta-step, each once, whatever happens."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger

from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.learner.metrics_csv import read_metrics
from maml_pipeline.learner.tracking.description import describe, provenance
from maml_pipeline.learner.tracking.logs import STEP_METRIC, last_logged_step
from maml_pipeline.learner.tracking.session import (
    choose_wandb_mode,
    claim_wandb_id,
    first_line,
    new_wandb_id,
    read_wandb_id,
    start_wandb_run,
)

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
        self._summaries: dict[str, str] = {}
        self._extremes: dict[str, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the config is there from the beginning."""

    def begin(self, trainer: Trainer, learner: MetaLearner, goes_back: bool) -> None:
        """Start the W&B run where training stands, or go on with it; only the first call does.

        Args:
            trainer: It knows the devices and the meta-step.
            learner: It knows the metrics.
            goes_back: Whether what was trained after this meta-step is given up.
        """
        if self._has_begun:
            return
        self._has_begun = True
        try:
            self._begin(trainer, learner, goes_back)
        except Exception as error:
            self._give_up(error)

    def _begin(self, trainer: Trainer, learner: MetaLearner, goes_back: bool) -> None:
        mode = choose_wandb_mode(self.folder)
        if mode == "disabled":
            return
        run_id = read_wandb_id(self.folder)
        known = -1 if run_id is None else last_logged_step(self.folder, run_id)
        if run_id is None or (goes_back and known is not None and known >= trainer.global_step):
            # W&B takes nothing back: what is trained again from an earlier meta-step is another run.
            run_id, known = new_wandb_id(earlier=run_id), -1
        claim_wandb_id(self.folder, run_id)
        about = describe(self.config, trainer.world_size)
        made = provenance(trainer.strategy.root_device, trainer.world_size)
        self.run = start_wandb_run(self.folder, run_id, mode, about, {**self.config, "made_with": made})
        if self.run.id != run_id:  # W&B's own settings decide in the end
            claim_wandb_id(self.folder, self.run.id)
        self._summaries = _define_metrics(self.run, learner, self.config["run"])
        if self.run.resumed:  # online; else what is on this disk is all there is
            known = self.run.starting_step - 1
        # No log at all: the earlier ones were uploaded and cleaned away.
        self._logged_until = trainer.global_step - 1 if known is None else known
        self._fill_in(trainer.global_step)

    def _fill_in(self, before: int) -> None:
        """Log the rows of `metrics.csv` that a killed process could not hand over."""
        for row in read_metrics(self.folder / "metrics.csv"):
            step = int(row.pop("step"))
            if step < before:
                self.log_metrics(row, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a meta-step; those that come together are one row."""
        if self.run is None or step is None:
            return
        self._note_extremes(metrics)
        if step <= self._logged_until:
            return
        # One endless epoch: its number says nothing.
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        try:
            # W&B's own step is the same number: left alone, it begins at 0 again in a resumed run.
            self.run.log({**row, STEP_METRIC: step}, step=step)
        except Exception as error:
            self._give_up(error)

    def _note_extremes(self, metrics: Mapping[str, float]) -> None:
        for name in self._summaries.keys() & metrics.keys():
            value, known = float(metrics[name]), self._extremes.setdefault(name, {})
            known["last"] = value
            for kind, better in (("min", min), ("max", max)):
                if kind in self._summaries[name] and math.isfinite(value):
                    known[kind] = better(value, known.get(kind, value))

    def finalize(self, status: str) -> None:
        """Set the summaries of the whole run: offline, W&B's own are of this process alone."""
        if self.run is None or not self._extremes:
            return
        try:
            self.run.log({}, commit=True)  # the row at hand, which would come after them otherwise
            self.run.summary.update(self._extremes)
        except Exception as error:
            self._give_up(error)

    def uploads_artifacts(self, asked: bool | None) -> bool:
        """Tell whether files are attached: as asked, or where the run is online."""
        return self.run is not None and (asked if asked is not None else not self.run.offline)

    def upload_artifact(self, kind: str, path: Path) -> None:
        """Attach a file, or a folder with all that is in it, to the W&B run.

        Args:
            kind: `model` or `report`: the artifact's type, and the beginning of its name.
            path: It stays where it is; `maml sync` uploads it from there.
        """
        import wandb

        assert self.run is not None
        try:
            artifact = wandb.Artifact(f"{kind}-{self.run.id}", type=kind)
            if path.is_dir():
                artifact.add_dir(str(path), policy="immutable")
            else:
                artifact.add_file(str(path), policy="immutable")
            self.run.log_artifact(artifact)
        except Exception as error:
            logger.warning("%s is not attached to the W&B run (%s)", path, first_line(error))

    def _give_up(self, error: Exception) -> None:
        self.run = None
        logger.warning("W&B gets no more of this run (%s); metrics.csv has all of it", first_line(error))


class StartTracking(Callback):
    """Starts W&B once the trainer knows its devices and where it stands."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start before the first meta-step."""
        self._begin(trainer, pl_module, goes_back=Path(str(trainer.ckpt_path)).name == "best.ckpt")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start before the test of a run that had nothing left to train."""
        self._begin(trainer, pl_module, goes_back=False)

    def _begin(self, trainer: Trainer, learner: LightningModule, goes_back: bool) -> None:
        assert isinstance(learner, MetaLearner)
        for tracker in trainer.loggers:
            if isinstance(tracker, WandbTracker):
                tracker.begin(trainer, learner, goes_back)


def _define_metrics(
    run: "wandb.Run", learner: MetaLearner, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Set every metric's axis, and what the summaries keep besides the last value.

    Returns:
        The latter, by metric.
    """
    monitored = str(settings["monitor"]).partition("/")[2]
    names = [f"train/{measure}" for measure in learner.measures]
    names += [name for name in learner.evaluation_names("val") if not name.endswith("_ci95")]
    summaries = {}
    for name in names:
        measure = re.sub(r"_step_\d+$", "", name.partition("/")[2])
        best = {"loss": "min", "accuracy": "max", monitored: settings["mode"]}.get(measure, "min,max")
        summaries[name] = f"{best},last"
    run.define_metric(STEP_METRIC)
    run.define_metric("*", step_metric=STEP_METRIC)
    for name, summary in summaries.items():
        run.define_metric(name, step_metric=STEP_METRIC, summary=summary)
    return summaries
