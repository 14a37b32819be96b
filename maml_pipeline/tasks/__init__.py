"""Task distributions in plain PyTorch; each task is a pure function of (seed, split, index)."""

from maml_pipeline.tasks.image_tasks import ImageTasks
from maml_pipeline.tasks.lines import Lines
from maml_pipeline.tasks.omniglot import Omniglot
from maml_pipeline.tasks.random_generators import random_generator, random_generators
from maml_pipeline.tasks.sine import RevealedSineWaves, SineWaves
from maml_pipeline.tasks.task import Split, Task, TaskBatch, TaskDistribution

__all__ = [
    "ImageTasks",
    "Lines",
    "Omniglot",
    "RevealedSineWaves",
    "SineWaves",
    "Split",
    "Task",
    "TaskBatch",
    "TaskDistribution",
    "random_generator",
    "random_generators",
]
