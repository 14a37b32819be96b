"""Attach the best checkpoint and a report to the W&B run as artifacts."""

import logging
from pathlib import Path

from pytorch_lightning import Trainer

from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking import WandbTracker

logger = logging.getLogger(__name__)


def attach_artifacts(trainer: Trainer, best: str, asked: bool | None) -> None:
    """Attach the best checkpoint and a report to the W&B run, if the settings ask for it.

    Args:
        trainer: The trainer, after training and test.
        best: Path of the best checkpoint; empty if nothing was validated.
        asked: The setting `run.artifacts`.
    """
    for tracker in trainer.loggers:
        if isinstance(tracker, WandbTracker) and tracker.uploads_artifacts(asked):
            # Imported late: Matplotlib is slow to import.
            from maml_pipeline.report.comparison import compare
            from maml_pipeline.report.page import write_report
            from maml_pipeline.run_folder import REPORT
            from maml_pipeline.runs.find import find_runs

            if best:
                tracker.upload_artifact("model", Path(best))
            try:
                runs = find_runs([tracker.folder]).runs
                report = write_report(compare(runs), tracker.folder / REPORT)
            except UserError as error:  # the run itself has succeeded
                logger.warning("no report is attached to the W&B run: %s", error)
            else:
                tracker.upload_artifact("report", report.parent)
