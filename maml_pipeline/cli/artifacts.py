"""The best checkpoint and a report as artifacts of the W&B run."""

import logging
from pathlib import Path

from pytorch_lightning import Trainer

from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking import WandbTracker

logger = logging.getLogger(__name__)


def attach_artifacts(trainer: Trainer, best: str, asked: bool | None) -> None:
    """Attach the best checkpoint and a report to the W&B run, where that is wanted.

    Args:
        trainer: It has finished.
        best: Path of the best checkpoint; empty where nothing was validated.
        asked: `run.artifacts`.
    """
    for tracker in trainer.loggers:
        if isinstance(tracker, WandbTracker) and tracker.uploads_artifacts(asked):
            # Late: Matplotlib takes a while to import.
            from maml_pipeline.report.page import write_report
            from maml_pipeline.runs.find import find_runs
            from maml_pipeline.runs.folder import REPORT

            if best:
                tracker.upload_artifact("model", Path(best))
            try:
                report = write_report(find_runs([tracker.folder]).runs, tracker.folder / REPORT)
            except UserError as error:  # the run is finished, and its result is kept
                logger.warning("no report is attached to the W&B run: %s", error)
            else:
                tracker.upload_artifact("report", report.parent)
