"""The four-block convolutional network of few-shot image classification (Vinyals et al. 2016)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from maml_pipeline.errors import UserError
from maml_pipeline.networks.convolution import Convolution2d
from maml_pipeline.torch_internals import is_transformed


class ConvNet(nn.Module):
    """Classify images with four convolutional blocks and a linear head.

    A block is a 3x3 convolution, batch-statistics normalisation and ReLU, and halves the image. The
    default is the network of Finn et al. for Omniglot. Their network for mini-ImageNet is
    `ConvNet(5, filters=32, downsampling="max_pool", in_channels=3, image_size=84)`, with 5 x 5 x 32
    features.

    Args:
        ways: Number of classes per task.
        filters: Channels of every block.
        downsampling: How each block halves the image: `stride` by a stride-2 convolution, as Finn et
            al. for Omniglot; `max_pool` by 2x2 max-pooling after the ReLU, as Vinyals et al., and as
            Finn et al. for mini-ImageNet.
        in_channels: Channels of the images.
        image_size: Height and width of the images, to flatten the features before the head, as Finn et
            al. for mini-ImageNet. `None` to average them over space, as they do for Omniglot; images
            may then have any size.

    Shapes: images `(S, in_channels, H, W)` -> logits `(S, ways)`.

    Raises:
        UserError: The blocks would halve an image of `image_size` to nothing, or an image has another
            size.

    References:
        Vinyals et al., "Matching Networks for One Shot Learning", 2016, section 4.1.1; Ravi,
        Larochelle, "Optimization as a Model for Few-Shot Learning", 2017, section 5.1; Finn, Abbeel,
        Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017, section 5.2.
    """

    BLOCKS = 4

    def __init__(
        self,
        ways: int,
        filters: int = 64,
        downsampling: Literal["stride", "max_pool"] = "stride",
        in_channels: int = 1,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        strided = downsampling == "stride"
        self.image_size = image_size
        positions = 1 if image_size is None else self._feature_size(image_size, strided) ** 2
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
        self.head = nn.Linear(filters * positions, ways)

    def forward(self, x: Tensor) -> Tensor:
        if self.image_size is not None and x.shape[-2:] != (self.image_size, self.image_size):
            height, width = x.shape[-2:]
            raise UserError(
                f"the network's image_size is {self.image_size}, but an image is {height}x{width}; "
                "make them equal"
            )
        features: Tensor = self.features(x)
        vector = features.mean(dim=(2, 3)) if self.image_size is None else features.flatten(1)
        logits: Tensor = self.head(vector)
        return logits

    def _feature_size(self, image_size: int, strided: bool) -> int:
        """Return the height and width of the last block's features."""
        size = image_size
        for _ in range(self.BLOCKS):
            size = (size + 1) // 2 if strided else size // 2  # pooling drops an odd last row
        if size < 1:
            smallest = 1 if strided else 2**self.BLOCKS
            raise UserError(f"image_size is {image_size}; it must be at least {smallest}")
        return size


class BatchStatisticsNorm2d(nn.Module):
    """Batch normalisation with the statistics of the current batch, in training and evaluation.

    Also known as transductive batch normalisation. There are no running statistics: each support or
    query set is normalised by its own mean and variance, as in MAML. It is PyTorch's native batch
    normalisation, except under a transform of `torch.func`, such as vmap: there the native one has a
    wrong second derivative, and elementary differentiable operations take its place. The native one
    has two derivatives, as second order needs.

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
        if not is_transformed() and x.numel() > x.shape[1]:  # it refuses one value per channel
            x = x.to(self.weight.dtype)  # autocast lowers it; the operations below raise it again
            return batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        centred = x - x.mean(dim=(0, 2, 3), keepdim=True)
        variance = (centred * centred).mean(dim=(0, 2, 3))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]
