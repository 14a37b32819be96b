"""Where a network's parameters and a task's intermediate values lie in flat arrays.

A network is convolutional blocks, perhaps none, and then fully connected layers. The tables `blocks`
and `dense` have a row of integers for each; the columns are named below. The intermediate values of a
forward and a backward pass form a *record*: for each block its convolution's output z, the statistics
of its normalisation and the gradient u by its output; for each fully connected layer its input x and
the gradient by its output. The tangents of z, the statistics and x form a record of their own.
"""

from typing import Any, NamedTuple

import numpy as np

from maml_pipeline.meta_gradient.native.convnet.normalisation import NORM_ROWS
from maml_pipeline.meta_gradient.native.network import FeedForward

BLOCK_COLUMNS = 24
(
    CHANNELS,  # of the input
    FILTERS,  # channels of the output
    KERNEL,
    STRIDE,
    PADDING,
    HEIGHT,  # of the input
    WIDTH,
    OUT_HEIGHT,  # of the convolution's output
    OUT_WIDTH,
    PIXELS,  # of the convolution's output, over all images of a set
    POOLS,  # whether the output is pooled
    OUTPUT_PIXELS,  # of the block's output, after pooling
    ROWS,  # of the columns that are made at once
    WEIGHT,  # offset among the parameters, as are GAIN and BIAS
    GAIN,
    BIAS,
    Z,  # offset in the record, as are the next four; PEAKS is Z if nothing is pooled
    PEAKS,
    WINNERS,
    NORM,
    U,
    Z_DOT,  # offset in the record of tangents, as are PEAKS_DOT and NORM_DOT
    PEAKS_DOT,
    NORM_DOT,
) = range(BLOCK_COLUMNS)

DENSE_COLUMNS = 7
(
    INPUTS,
    OUTPUTS,
    DENSE_WEIGHT,  # offset among the parameters, as is DENSE_BIAS
    DENSE_BIAS,
    X,  # offset in the record, as is DELTA
    DELTA,
    X_DOT,  # offset in the record of tangents
) = range(DENSE_COLUMNS)

BYTES_OF_COLUMNS = 360_000
"""Columns are made in parts that stay in the cache of a core."""


class Layout(NamedTuple):
    """The layout of one set of a task, support or query; numba reads it as a tuple.

    Args:
        blocks: `(blocks, BLOCK_COLUMNS)`.
        dense: `(fully connected layers, DENSE_COLUMNS)`.
        eps: What each normalisation adds to the variance.
        examples: Number of examples S.
        positions: Pixels of the features of an image; 1 if there are no blocks.
        averages: The features are averaged over pixels, otherwise flattened.
        classifies: The loss is the cross-entropy, otherwise the mean squared error.
        parameters: Number of parameters P.
        record: Size of a record.
        tangents: Size of the record of tangents.
        largest_u: Size of the largest u.
        largest_pooled: Size of the largest z that is pooled.
        columns: Size of the largest part of columns.
        largest_weight: Size of the largest weight.
    """

    blocks: Any
    dense: Any
    eps: Any
    examples: int
    positions: int
    averages: bool
    classifies: bool
    parameters: int
    record: int
    tangents: int
    largest_u: int
    largest_pooled: int
    columns: int
    largest_weight: int


class _Offsets:
    """Hands out consecutive ranges of an array."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, size: int) -> int:
        start = self.size
        self.size += size
        return start


def layout(network: FeedForward, shape: tuple[int, ...], bytes_each: int, classifies: bool) -> Layout:
    """Lay out a set of examples.

    Args:
        network: The network.
        shape: Shape of the inputs, `(S, features)` or `(S, C, H, W)`.
        bytes_each: Bytes of a number.
    """
    parameters, record, tangents = _Offsets(), _Offsets(), _Offsets()
    blocks = np.zeros((len(network.blocks), BLOCK_COLUMNS), np.int64)
    examples, (height, width) = shape[0], shape[2:] or (1, 1)
    for row, block in zip(blocks, network.blocks, strict=True):
        out_height, out_width = block.output_size(height), block.output_size(width)
        pixels, inputs = examples * out_height * out_width, block.kernel**2 * block.channels
        row[[CHANNELS, FILTERS, KERNEL, STRIDE, PADDING]] = (
            *(block.channels, block.filters, block.kernel),
            *(block.stride, block.padding),
        )
        row[[HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH, PIXELS]] = (
            height,
            width,
            out_height,
            out_width,
            pixels,
        )
        parts = -(-pixels * inputs * bytes_each // BYTES_OF_COLUMNS)
        row[ROWS] = -(-pixels // parts)
        row[WEIGHT] = parameters.take(block.filters * inputs)
        row[GAIN], row[BIAS] = parameters.take(block.filters), parameters.take(block.filters)
        row[Z] = row[PEAKS] = record.take(pixels * block.filters)
        row[NORM] = record.take(NORM_ROWS * block.filters)
        row[Z_DOT] = row[PEAKS_DOT] = tangents.take(pixels * block.filters)
        row[NORM_DOT] = tangents.take(NORM_ROWS * block.filters)
        height, width = out_height, out_width
        if block.pools:
            height, width = height // 2, width // 2
            row[POOLS] = True
            row[PEAKS] = record.take(examples * height * width * block.filters)
            row[WINNERS] = record.take(examples * height * width * block.filters)
            row[PEAKS_DOT] = tangents.take(examples * height * width * block.filters)
        row[OUTPUT_PIXELS] = examples * height * width
        row[U] = record.take(row[OUTPUT_PIXELS] * block.filters)
    dense = np.zeros((len(network.dense), DENSE_COLUMNS), np.int64)
    for row, (inputs, outputs) in zip(dense, network.dense, strict=True):
        row[[INPUTS, OUTPUTS]] = inputs, outputs
        row[DENSE_WEIGHT], row[DENSE_BIAS] = parameters.take(inputs * outputs), parameters.take(outputs)
        row[X], row[DELTA] = record.take(examples * inputs), record.take(examples * outputs)
        row[X_DOT] = tangents.take(examples * inputs)
    columns = np.maximum(blocks[:, ROWS], 2) * blocks[:, KERNEL] ** 2 * blocks[:, CHANNELS]
    block_weights = blocks[:, FILTERS] * blocks[:, KERNEL] ** 2 * blocks[:, CHANNELS]
    return Layout(
        blocks=blocks,
        dense=dense,
        eps=np.array([block.eps for block in network.blocks], np.float64),
        examples=examples,
        positions=height * width,
        averages=network.averages,
        classifies=classifies,
        parameters=parameters.size,
        record=record.size,
        tangents=tangents.size,
        largest_u=max(blocks[:, OUTPUT_PIXELS] * blocks[:, FILTERS], default=0),
        largest_pooled=max(blocks[:, POOLS] * blocks[:, PIXELS] * blocks[:, FILTERS], default=0),
        columns=max(columns, default=0),
        largest_weight=max([*block_weights, *(dense[:, INPUTS] * dense[:, OUTPUTS])]),
    )
