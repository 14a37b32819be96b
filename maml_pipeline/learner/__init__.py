"""MetaLearner, the LightningModule, its tasks as a LightningDataModule, and their callbacks."""

from maml_pipeline.learner.data import TaskDataModule
from maml_pipeline.learner.learned_inner_lr import LearnedInnerLr
from maml_pipeline.learner.measures import accuracy
from maml_pipeline.learner.meta_learner import MetaLearner

__all__ = ["LearnedInnerLr", "MetaLearner", "TaskDataModule", "accuracy"]
