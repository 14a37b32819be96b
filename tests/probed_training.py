"""Short trainings with probes, and what the probes logged."""

from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers.logger import DummyLogger

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.tasks import TaskDistribution
from tests.helpers import make_trainer

ENGINES = ["learn2learn", "vectorized"]
ORDERS: dict[str, dict[str, Any]] = {
    "first": {"first_order": True},
    "second": {},
    "checkpointed": {"method": "checkpointed"},
}

Figures = dict[int, dict[str, float]]
"""Logged metrics by meta-step, counted from 0."""


class MetricsInMemory(DummyLogger):
    """Stores all metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: Figures = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.figures.setdefault(step, {}).update(metrics)


def train(
    learner: MetaLearner,
    tasks: TaskDistribution,
    settings: ProbeSettings,
    steps: int = 10,
    meta_batch_size: int = 1,
    **trainer_settings: Any,
) -> Figures:
    """Train and return the metrics that the probes logged, by meta-step."""
    logger = MetricsInMemory()
    lightning: Trainer = make_trainer(
        max_steps=steps,
        logger=logger,
        callbacks=settings.callbacks(),
        limit_val_batches=0,
        **trainer_settings,
    )
    lightning.fit(learner, datamodule=TaskDataModule(tasks, meta_batch_size))
    probed = ("memory/", "speed/", "order_gap/", "hessian_free_gap/")
    return {
        step: found
        for step, metrics in logger.figures.items()
        if (found := {name: value for name, value in metrics.items() if name.startswith(probed)})
    }
