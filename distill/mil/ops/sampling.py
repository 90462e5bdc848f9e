"""Sampling an image (B, C, H, W) at given coordinates, which are (x, y): width first."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.values import check_size


@op("affine", fresh=True)
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Samples where each transform (a0, a1, a2, b0, b1, b2) takes the points of the result, in [-1, 1]."""
    if transform_matrix.dim() != 2 or transform_matrix.shape[1] != 6:
        raise ValueError(f"transform_matrix has shape {list(transform_matrix.shape)}, expected [B or 1, 6]")
    check_size([x.shape[0], output_height, output_width, 3])
    across, down = (span(n, align_corners) for n in (output_width, output_height))
    grid_x, grid_y = torch.meshgrid(across, down, indexing="xy")
    grid = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], -1)  # (H, W, 3)
    matrix = transform_matrix.double().reshape(-1, 1, 2, 3).expand(x.shape[0], 1, 2, 3)
    coordinates = grid @ matrix.transpose(-1, -2)  # (B, H, W, 2)
    return resample(x, coordinates, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)


def span(size: int, align_corners: bool) -> Tensor:
    """`size` points of [-1, 1]: with the ends, or the centres of equal parts."""
    if size < 1:
        raise ValueError(f"output size {size}")
    if align_corners and size > 1:
        return torch.linspace(-1, 1, size, dtype=torch.float64)
    return (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1


@op("resample", fresh=True)
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """`x` at `coordinates` (B, H2, W2, 2): (B, C, H2, W2)."""
    if x.dim() != 4 or coordinates.dim() != 4 or coordinates.shape[::3] != (x.shape[0], 2) or 0 in x.shape:
        raise ValueError(f"an image {list(x.shape)} at coordinates {list(coordinates.shape)}")
    if padding_mode not in ("constant", "border", "reflection", "symmetric"):
        raise ValueError(f"unknown padding_mode {padding_mode!r}")
    if sampling_mode not in ("bilinear", "nearest"):
        raise ValueError(f"unknown sampling_mode {sampling_mode!r}")
    check_size([*x.shape[:2], *coordinates.shape[1:3]])
    places = []
    for size, at in zip((x.shape[3], x.shape[2]), coordinates.double().unbind(-1)):
        places.append(folded(pixels(at, size, coordinates_mode, align_corners), size, padding_mode))
    if sampling_mode == "nearest":
        column, row = (at.round().long() for at in places)  # half way: to the even one, as PyTorch
        return fetch(x, row, column, padding_value)
    low_w, low_h = (at.floor().long() for at in places)
    part_w, part_h = ((at - low).float().unsqueeze(1) for at, low in zip(places, (low_w, low_h)))
    upper, lower = (
        fetch(x, row, low_w, padding_value) * (1 - part_w) + fetch(x, row, low_w + 1, padding_value) * part_w
        for row in (low_h, low_h + 1)
    )
    return upper * (1 - part_h) + lower * part_h


def pixels(at: Tensor, size: int, mode: str, align_corners: bool) -> Tensor:
    """Coordinates as positions, 0 the first element's centre."""
    if mode == "unnormalized":
        return at
    if mode == "normalized_minus_one_to_one":
        at = (at + 1) / 2
    elif mode != "normalized_zero_to_one":
        raise ValueError(f"unknown coordinates_mode {mode!r}")
    return at * (size - 1) if align_corners else at * size - 0.5


def folded(at: Tensor, size: int, padding_mode: str) -> Tensor:
    """Positions brought to where `fetch` finds their value: into the image, or one step outside."""
    if padding_mode == "constant":
        return at.nan_to_num(-1.0).clamp(-1, size)
    if padding_mode != "border":
        edge = 0.0 if padding_mode == "reflection" else 0.5  # mirrors lie on the outer centres, or edges
        length = size - 1 + 2 * edge
        at = (at + edge).remainder(2 * length) if length else torch.zeros_like(at)
        at = torch.minimum(at, 2 * length - at) - edge
    return at.nan_to_num(0.0).clamp(0, size - 1)


def fetch(x: Tensor, row: Tensor, column: Tensor, padding_value: float) -> Tensor:
    """x[b, :, row, column] for positions (B, H2, W2); `padding_value` outside."""
    height, width = x.shape[2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    index = index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
    found = x.flatten(2).gather(2, index).reshape(*x.shape[:2], *row.shape[1:])
    return found.where(inside.unsqueeze(1), padding_value)
