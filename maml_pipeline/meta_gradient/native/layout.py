"""Where a network's parameters and a task's intermediate values lie in the arrays of a program.

The intermediate values of a forward and a backward pass form a *record*: for each block its
convolution's output z, the statistics of its normalisation and the gradient u by its output; for each
fully connected layer its input x and the gradient by its output. The tangents of z, the statistics and
x form a record of their own.
"""

from dataclasses import dataclass
from math import prod

from maml_pipeline.meta_gradient.native.kernels import (
    IMAGES,
    RECORD,
    TANGENTS,
    THETA,
    WORK,
    View,
)
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native.normalisation import NORM_ROWS

BYTES_OF_COLUMNS = 360_000
"""Columns are made in parts that stay in the cache of a core."""


class _Space:
    """Hands out consecutive parts of an array."""

    def __init__(self, array: int) -> None:
        self.array, self.size = array, 0

    def take(self, rows: int, columns: int) -> View:
        start = self.size
        self.size += rows * columns
        return View(self.array, start, rows, columns)


@dataclass(frozen=True)
class BlockLayout:
    """A convolutional block of a set of examples.

    Args:
        geometry: Channels of the input, kernel, stride, padding, height and width of the input, height
            and width of the convolution's output.
        pools: Whether the output is pooled.
        eps: What the normalisation adds to the variance.
        rows: Rows of the columns that are made at once.
        weight: `(filters, kernel * kernel * channels)`, in the parameters.
        gain: `(1, filters)`, in the parameters.
        bias: `(1, filters)`, in the parameters.
        z: The convolution's output `(pixels, filters)`, in the record.
        norm: Statistics of the normalisation, in the record.
        peaks: z of the winners, if the block pools, otherwise z; in the record.
        winners: Which pixel of a square won, in the record; without elements if the block does not pool.
        u: Gradient by the block's output, in the record.
        z_dot: Tangents of z, in the record of tangents.
        norm_dot: Tangents of the statistics.
        peaks_dot: Tangents of the peaks.
    """

    geometry: tuple[int, ...]
    pools: bool
    eps: float
    rows: int
    weight: View
    gain: View
    bias: View
    z: View
    norm: View
    peaks: View
    winners: View
    u: View
    z_dot: View
    norm_dot: View
    peaks_dot: View

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the convolution's output."""
        height, width = self.geometry[-2:]
        return height, width


@dataclass(frozen=True)
class DenseLayout:
    """A fully connected layer for a set of examples.

    Args:
        weight: `(outputs, inputs)`, in the parameters.
        bias: `(1, outputs)`, in the parameters.
        x: Input `(S, inputs)`, in the record; of the first layer of a network without blocks, the
            examples themselves.
        delta: Gradient by the output `(S, outputs)`, in the record.
        x_dot: Tangents of x, in the record of tangents.
        delta_dot: Working memory for the tangents of delta.
    """

    weight: View
    bias: View
    x: View
    delta: View
    x_dot: View
    delta_dot: View


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of one set of a task, support or query.

    Args:
        blocks: The blocks, perhaps none.
        dense: The fully connected layers.
        classifies: The loss is the cross-entropy, otherwise the mean squared error.
        dtype: Type of the numbers.
        columns: Working memory for a part of the columns; or for half as much, and its tangents.
        weight_sum: Working memory for the gradient by a block's weight.
        features: Working memory for the gradient by x of the first fully connected layer, after blocks.
        z_gradient: Working memory for the gradient by z, if it may not overwrite u; the same as `u_dot`
            if no block pools.
        u_dot: Working memory for the tangents of u.
        prediction_dot: Working memory for the tangents of the prediction.
        inputs: Numbers in the inputs of a set.
        parameters: Number of parameters P.
        record: Size of a record.
        tangents: Size of the record of tangents.
        first_order_work: Size of the working memory in first order.
        second_order_work: Size of the working memory.
    """

    blocks: tuple[BlockLayout, ...]
    dense: tuple[DenseLayout, ...]
    classifies: bool
    dtype: str
    columns: View
    weight_sum: View
    features: View
    z_gradient: View
    u_dot: View
    prediction_dot: View
    inputs: int
    parameters: int
    record: int
    tangents: int
    first_order_work: int
    second_order_work: int

    @property
    def examples(self) -> int:
        """Number of examples S."""
        return self.prediction_dot.rows

    @property
    def outputs(self) -> int:
        """Number of outputs for an example."""
        return self.prediction_dot.columns

    def work_size(self, is_first_order: bool, query: "Layout") -> int:
        """Return the working memory for a support set of this layout and a query set."""
        own = self.first_order_work if is_first_order else self.second_order_work
        return max(own, query.first_order_work)


def layout_of(network: FeedForward, shape: tuple[int, ...], bytes_each: int, classifies: bool) -> Layout:
    """Lay out a set of examples.

    Args:
        network: The network.
        shape: Shape of the inputs, `(S, features)` or `(S, C, H, W)`.
        bytes_each: Bytes of a number.
        classifies: The loss is the cross-entropy, otherwise the mean squared error.
    """
    parameters, record, tangents = _Space(THETA), _Space(RECORD), _Space(TANGENTS)
    blocks, examples = [], shape[0]
    height, width = shape[2:] or (1, 1)
    for block in network.blocks:
        out_height, out_width = block.output_size(height), block.output_size(width)
        pixels, inputs = examples * out_height * out_width, block.kernel**2 * block.channels
        parts = -(-pixels * inputs * bytes_each // BYTES_OF_COLUMNS)
        geometry = (block.channels, block.kernel, block.stride, block.padding, height, width)
        height, width = block.pooled_size(height), block.pooled_size(width)
        z, z_dot = record.take(pixels, block.filters), tangents.take(pixels, block.filters)
        squares = examples * height * width if block.pools else 0
        peaks, peaks_dot = record.take(squares, block.filters), tangents.take(squares, block.filters)
        blocks.append(
            BlockLayout(
                geometry=(*geometry, out_height, out_width),
                pools=block.pools,
                eps=block.eps,
                rows=-(-pixels // parts),
                weight=parameters.take(block.filters, inputs),
                gain=parameters.take(1, block.filters),
                bias=parameters.take(1, block.filters),
                z=z,
                norm=record.take(NORM_ROWS, block.filters),
                peaks=peaks if block.pools else z,
                winners=record.take(squares, block.filters),
                u=record.take(examples * height * width, block.filters),
                z_dot=z_dot,
                norm_dot=tangents.take(NORM_ROWS, block.filters),
                peaks_dot=peaks_dot if block.pools else z_dot,
            )
        )
    work, pools = _Space(WORK), any(block.pools for block in network.blocks)
    columns = work.take(1, max((max(b.rows, 2) * b.weight.columns for b in blocks), default=0))
    weight_sum = work.take(1, max((b.weight.size for b in blocks), default=0))
    features = work.take(examples, network.dense[0][0] if blocks else 0)
    z_gradient = work.take(1, max((b.z.size * b.pools for b in blocks), default=0))
    first_order_work = work.size
    u_dot = work.take(1, max((b.u.size for b in blocks), default=0))
    dense = []
    for level, (inputs, outputs) in enumerate(network.dense):
        is_input = level == 0 and not blocks
        dense.append(
            DenseLayout(
                weight=parameters.take(outputs, inputs),
                bias=parameters.take(1, outputs),
                x=View(IMAGES, 0, examples, inputs) if is_input else record.take(examples, inputs),
                delta=record.take(examples, outputs),
                x_dot=tangents.take(examples, 0 if is_input else inputs),
                delta_dot=work.take(examples, outputs),
            )
        )
    return Layout(
        blocks=tuple(blocks),
        dense=tuple(dense),
        classifies=classifies,
        dtype=f"float{8 * bytes_each}",
        columns=columns,
        weight_sum=weight_sum,
        features=features,
        z_gradient=z_gradient if pools else u_dot,
        u_dot=u_dot,
        prediction_dot=work.take(examples, network.outputs),
        inputs=prod(shape),
        parameters=parameters.size,
        record=record.size,
        tangents=tangents.size,
        first_order_work=first_order_work,
        second_order_work=work.size,
    )
