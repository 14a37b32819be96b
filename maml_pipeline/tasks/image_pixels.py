"""Convert images of any kind to 8-bit pixels: PIL images of any mode, tensors and arrays."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

CHANNELS = {1: "L", 3: "RGB"}
"""PIL's modes for grey and colour images."""
TOLERANCE = 1e-3
"""How far floats may lie outside of [0, 1], from the rounding of a resampling."""


def to_pixels(image: Any, size: int, channels: int) -> np.ndarray:
    """Convert one image to pixels.

    An image of another size is scaled, without keeping its aspect ratio, by Lanczos resampling: that
    is how mini-ImageNet's images became 84 x 84 and Omniglot's 28 x 28 pixels in the papers.

    Args:
        image: A PIL image, a tensor `(H, W)` or `(C, H, W)`, or an array `(H, W)` or `(H, W, C)`; arrays
            and tensors are uint8 or uint16, or float in [0, 1].
        size: Height and width.
        channels: 1 for grey, 3 for colour.

    Returns:
        uint8 `(channels, size, size)`.

    Raises:
        ValueError: It is something else; the text says what.
    """
    if isinstance(image, Tensor | np.ndarray):
        image = _from_array(image)
    elif not isinstance(image, Image.Image):
        raise ValueError(f"is a {type(image).__name__}; it must be a PIL image, a tensor or an array")
    image = to_8_bits(image).convert(CHANNELS[channels])
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(size, size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to 8-bit grey or colour; transparency becomes white.

    PIL's own conversion clips 16-bit images to white and keeps the hidden colour of transparent pixels.

    Raises:
        ValueError: Its values are out of range.
    """
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits, or floats
        return Image.fromarray(_to_uint8(np.asarray(image)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_array(image: Tensor | np.ndarray) -> Image.Image:
    shape = tuple(image.shape)
    if isinstance(image, Tensor):
        values = image.detach().cpu().numpy()
        if values.ndim == 3:
            values = values.transpose(1, 2, 0)
    else:
        values = image
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if (
        values.ndim not in (2, 3)
        or (values.ndim == 3 and values.shape[2] not in (3, 4))
        or not values.size
    ):
        layout = "(C, H, W)" if isinstance(image, Tensor) else "(H, W, C)"
        raise ValueError(f"has shape {shape}; it must be (H, W) or {layout} with 1, 3 or 4 channels C")
    return Image.fromarray(np.ascontiguousarray(_to_uint8(values)))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # 16 bits, in any byte order
        return (values >> 8).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"has {values.dtype} values; they must be uint8 or uint16, or float in [0, 1]")
    low, high = values.min(), values.max()
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(
            f"has values from {low:.3g} to {high:.3g}; floats must lie in [0, 1], so leave out a "
            "normalization"
        )
    return (values.clip(0, 1) * 255).round().astype(np.uint8)
