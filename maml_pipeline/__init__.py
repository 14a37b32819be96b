"""Few-shot meta-training with first- and second-order MAML, and the difference between the two."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maml_pipeline.learner import MetaLearner, TaskDataModule
    from maml_pipeline.tasks import Task, TaskBatch, TaskDistribution

__all__ = ["MetaLearner", "Task", "TaskBatch", "TaskDataModule", "TaskDistribution"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: PyTorch and Lightning take seconds, `maml --help` must not.
    if name in ("MetaLearner", "TaskDataModule"):
        from maml_pipeline import learner

        return getattr(learner, name)
    if name in ("Task", "TaskBatch", "TaskDistribution"):
        from maml_pipeline import tasks

        return getattr(tasks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
