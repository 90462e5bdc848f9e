"""Images at the interface. Inside, an image is an array (1, channels, height, width) of numbers from 0 to 255, the
channels in the order of its colour space (BGR: blue first); GRAYSCALE_FLOAT16 holds any number. PIL is not needed
until an image is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from distill.mil.program import Feature

_MODES = {"RGB": "RGB", "BGR": "RGB", "GRAYSCALE": "L", "GRAYSCALE_FLOAT16": "F"}  # PIL's


def is_pil(value: Any) -> bool:
    """Whether `value` is a PIL image, without importing PIL."""
    return any(base.__module__ == "PIL.Image" for base in type(value).__mro__)


def from_pil(feature: Feature, image: Any, place: str) -> np.ndarray:
    """The array that the program takes, (1, channels, height, width) float32."""
    if feature.kind != "image":
        raise InputError(f"{place}: input {feature.name!r} takes an array, got an image")
    mode = _MODES[feature.color]
    if image.mode != mode:
        raise InputError(
            f"{place}: input {feature.name!r} is {feature.color}: it takes an image of mode {mode}, not {image.mode}"
        )
    pixels = np.asarray(image, dtype=np.float32)  # (H, W) or (H, W, 3)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(planes[::-1] if feature.color == "BGR" else planes)[None]


def to_pil(feature: Feature, array: np.ndarray) -> Image:
    """The image that an output (1, channels, height, width) stands for; numbers are rounded and cut to 0..255."""
    from PIL import Image

    if feature.kind != "image":
        raise InputError(f"output {feature.name!r} is not an image")
    channels = 3 if _MODES[feature.color] == "RGB" else 1
    if array.ndim != 4 or array.shape[:2] != (1, channels):
        raise InputError(f"output {feature.name!r} has shape {list(array.shape)}, not that of a {feature.color} image")
    planes = array[0, ::-1] if feature.color == "BGR" else array[0]
    if feature.color == "GRAYSCALE_FLOAT16":
        return Image.fromarray(np.ascontiguousarray(planes[0], dtype=np.float32))
    pixels = np.nan_to_num(np.rint(planes)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0) if channels == 3 else pixels[0]))
