"""Logging metrics to W&B: one row per meta-step, exactly once, also after the process was killed."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger

from maml_pipeline.errors import first_line
from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.learner.tracking.description import describe_run, provenance
from maml_pipeline.learner.tracking.logs import STEP_METRIC, last_logged_step
from maml_pipeline.learner.tracking.run_id import claim_wandb_id, new_wandb_id, read_wandb_id
from maml_pipeline.learner.tracking.session import choose_wandb_mode, start_wandb_run
from maml_pipeline.metrics_table import read_metrics

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)


class WandbTracker(Logger):
    """Log every metric to W&B against `meta_step`; an error of W&B never fails the run.

    A resumed run keeps its W&B id. Rows that W&B has are not logged again, and rows that a killed
    process could not write are filled in from the metrics table, so meta-steps always increase.

    Args:
        folder: The run's folder, where W&B writes its files.
        config: The resolved config.
        id_file: The file that holds the id of the W&B run.
        metrics_file: The run's metrics table.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], *, id_file: Path, metrics_file: Path
    ) -> None:
        super().__init__()
        self.folder = folder
        self.id_file = id_file
        self.metrics_file = metrics_file
        self.config = config
        self.run: wandb.Run | None = None
        self._has_started = False
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
        """Log nothing: W&B gets the config when the run starts."""

    def start(self, trainer: Trainer, learner: MetaLearner, discards_later: bool) -> None:
        """Start or resume the W&B run at the current meta-step; only the first call has an effect.

        Args:
            trainer: The trainer, which knows the devices and the current meta-step.
            learner: The learner, which knows the names of the metrics.
            discards_later: Whether logged meta-steps after the current one are discarded, as when the
                run resumes from its best checkpoint.
        """
        if self._has_started:
            return
        self._has_started = True
        try:
            self._start(trainer, learner, discards_later)
        except Exception as error:
            self._give_up(error)

    def _start(self, trainer: Trainer, learner: MetaLearner, discards_later: bool) -> None:
        mode = choose_wandb_mode(self.folder)
        if mode == "disabled":
            return
        run_id = read_wandb_id(self.id_file)
        known = -1 if run_id is None else last_logged_step(self.folder, run_id)
        if run_id is None or (discards_later and known is not None and known >= trainer.global_step):
            # W&B cannot remove rows: training again from an earlier meta-step is a new W&B run.
            run_id, known = new_wandb_id(earlier=run_id), -1
        claim_wandb_id(self.id_file, run_id)
        about = describe_run(self.config, trainer.world_size)
        made = provenance(trainer.strategy.root_device, trainer.world_size)
        self.run = start_wandb_run(self.folder, run_id, mode, about, {**self.config, "made_with": made})
        if self.run.id != run_id:  # W&B's settings take precedence
            claim_wandb_id(self.id_file, self.run.id)
        self._summaries = _define_metrics(self.run, learner, self.config["run"])
        if self.run.resumed:  # online: the server knows
            known = self.run.starting_step - 1
        # No log: the earlier ones were uploaded and removed.
        self._logged_until = trainer.global_step - 1 if known is None else known
        self._fill_in(trainer.global_step)

    def _fill_in(self, before: int) -> None:
        """Log the rows of the metrics table that W&B lacks because a process was killed."""
        for row in read_metrics(self.metrics_file):
            step = int(row.pop("step"))
            if step < before:
                self.log_metrics(row, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a meta-step; calls for the same meta-step share one row."""
        if self.run is None or step is None:
            return
        self._update_extremes(metrics)
        if step <= self._logged_until:
            return
        # Lightning adds the epoch, of which there is only one.
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        try:
            # W&B's own step would restart at 0 in a resumed run.
            self.run.log({**row, STEP_METRIC: step}, step=step)
        except Exception as error:
            self._give_up(error)

    def _update_extremes(self, metrics: Mapping[str, float]) -> None:
        for name in self._summaries.keys() & metrics.keys():
            value, known = float(metrics[name]), self._extremes.setdefault(name, {})
            known["last"] = value
            for kind, better in (("min", min), ("max", max)):
                if kind in self._summaries[name] and math.isfinite(value):
                    known[kind] = better(value, known.get(kind, value))

    def finalize(self, status: str) -> None:
        """Set the summaries of the whole run; W&B's own, offline, cover this process only."""
        if self.run is None or not self._extremes:
            return
        try:
            self.run.log({}, commit=True)  # write the current row before the summary
            self.run.summary.update(self._extremes)
        except Exception as error:
            self._give_up(error)

    def uploads_artifacts(self, setting: bool | None) -> bool:
        """Tell whether to upload artifacts: as set by `run.artifacts`, or if the run is online."""
        return self.run is not None and (setting if setting is not None else not self.run.offline)

    def upload_artifact(self, kind: str, path: Path) -> None:
        """Add a file, or a folder with its contents, to the W&B run as an artifact.

        Args:
            kind: The artifact's type and the prefix of its name: `model` or `report`.
            path: The file or folder. Offline, `maml sync` uploads it from this path later.
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
            logger.warning("%s was not added to the W&B run (%s)", path, first_line(error))

    def _give_up(self, error: Exception) -> None:
        self.run = None
        logger.warning(
            "W&B logging stopped (%s); %s has all metrics", first_line(error), self.metrics_file
        )


class StartTracking(Callback):
    """Start W&B once the trainer knows its devices and the current meta-step.

    Args:
        best_checkpoint: Path of the run's best checkpoint. Resuming from it discards later meta-steps.
    """

    def __init__(self, best_checkpoint: Path) -> None:
        self.best_checkpoint = best_checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start before the first meta-step."""
        is_best = Path(str(trainer.ckpt_path)).name == self.best_checkpoint.name
        self._start(trainer, pl_module, discards_later=is_best)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start before the test of a run that needs no more training."""
        self._start(trainer, pl_module, discards_later=False)

    def _start(self, trainer: Trainer, learner: LightningModule, discards_later: bool) -> None:
        assert isinstance(learner, MetaLearner)
        for tracker in trainer.loggers:
            if isinstance(tracker, WandbTracker):
                tracker.start(trainer, learner, discards_later)


def _define_metrics(
    run: "wandb.Run", learner: MetaLearner, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Define every metric's x-axis and summary.

    Returns:
        The summary by metric, such as `min,last`.
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
