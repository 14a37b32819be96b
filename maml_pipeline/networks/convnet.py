"""The four-block convolutional network of the Omniglot experiments."""

from typing import Literal

import torch
from torch import Tensor, nn

from maml_pipeline.networks.convolution import Convolution2d


class BatchStatisticsNorm2d(nn.Module):
    """Normalise each channel by the mean and variance of the batch at hand, always.

    MAML's networks keep no running statistics: a task's support or query set is normalised by
    itself, in training as in testing. Written as one multiply-add per element in differentiable
    operations, since PyTorch's native batch normalisation has a wrong second derivative under vmap.

    Args:
        channels: C of the input `(S, C, H, W)`; the result has the same shape.
        eps: Added to the variance.

    References:
        Ioffe, Szegedy, "Batch Normalization", 2015, algorithm 1.
    """

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=(0, 2, 3), keepdim=True)
        variance = (centred * centred).mean(dim=(0, 2, 3))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


class ConvNet(nn.Module):
    """Classify images `(S, channels, H, W)` into logits `(S, ways)`.

    Four blocks of 3x3 convolution, batch-statistics normalisation and ReLU, then the mean over space
    and a linear head. `downsampling="stride"` halves the image by stride-2 convolutions,
    `"max_pool"` by 2x2 max-pooling, which leaves one pixel of a 28x28 image.

    Args:
        ways: Number of classes of a task.
        filters: Width of every block.
        downsampling: How a block halves its image.
        in_channels: Channels of the images.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, section 5.2 (strided for Omniglot); Vinyals et al., "Matching Networks for One Shot
        Learning", 2016, section 4.1.1 (max-pooling).
    """

    BLOCKS = 4

    def __init__(
        self,
        ways: int,
        filters: int = 64,
        downsampling: Literal["stride", "max_pool"] = "stride",
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        strided = downsampling == "stride"
        layers: list[nn.Module] = []
        for block in range(self.BLOCKS):
            convolution = Convolution2d(
                in_channels if block == 0 else filters,
                filters,
                kernel_size=3,
                stride=2 if strided else 1,
                padding=1,
            )
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            layers += [convolution, BatchStatisticsNorm2d(filters), nn.ReLU()]
            if not strided:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(filters, ways)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits
