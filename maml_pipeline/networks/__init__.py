"""Networks: plain `nn.Module`s, independent of meta-learning."""

from maml_pipeline.networks.convnet import ConvNet
from maml_pipeline.networks.mlp import MLP

__all__ = ["MLP", "ConvNet"]
