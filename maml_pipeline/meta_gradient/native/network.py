"""Recognise the networks that the compiled functions can run, and order their parameters for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient.inner_loop import Parameters
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.networks.convnet import BatchStatisticsNorm2d
from maml_pipeline.networks.convolution import Convolution2d
from maml_pipeline.torch_internals import flatten, has_hooks, unflatten


@dataclass(frozen=True)
class Block:
    """A convolution without groups, normalisation by the statistics of the set, and ReLU.

    Args:
        channels: Channels of the input.
        filters: Channels of the output.
        kernel: Height and width of the kernel.
        stride: Stride in both directions.
        padding: Zeros added on each side.
        eps: Added to the variance.
        pools: Take the largest output of each square of two by two pixels.
    """

    channels: int
    filters: int
    kernel: int
    stride: int
    padding: int
    eps: float
    pools: bool

    def output_size(self, size: int) -> int:
        """Return the height or width of the convolution's output."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def pooled_size(self, size: int) -> int:
        """Return the height or width of the block's output."""
        return self.output_size(size) // (2 if self.pools else 1)


@dataclass(frozen=True)
class FeedForward:
    """A network of convolutional blocks, perhaps none, and fully connected layers with ReLUs in between.

    Args:
        blocks: The blocks.
        averages: Average the blocks' output over pixels, instead of flattening it.
        dense: Number of inputs and outputs of each fully connected layer.
        shapes: Name and shape of each parameter, in the order of the layers: weight, gain and bias of a
            block, weight and bias of a fully connected layer. The second dimension is the channels',
            which are last in the compiled functions. The biases of convolutions are missing: the
            normalisation cancels them.
    """

    blocks: tuple[Block, ...]
    averages: bool
    dense: tuple[tuple[int, int], ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def outputs(self) -> int:
        """Number of outputs for an example."""
        return self.dense[-1][1]

    @cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter that has an effect."""
        return [prod(shape) for _, shape in self.shapes]

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the parameters that have an effect."""
        return frozenset(name for name, _ in self.shapes)

    def has_parameters(self, theta: Mapping[str, Tensor]) -> bool:
        """Tell whether a network's parameters are these, in these sizes, and no others."""
        # The others are the biases of convolutions.
        return len(theta) == len(self.shapes) + len(self.blocks) and all(
            name in theta and theta[name].numel() == size
            for (name, _), size in zip(self.shapes, self.sizes, strict=True)
        )

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the network can predict an example of a shape, `(features,)` or `(C, H, W)`."""
        inputs = self.dense[0][0]
        if not self.blocks:
            return shape == (inputs,)
        if len(shape) != 3 or shape[0] != self.blocks[0].channels:
            return False
        height, width = shape[1:]
        for block in self.blocks:
            height, width = block.pooled_size(height), block.pooled_size(width)
        positions = 1 if self.averages else height * width
        return height > 0 and width > 0 and self.blocks[-1].filters * positions == inputs

    def pack(self, theta: Parameters) -> Tensor:
        """Concatenate parameters, with channels last: by name, `(...)` -> `(P,)`."""
        if not self.blocks:
            return flatten([theta[name] for name, _ in self.shapes])
        return self.pack_tasks({name: theta[name][None] for name, _ in self.shapes})[0]

    def pack_tasks(self, theta: Parameters) -> Tensor:
        """Do the same for each of T tasks: by name, `(T, ...)` -> `(T, P)`."""
        return torch.cat([_channels_last(theta[name], shape) for name, shape in self.shapes], dim=1)

    def unpack(self, packed: Tensor, theta: Parameters) -> Parameters:
        """Undo `pack`: `(..., P)` -> by name, in the order of `theta`.

        Args:
            packed: Values of the parameters.
            theta: The parameters. The value of one that `packed` does not have, such as the bias of a
                convolution, is its own.
        """
        if not self.blocks and packed.dim() == 1:  # faster than what follows
            names = [name for name, _ in self.shapes]
            parts = unflatten(packed, [theta[name] for name in names])
            return dict(zip(names, parts, strict=True))
        lead, values = packed.shape[:-1], {}
        parts = torch.split(packed, self.sizes, dim=-1)
        for (name, (first, second, *rest)), part in zip(self.shapes, parts, strict=True):
            if rest:
                part = part.reshape(*lead, first, *rest, second).movedim(-1, len(lead) + 1)
            values[name] = part.reshape(lead + theta[name].shape)
        return {
            name: values[name] if name in values else p.expand(*lead, *p.shape)
            for name, p in theta.items()
        }


def _channels_last(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flatten the parameters of each task with the second dimension of `shape` last."""
    if len(shape) > 2:
        p = p.reshape(len(p), *shape).movedim(2, -1)
    return p.reshape(len(p), -1)


def feed_forward(network: nn.Module, theta: dict[str, nn.Parameter]) -> FeedForward | None:
    """Describe a network; `None` if the compiled functions cannot run it.

    They run `ConvNet`, `MLP`, and sequences of fully connected layers with ReLUs in between:
    these classes themselves, without hooks, whose parameters all adapt, on the CPU and in one type.

    Args:
        network: The network.
        theta: All its parameters, by name; a shared one once.
    """
    if type(network) not in (ConvNet, MLP, nn.Sequential) or not theta:
        return None
    dtype = next(iter(theta.values())).dtype
    is_plain = (
        dtype in (torch.float32, torch.float64)
        and all(
            p.requires_grad and p.is_cpu and p.dtype == dtype and p.is_contiguous()
            for p in theta.values()
        )
        and not any(has_hooks(module) or "forward" in vars(module) for module in network.modules())
    )
    if not is_plain:
        return None
    known = _convolutional(network) if type(network) is ConvNet else _fully_connected(network)
    # A parameter that layers share is counted once.
    return known if known is not None and known.has_parameters(theta) else None


def _convolutional(network: ConvNet) -> FeedForward | None:
    blocks, shapes = [], []
    layers = named_layers(network.features)
    each = len(layers) // ConvNet.BLOCKS
    if each not in (3, 4) or len(layers) != each * ConvNet.BLOCKS:
        return None
    for first in range(0, len(layers), each):
        names = [*layers][first : first + each]
        convolution, norm, relu, *pool = (layers[name] for name in names)
        if not (
            type(convolution) is Convolution2d
            and type(norm) is BatchStatisticsNorm2d
            and type(relu) is nn.ReLU
            and all(map(_halves, pool))
        ):
            return None
        shape = tuple(convolution.weight.shape)  # not what the layer was made with: it may be pruned
        filters, channels, kernel, width = shape
        stride, padding = convolution.stride, convolution.padding
        plain = (convolution.dilation, convolution.groups, convolution.padding_mode, width)
        if plain != ((1, 1), 1, "zeros", kernel) or len({*stride}) > 1 or len({*padding}) > 1:
            return None
        blocks.append(
            Block(
                channels=channels,
                filters=filters,
                kernel=kernel,
                stride=stride[0],
                padding=int(padding[0]),
                eps=norm.eps,
                pools=bool(pool),
            )
        )
        shapes += [
            (f"features.{names[0]}.weight", shape),
            (f"features.{names[1]}.weight", (filters, 1)),
            (f"features.{names[1]}.bias", (filters, 1)),
        ]
    head, filters = network.head, blocks[-1].filters
    fits = all(before.filters == block.channels for before, block in pairwise(blocks))
    if type(head) is not nn.Linear or not fits:
        return None
    outputs, inputs = head.weight.shape
    shapes += [
        ("head.weight", (outputs, filters, inputs // filters)),
        ("head.bias", (outputs, 1)),
    ]
    return FeedForward(
        blocks=tuple(blocks),
        averages=network.image_size is None,
        dense=((inputs, outputs),),
        shapes=tuple(shapes),
    )


def _fully_connected(network: nn.Module) -> FeedForward | None:
    layers = [*named_layers(network).items()]
    alternates = len(layers) % 2 == 1 and all(
        type(layer) is (nn.ReLU if i % 2 else nn.Linear) for i, (_, layer) in enumerate(layers)
    )
    linear = [(name, layer) for name, layer in layers if type(layer) is nn.Linear]
    if not alternates or any(layer.bias is None for _, layer in linear):
        return None
    sizes = [tuple(layer.weight.shape) for _, layer in linear]  # not what a layer was made with
    if any(inputs != before for (before, _), (_, inputs) in pairwise(sizes)):
        return None
    return _perceptron(
        tuple((name, *reversed(size)) for (name, _), size in zip(linear, sizes, strict=True))
    )


def named_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a plain sequence by name; none if it has a layer twice, or is something else.

    A class of the user's own may call its layers in another order.
    """
    if type(network) not in (nn.Sequential, MLP):
        return {}
    layers = dict(network.named_children())  # a layer that is there twice only once
    return layers if len(layers) == len(network) else {}  # type: ignore[arg-type]


def _halves(layer: nn.Module) -> bool:
    """Tell whether a layer takes the largest of each two by two pixels."""
    return type(layer) is nn.MaxPool2d and (
        *(layer.kernel_size, layer.stride, layer.padding, layer.dilation),
        *(layer.ceil_mode, layer.return_indices),
    ) == (2, 2, 0, 1, False, False)


@lru_cache(maxsize=64)
def _perceptron(layers: tuple[tuple[str, int, int], ...]) -> FeedForward:
    """Describe a network of fully connected layers: name, inputs and outputs of each."""
    return FeedForward(
        blocks=(),
        averages=True,
        dense=tuple((inputs, outputs) for _, inputs, outputs in layers),
        shapes=tuple(
            (f"{name}.{parameter}", (outputs, inputs))
            for name, layer_inputs, outputs in layers
            for parameter, inputs in (("weight", layer_inputs), ("bias", 1))
        ),
    )
