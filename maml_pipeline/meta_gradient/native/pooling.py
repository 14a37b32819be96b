"""Max-pooling of a block's output over squares of two by two pixels.

A square's largest output is that of one pixel, the *winner*. From its z, the normalisation and the ReLU
compute the same output again. So z of the winners, the *peaks*, take the place of z beyond the block.
"""

from typing import Any

from maml_pipeline.meta_gradient.native.kernels import Kernel
from maml_pipeline.meta_gradient.native.normalisation import MEAN, SCALE, SHIFT
from maml_pipeline.meta_gradient.native.numba_internals import compiled
from maml_pipeline.meta_gradient.native.operands import integers, matrices


@compiled
def pixel_of(out_height: int, out_width: int, square: int, corner: int) -> int:
    """Return a pixel of a square; corners 0 to 3 are row by row."""
    height, width = out_height // 2, out_width // 2  # an odd last row is dropped
    above, j = square // width, square % width
    image, i = above // height, above % height
    row = image * out_height + 2 * i + corner // 2
    return row * out_width + 2 * j + corner % 2


@Kernel
def find_peaks(arrays: Any, operands: Any, factor: float) -> None:
    """Find the winner of each square and channel, and its z; the first of equal ones.

    Operands: z, norm, winners, peaks, height and width of z.
    """
    z, norm, winners, peaks = matrices(arrays, operands, 4)
    height, width = integers(operands, 4, 2)
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    for square in range(len(peaks)):
        first = z[pixel_of(height, width, square, 0)]
        for c in range(peaks.shape[1]):
            winners[square, c] = 0
            peaks[square, c] = first[c]
        for corner in range(1, 4):
            candidate = z[pixel_of(height, width, square, corner)]
            for c in range(peaks.shape[1]):
                best = scale[c] * (peaks[square, c] - mean[c]) + shift[c]
                if scale[c] * (candidate[c] - mean[c]) + shift[c] > best:
                    winners[square, c] = corner
                    peaks[square, c] = candidate[c]


@Kernel
def of_winners(arrays: Any, operands: Any, factor: float) -> None:
    """Take the values of the winners. Operands: values, winners, out, height and width of the values."""
    values, winners, out = matrices(arrays, operands, 3)
    height, width = integers(operands, 3, 2)
    for square in range(len(out)):
        for c in range(out.shape[1]):
            out[square, c] = values[pixel_of(height, width, square, int(winners[square, c])), c]


@Kernel
def add_to_winners(arrays: Any, operands: Any, factor: float) -> None:
    """Add s times values to those of the winners.

    Operands: the matrix whose row SCALE holds s, values, winners, out, height and width of out.
    """
    norm, values, winners, out = matrices(arrays, operands, 4)
    height, width = integers(operands, 4, 2)
    for square in range(len(values)):
        for c in range(values.shape[1]):
            pixel = pixel_of(height, width, square, int(winners[square, c]))
            out[pixel, c] += norm[SCALE, c] * values[square, c]
