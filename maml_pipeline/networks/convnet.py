"""The four-block convolutional network for Omniglot (Vinyals et al. 2016, Finn et al. 2017)."""

from typing import Literal

import torch
from torch import Tensor, nn

from maml_pipeline.networks.convolution import Convolution2d


class ConvNet(nn.Module):
    """Classify images with four convolutional blocks and a linear head.

    A block is a 3x3 convolution, batch-statistics normalisation and ReLU. The features are averaged
    over space before the head.

    Args:
        ways: Number of classes per task.
        filters: Channels of every block.
        downsampling: How each block halves the image: `stride` by a stride-2 convolution, as Finn et
            al. for Omniglot; `max_pool` by 2x2 max-pooling, as Vinyals et al.
        in_channels: Channels of the images.

    Shapes: images `(S, in_channels, H, W)` -> logits `(S, ways)`.

    References:
        Vinyals et al., "Matching Networks for One Shot Learning", 2016, section 4.1.1; Finn, Abbeel,
        Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017, section 5.2.
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


class BatchStatisticsNorm2d(nn.Module):
    """Batch normalisation with the statistics of the current batch, in training and evaluation.

    Also known as transductive batch normalisation. There are no running statistics: each support or
    query set is normalised by its own mean and variance, as in MAML. It consists of elementary
    differentiable operations, because PyTorch's native batch normalisation has a wrong second
    derivative under vmap.

    Args:
        channels: Number of channels C.
        eps: Added to the variance.

    Shapes: `(S, C, H, W)` -> `(S, C, H, W)`.

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
