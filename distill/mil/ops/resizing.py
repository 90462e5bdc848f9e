"""Resizing and cropping of images: (..., H, W), height before width.

A dimension of Xin elements is resized to Xout by choosing Xout points in [0, Xin - 1]; the sampling mode says which
(the formulas are in MIL's documentation of resize_bilinear). Points are computed in float64 with a single division,
so that a point on an element, or half way between two, is exactly there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.values import check_size

_MOST_BOXES = 2**16


@op("resize_bilinear", fresh=True)
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    return resized(x, [target_size_height, target_size_width], linear, sampling_mode)


@op("resize_nearest_neighbor", exact=True, fresh=True)
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """The element at the centre of each new one, as TensorFlow's half_pixel_centers."""
    return resized(x, [target_size_height, target_size_width], nearest, "UNALIGN_CORNERS")


@op("upsample_bilinear", fresh=True)
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The scale that counts is that of the sizes, rounded down."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and half:
        raise ValueError("align_corners and half_pixel_centers exclude each other")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    return resized(x, scaled_sizes(x, [scale_factor_height, scale_factor_width]), linear, mode)


@op("upsample_nearest_neighbor", exact=True, fresh=True)
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    """The element at the left edge of each new one, as PyTorch's `nearest` with a recomputed scale."""
    return resized(x, scaled_sizes(x, [scale_factor_height, scale_factor_width]), leftmost, "DEFAULT")


@op("resize")
def resize(
    x: Tensor, shape: list[int], resized_dims: int, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Tensor:
    """The last `resized_dims` dimensions become those of `shape`; 0 leaves one as it is."""
    if not 0 <= resized_dims <= len(shape) <= x.dim():
        raise ValueError(f"resized_dims {resized_dims}, shape {shape} and {x.dim()} dimensions do not agree")
    methods = {"LINEAR": linear, "NEAREST_NEIGHBOR": nearest}
    if interpolation_mode not in methods:
        raise ValueError(f"unknown interpolation_mode {interpolation_mode!r}")
    pairs = list(zip(reversed(shape), reversed(x.shape)))[:resized_dims]
    return resized(x, [new or old for new, old in reversed(pairs)], methods[interpolation_mode], sampling_mode)


@op("crop", exact=True)
def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    """Without the first and last rows and columns: (before, after) of each."""
    for dim, amounts in ((-2, crop_height), (-1, crop_width)):
        if len(amounts) != 2 or min(amounts) < 0 or sum(amounts) > x.shape[dim]:
            raise ValueError(f"cannot crop {amounts} of {x.shape[dim]}")
        x = x.narrow(dim, amounts[0], x.shape[dim] - sum(amounts))
    return x


@op("crop_resize", fresh=True)
def crop_resize(
    x: Tensor,
    roi: Tensor | None = None,
    boxes: Tensor | None = None,
    box_indices: list[int] | None = None,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    """Boxes of `x` (B, C, H, W), each resized; a point outside of the image is `pad_value`.

    Until iOS16 `roi` (N, 1, 4, 1, 1) gives (N, B, C, h, w), each box of every image, and `roi` (N, 1, 5, 1, 1), the
    image's number first, (N, 1, C, h, w). From iOS17 `boxes` (N, 4) with `box_indices` (N) gives (N, C, h, w).
    """
    if (roi is None) == (boxes is None):
        raise ValueError("either roi or boxes is needed")
    if max(len(b) for b in (boxes, roi) if b is not None) > _MOST_BOXES:
        raise ValueError(f"more than {_MOST_BOXES} boxes")
    if boxes is not None:
        rows, numbers = boxes.double(), box_indices or list(range(len(boxes)))
    elif roi is not None:
        rows, numbers = roi.double().flatten(1), []
        if rows.shape[1:] == (5,):
            rows, numbers = rows[:, 1:], rows[:, 0].long().tolist()
    spans = box_spans(rows, box_coordinate_mode) * spatial_scale
    if normalized_coordinates:
        spans = spans * (torch.tensor(x.shape[2:], dtype=torch.float64) - 1)
    images = box_images(x, numbers, len(rows))
    check_size([len(images), *images[0].shape[:2], target_height, target_width])
    grid_h = box_points(spans[..., 0], target_height, sampling_mode)
    grid_w = box_points(spans[..., 1], target_width, sampling_mode)
    crops = torch.stack([sampled(*one, pad_value) for one in zip(images, grid_h, grid_w)])
    return crops.squeeze(1) if roi is None else crops


def box_images(x: Tensor, numbers: list[int], count: int) -> list[Tensor]:
    """What each of `count` boxes is cut out of: one image (1, C, H, W), or all."""
    if x.dim() != 4 or count == 0:
        raise ValueError(f"{count} boxes of an input {list(x.shape)}")
    if not numbers:
        return [x] * count
    if len(numbers) != count or not all(0 <= n < x.shape[0] for n in numbers):
        raise ValueError(f"image numbers {numbers} for {count} boxes of {x.shape[0]} images")
    return [x[n : n + 1] for n in numbers]


def box_spans(rows: Tensor, mode: str) -> Tensor:
    """(N, 4) in the convention `mode` as (N, 2, 2): first and last point, height and width."""
    if rows.shape[1:] != (4,):
        raise ValueError(f"boxes have shape {list(rows.shape)}, expected 4 numbers each")
    first, last = rows[:, :2], rows[:, 2:]
    if mode.startswith("CENTER_SIZE_"):
        first, last = first - last / 2, first + last / 2
    order = {"HEIGHT_FIRST": [0, 1], "WIDTH_FIRST": [1, 0]}
    convention = mode.removeprefix("CENTER_SIZE_").removeprefix("CORNERS_")
    if convention == mode or convention not in order:
        raise ValueError(f"unknown box_coordinate_mode {mode!r}")
    return torch.stack([first, last], 1)[..., order[convention]]


def box_points(span: Tensor, size: int, mode: str) -> Tensor:
    """(N, size) points from span[:, 0] to span[:, 1], which may lie before it."""
    first, last = span.unbind(1)
    steps = points((last - first).abs() + 1, size, mode)
    return first.unsqueeze(1) + (last - first).sign().unsqueeze(1) * steps


def sampled(image: Tensor, rows: Tensor, columns: Tensor, pad_value: float) -> Tensor:
    """(B, C, H, W) at `rows` x `columns`."""
    inside_h, inside_w = ((at >= 0) & (at <= n - 1) for at, n in zip((rows, columns), image.shape[-2:]))
    found = linear(image, -2, rows.where(inside_h, 0))
    found = linear(found, -1, columns.where(inside_w, 0))
    return found.where(inside_h.unsqueeze(1) & inside_w, pad_value)


def scaled_sizes(x: Tensor, scales: Sequence[float]) -> list[int]:
    """Height and width times their factors; the product is rounded to float32, as the builder does."""
    return [int(np.floor(np.float32(scale) * np.float32(n))) for scale, n in zip(scales, x.shape[-2:])]


def resized(x: Tensor, sizes: Sequence[int], method: Callable[[Tensor, int, Tensor], Tensor], mode: str) -> Tensor:
    """`x` with its last dimensions brought to `sizes`, one after the other."""
    if x.dim() < len(sizes) or min([*sizes, *x.shape[x.dim() - len(sizes) :], 1]) < 1:
        raise ValueError(f"cannot resize {list(x.shape)} to {list(sizes)}")
    for dim, size in enumerate(sizes, -len(sizes)):
        check_size([*x.shape[:dim], size, *x.shape[dim:][1:]])
        x = method(x, dim, points(torch.tensor(x.shape[dim], dtype=torch.float64), size, mode))
    return x


def points(extent: Tensor, size: int, mode: str) -> Tensor:
    """`size` points of [0, extent - 1] for each `extent`."""
    if size < 1:
        raise ValueError(f"target size {size}")
    check_size([*extent.shape, size])
    extent, i = extent.unsqueeze(-1), torch.arange(size, dtype=torch.float64)
    if mode == "ALIGN_CORNERS" and size == 1:
        at = (extent - 1) / 2
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        at = i * (extent - 1) / max(1, size - 1)
    elif mode == "DEFAULT":
        at = i * extent / size
    elif mode == "OFFSET_CORNERS":
        at = (2 * i + 1) * (extent - 1).clamp(min=1) / (2 * size)
    elif mode == "UNALIGN_CORNERS":
        at = ((2 * i + 1) * extent - size) / (2 * size)
    else:
        raise ValueError(f"unknown sampling_mode {mode!r}")
    return torch.minimum(at.clamp(min=0), extent - 1)


def linear(x: Tensor, dim: int, at: Tensor) -> Tensor:
    """`x` at the points `at` of a dimension counted from the end, interpolated."""
    low = at.floor().long()
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    weight = (at - low).float().reshape([-1] + [1] * (-1 - dim))
    return x.index_select(dim, low) * (1 - weight) + x.index_select(dim, high) * weight


def nearest(x: Tensor, dim: int, at: Tensor) -> Tensor:
    """The element next to each point; of two, the later."""
    return x.index_select(dim, (at + 0.5).floor().long())


def leftmost(x: Tensor, dim: int, at: Tensor) -> Tensor:
    """The element at or before each point."""
    return x.index_select(dim, at.floor().long())
