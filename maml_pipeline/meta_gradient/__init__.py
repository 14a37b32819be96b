"""How one meta-gradient is computed, and how one adapted network is judged, in plain PyTorch."""

from maml_pipeline.meta_gradient.inner_loop import Engine, InnerLoop, Loss, MetaGradient
from maml_pipeline.meta_gradient.learn2learn_engine import Learn2LearnEngine
from maml_pipeline.meta_gradient.vectorized_engine import VectorizedEngine

__all__ = ["Engine", "InnerLoop", "Learn2LearnEngine", "Loss", "MetaGradient", "VectorizedEngine"]
