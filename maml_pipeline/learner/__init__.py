"""MetaLearner, the LightningModule, its tasks as a LightningDataModule, and their callbacks."""

import os

import torch

from maml_pipeline.learner.data import TaskDataModule
from maml_pipeline.learner.meta_learner import MetaLearner, accuracy

__all__ = ["MetaLearner", "TaskDataModule", "accuracy"]

# Importing Lightning makes PyTorch ask NVML whether there is a GPU, and Adam asks in every step: where
# there is none, that opens a library anew each time, which costs more than a small network's Adam.
if not torch.cuda.is_available():
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
