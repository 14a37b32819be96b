"""Plain `nn.Module`s that know nothing of meta-learning. (A linear unit is `torch.nn.Linear`.)"""

from maml_pipeline.networks.convnet import ConvNet
from maml_pipeline.networks.mlp import MLP

__all__ = ["MLP", "ConvNet"]
