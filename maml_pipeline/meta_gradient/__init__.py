"""How one meta-gradient is computed, and how one adapted network is judged, in plain PyTorch."""

from maml_pipeline.meta_gradient.evaluation import adaptation_curves
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, MetaGradient
from maml_pipeline.meta_gradient.learn2learn_engine import meta_gradient

__all__ = ["InnerLoop", "Loss", "MetaGradient", "adaptation_curves", "meta_gradient"]
