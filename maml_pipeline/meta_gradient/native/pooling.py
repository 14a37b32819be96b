"""Max-pooling of a block's output over squares of two by two pixels.

A square's largest output is that of one pixel, the *winner*. From its z, the normalisation and the ReLU
compute the same output again. So z of the winners, the *peaks*, take the place of z beyond the block.
"""

from typing import Any

from maml_pipeline.meta_gradient.native.layout import OUT_HEIGHT, OUT_WIDTH
from maml_pipeline.meta_gradient.native.normalisation import MEAN, SCALE, SHIFT
from maml_pipeline.meta_gradient.native.numba_internals import compiled


@compiled
def pixel_of(block: Any, square: int, corner: int) -> int:
    """Return a pixel of a square; corners 0 to 3 are row by row."""
    height, width = block[OUT_HEIGHT] // 2, block[OUT_WIDTH] // 2  # an odd last row is dropped
    above, j = square // width, square % width
    image, i = above // height, above % height
    row = image * block[OUT_HEIGHT] + 2 * i + corner // 2
    return row * block[OUT_WIDTH] + 2 * j + corner % 2  # type: ignore[no-any-return]


@compiled
def find_peaks(block: Any, z: Any, norm: Any, winners: Any, peaks: Any) -> None:
    """Find the winner of each square and channel, and its z; the first of equal ones."""
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    for square in range(len(peaks)):
        first = z[pixel_of(block, square, 0)]
        for c in range(peaks.shape[1]):
            winners[square, c] = 0
            peaks[square, c] = first[c]
        for corner in range(1, 4):
            candidate = z[pixel_of(block, square, corner)]
            for c in range(peaks.shape[1]):
                best = scale[c] * (peaks[square, c] - mean[c]) + shift[c]
                if scale[c] * (candidate[c] - mean[c]) + shift[c] > best:
                    winners[square, c] = corner
                    peaks[square, c] = candidate[c]


@compiled
def of_winners(block: Any, values: Any, winners: Any, out: Any) -> None:
    """Take the values of the winners."""
    for square in range(len(out)):
        for c in range(out.shape[1]):
            out[square, c] = values[pixel_of(block, square, int(winners[square, c])), c]


@compiled
def add_to_winners(block: Any, factors: Any, values: Any, winners: Any, out: Any) -> None:
    """Add a factor for each channel times values to those of the winners."""
    for square in range(len(values)):
        for c in range(values.shape[1]):
            out[pixel_of(block, square, int(winners[square, c])), c] += factors[c] * values[square, c]
