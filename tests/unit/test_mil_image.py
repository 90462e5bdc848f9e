"""distill.mil: pooling, convolution, resizing, sampling and box operators against torch and numbers worked by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from torch.testing import assert_close

from distill import mil
from distill.errors import PackageError
from distill.mil.ops import conv, detection, pooling, resizing, sampling
from distill.mil.policy import make_policy
from distill.mil.run import Run
from tests.unit import mil_build as b
from tests.unit.test_mil_ops import check

T = torch.from_numpy
RUN = Run(make_policy("fp32"), None)
SIGNAL, IMAGE, VOLUME = b.random((2, 4, 9), 1), b.random((2, 4, 7, 8), 2), b.random((1, 4, 5, 6, 4), 3)
ROW = torch.tensor([0.0, 1.0]).reshape(1, 1, 2)
SQUARE = torch.arange(1.0, 17).reshape(1, 1, 4, 4)


# Pooling


def test_pooling_without_padding_matches_torch():
    for x, kernel, stride in ((SIGNAL, [3], [2]), (IMAGE, [3, 2], [1, 3]), (VOLUME, [2, 3, 1], [2, 1, 1])):
        n = len(kernel) - 1
        maximum, average = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n], (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n]
        assert_close(pooling.max_pool(T(x), kernel, "valid", stride), maximum(T(x), kernel, stride))
        assert_close(pooling.avg_pool(RUN, T(x), kernel, "valid", stride), average(T(x), kernel, stride))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("stride", [[1, 2], [2, 3], [3, 3]])
@pytest.mark.parametrize("size", [(7, 8), (6, 7)])
def test_padded_pooling_matches_torch(size, stride, ceil_mode):
    x, kernel, pad = T(b.random((1, 2, *size), 4)), [3, 2], [1, 1, 1, 1]
    fixed: dict[str, Any] = {"strides": stride, "pad": pad, "ceil_mode": ceil_mode}
    maximum = F.max_pool2d(x, kernel, stride, 1, ceil_mode=ceil_mode)
    assert_close(pooling.max_pool(x, kernel, "custom", **fixed), maximum)
    for exclude in (False, True):
        got = pooling.avg_pool(RUN, x, kernel, "custom", exclude_padding_from_average=exclude, **fixed)
        assert_close(got, F.avg_pool2d(x, kernel, stride, 1, ceil_mode=ceil_mode, count_include_pad=not exclude))


def test_same_padding_puts_the_odd_element_last_and_same_lower_first():
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert pooling.avg_pool(RUN, x, [2], "same").tolist() == [[[1.5, 2.5, 1.5]]]
    assert pooling.avg_pool(RUN, x, [2], "same_lower").tolist() == [[[0.5, 1.5, 2.5]]]
    assert pooling.avg_pool(RUN, x, [2], "same", exclude_padding_from_average=True).tolist() == [[[1.5, 2.5, 3.0]]]
    assert pooling.max_pool(-x, [2], "same").tolist() == [[[-1, -2, -3]]]


def test_l2_pooling_is_the_root_of_the_sum_of_squares():
    x = torch.tensor([[[3.0, -4.0, 12.0]]])
    assert_close(pooling.l2_pool(RUN, x, [2], "valid"), torch.tensor([[[5.0, 160**0.5]]]))
    assert_close(pooling.l2_pool(RUN, x, [2], "same", [2]), torch.tensor([[[5.0, 12.0]]]))


def test_pooling_accumulates_as_the_policy_says():
    x = torch.full((1, 1, 4096), 1.0)
    x[0, 0, 0] = 32768.0  # fp16 counts in 32s there: a block of 31 ones more is rounded to 32, then each to 32
    x[0, 0, 32:] = 0.25  # a block of eight is rounded away
    total = pooling.avg_pool(Run(make_policy("acc16"), None), x, [4096], "valid") * 4096
    assert total.item() == 32800


# Convolution


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "dilation", "pad"), [(1, 1, 0), (2, 1, 1), (3, 2, 2), (2, 3, 0)])
def test_transposed_convolution_matches_torch(stride, dilation, pad, groups):
    for x, kernel in ((SIGNAL, [3]), (IMAGE, [3, 2]), (VOLUME, [2, 3, 2])):
        n = len(kernel)
        weight, bias = T(b.random((4, 3, *kernel), 5)), T(b.random((3 * groups,), 6))
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
        expected = transposed(T(x), weight, bias, stride, pad, groups=groups, dilation=dilation)
        got = conv.conv_transpose(
            RUN, T(x), weight, bias, [pad] * 2 * n, None, "custom", [stride] * n, [dilation] * n, groups
        )
        assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_transposed_convolution_takes_away_different_paddings_at_both_ends():
    weight = T(b.random((4, 2, 3, 3), 7))
    full = F.conv_transpose2d(T(IMAGE), weight, stride=2)
    got = conv.conv_transpose(RUN, T(IMAGE), weight, pad=[1, 0, 2, 3], pad_type="custom", strides=[2, 2])
    assert_close(got, full[:, :, 1:, 2:-3], atol=1e-5, rtol=1e-5)
    wide = conv.conv_transpose(RUN, T(IMAGE), weight, pad=[3, 3, 0, 0], pad_type="custom", strides=[2, 2])
    assert_close(wide, full[:, :, 3:-3], atol=1e-5, rtol=1e-5)  # more than the kernel reaches


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [10, 11, 12])
def test_same_transposed_convolution_is_the_gradient_of_a_same_convolution(kernel, size):
    stride = 3
    weight, x = T(b.random((4, 2, kernel), 8)), T(b.random((1, 4, -(-size // stride)), 9))
    image = torch.zeros(1, 2, size, requires_grad=True)
    total = max(0, (x.shape[2] - 1) * stride + kernel - size)
    forward = F.conv1d(F.pad(image, (total // 2, total - total // 2)), weight, stride=stride)
    (expected,) = torch.autograd.grad(forward, image, x)
    got = conv.conv_transpose(RUN, x, weight, output_shape=[1, 2, size], pad_type="same", strides=[stride])
    assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if size == 12:
        assert_close(conv.conv_transpose(RUN, x, weight, pad_type="same", strides=[stride]), got)


def test_transposed_convolution_rounds_as_the_policy_says():
    x, weight = torch.full((1, 64, 1), 1.0), torch.full((64, 1, 2), 1 / 64)
    weight[0] = 2048.0  # fp16 counts in twos there: what a block of channels adds is rounded away
    got = conv.conv_transpose(Run(make_policy("acc16"), None), x, weight)
    assert got.tolist() == [[[2048.0, 2048.0]]]


def test_convolutions_in_a_program(tmp_path):
    weight, down = b.random((6, 2, 3, 2), 10), b.random((4, 3, 2, 2), 11)
    custom = {"strides": [2, 2], "groups": 2, "pad_type": "custom", "pad": [1, 1, 0, 0]}
    cases = {
        "lower": (
            lambda name, x: mb.conv(x=x, weight=weight, groups=2, pad_type="same_lower", name=name),
            F.conv2d(F.pad(T(IMAGE), (1, 0, 1, 1)), T(weight), groups=2),
        ),
        "up": (
            lambda name, x: mb.conv_transpose(x=x, weight=down, name=name, **custom),
            F.conv_transpose2d(T(IMAGE), T(down), stride=2, padding=(1, 0), groups=2),
        ),
    }
    check(tmp_path, {"x": IMAGE}, cases, atol=1e-5)


def test_a_quantized_convolution_scales_its_weight():
    codes, scale, shift = torch.arange(24, dtype=torch.uint8).reshape(2, 4, 3), T(b.random((2,), 12)), torch.tensor(0.5)
    got = conv.conv_quantized(RUN, T(SIGNAL), codes, "linear", scale, shift, strides=[2])
    expected = F.conv1d(T(SIGNAL), codes * scale[:, None, None] + 0.5, stride=2)
    assert_close(got, expected, atol=1e-4, rtol=1e-5)


# Resizing


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("STRICT_ALIGN_CORNERS", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("ALIGN_CORNERS", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("DEFAULT", 5, [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", 5, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("UNALIGN_CORNERS", 5, [0, 0.1, 0.5, 0.9, 1]),
        ("DEFAULT", 6, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("OFFSET_CORNERS", 6, [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12]),
        ("STRICT_ALIGN_CORNERS", 1, [0]),
        ("ALIGN_CORNERS", 1, [0.5]),
        ("OFFSET_CORNERS", 1, [0.5]),
    ],
)
def test_sampling_modes_choose_the_documented_points(mode, size, expected):
    expected = torch.tensor(expected, dtype=torch.float32).reshape(1, 1, size)
    assert_close(resizing.resize_bilinear(ROW, 1, size, mode), expected)
    assert_close(resizing.resize(ROW, [size], 1, "LINEAR", mode), expected)


@pytest.mark.parametrize("size", [(3, 5), (14, 16), (10, 20), (1, 1)])
def test_bilinear_resizing_matches_torch(size):
    aligned = F.interpolate(T(IMAGE), size, mode="bilinear", align_corners=True)
    centred = F.interpolate(T(IMAGE), size, mode="bilinear", align_corners=False)
    assert_close(resizing.resize_bilinear(T(IMAGE), *size, "STRICT_ALIGN_CORNERS"), aligned)
    assert_close(resizing.resize_bilinear(T(IMAGE), *size, "UNALIGN_CORNERS"), centred)


@pytest.mark.parametrize("scale", [(3.0, 4.0), (2.5, 2.0), (0.5, 0.75), (1.3, 1.7)])
def test_upsampling_matches_torch_with_a_recomputed_scale(scale):
    for align in (True, False):
        fixed: dict[str, Any] = {"mode": "bilinear", "align_corners": align, "recompute_scale_factor": True}
        assert_close(resizing.upsample_bilinear(T(IMAGE), *scale, align), F.interpolate(T(IMAGE), None, scale, **fixed))
    nearest = F.interpolate(T(IMAGE), None, scale, mode="nearest", recompute_scale_factor=True)
    assert_close(resizing.upsample_nearest_neighbor(T(IMAGE), *scale), nearest)


def test_nearest_resizing_takes_the_element_at_the_centre():
    for size in (1, 3, 5, 14, 15):
        exact = F.interpolate(T(SIGNAL), size, mode="nearest-exact")
        assert_close(resizing.resize_nearest_neighbor(T(SIGNAL).unsqueeze(2), 1, size).squeeze(2), exact)
    got = resizing.resize(torch.tensor([1.0, 2.0]), [3], 1, "NEAREST_NEIGHBOR", "DEFAULT")
    assert got.tolist() == [1, 2, 2]  # the points 0, 2/3 and 1


def test_a_scaled_size_is_rounded_in_single_precision():
    assert resizing.upsample_bilinear(torch.zeros(1, 1, 10), 1.0, float(np.float32(0.7))).shape == (1, 1, 7)


def test_resize_keeps_the_dimensions_that_are_zero_or_not_named():
    x = T(b.random((2, 3, 4, 5), 13))
    assert resizing.resize(x, [9, 0, 10], 2).shape == (2, 3, 4, 10)
    assert resizing.resize(x, [6, 7, 8], 3).shape == (2, 6, 7, 8)
    assert_close(resizing.resize(x, [0, 0], 2), x)


def test_resizing_and_cropping_in_a_program(tmp_path):
    image = b.random((1, 2, 4, 5), 14)
    half = F.interpolate(T(image), (8, 10), mode="bilinear", align_corners=False)
    cases = {
        "crop": (lambda name, x: mb.crop(x=x, crop_height=[1, 0], crop_width=[0, 2], name=name), image[:, :, 1:, :-2]),
        "half": (
            lambda name, x: mb.upsample_bilinear(
                x=x, scale_factor_height=2, scale_factor_width=2, align_corners=False, name=name
            ),
            half,
        ),
        "resized": (
            lambda name, x: mb.resize(
                x=x, shape=[8, 10], resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS", name=name
            ),
            half,
        ),
        "nearest": (
            lambda name, x: mb.resize_nearest_neighbor(x=x, target_size_height=8, target_size_width=5, name=name),
            image.repeat(2, 2),
        ),
        "boxes": (
            lambda name, x: mb.crop_resize(
                x=x, boxes=np.array([[0.0, 1, 2, 4]], np.float32), target_height=3, target_width=4, name=name,
                sampling_mode="ALIGN_CORNERS",
            ),
            image[:, :, :3, 1:],
        ),
    }  # fmt: skip
    check(tmp_path, {"x": image}, cases)


# Boxes


def boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows)


def cut(rows: torch.Tensor, size: tuple[int, int], **fixed) -> list[float]:
    fixed = {"sampling_mode": "ALIGN_CORNERS", "box_indices": [0] * len(rows)} | fixed
    got = resizing.crop_resize(SQUARE, boxes=rows, target_height=size[0], target_width=size[1], **fixed)
    assert got.shape == (len(rows), 1, *size)
    return got.flatten().tolist()


def test_every_box_convention_names_the_same_box():
    expected = [5.0, 6.0, 7.0, 9.0, 10.0, 11.0]  # rows 1 to 2, columns 0 to 2
    for mode, row in {
        "CORNERS_HEIGHT_FIRST": (1.0, 0, 2, 2),
        "CORNERS_WIDTH_FIRST": (0.0, 1, 2, 2),
        "CENTER_SIZE_HEIGHT_FIRST": (1.5, 1, 1, 2),
        "CENTER_SIZE_WIDTH_FIRST": (1.0, 1.5, 2, 1),
    }.items():
        assert cut(boxes(row), (2, 3), box_coordinate_mode=mode) == expected, mode
        scaled = boxes(row) / 3
        assert cut(scaled, (2, 3), box_coordinate_mode=mode, normalized_coordinates=True) == pytest.approx(expected)
        assert cut(boxes(row) * 4, (2, 3), box_coordinate_mode=mode, spatial_scale=0.25) == expected


def test_a_box_may_be_turned_round_and_reach_outside():
    assert cut(boxes((2.0, 2, 1, 1)), (2, 2)) == [11, 10, 7, 6]
    assert cut(boxes((1.0, 1, 2, 2)), (1, 1)) == [8.5]
    assert cut(boxes((2.0, 0, 4, 0)), (2, 1), pad_value=7.0) == [9, 7]
    assert cut(boxes((0.0, -1, 0, 1)), (1, 3)) == [0, 1, 2]
    assert cut(boxes((float("nan"), 0, 1, 1)), (1, 1)) == [0]


def test_sampling_modes_apply_to_the_box():
    box = boxes((0.0, 1, 0, 2))  # the elements 2 and 3
    grids = {
        "STRICT_ALIGN_CORNERS": [2, 2.25, 2.5, 2.75, 3],
        "DEFAULT": [2, 2.4, 2.8, 3, 3],
        "OFFSET_CORNERS": [2.1, 2.3, 2.5, 2.7, 2.9],
        "UNALIGN_CORNERS": [2, 2.1, 2.5, 2.9, 3],
    }
    for mode, expected in grids.items():
        assert cut(box, (1, 5), sampling_mode=mode) == pytest.approx(expected), mode


def test_boxes_of_earlier_targets_cut_every_image_or_one(tmp_path):
    images = b.random((2, 1, 4, 4), 15)
    every = np.array([[0, 0, 1, 1], [1, 2, 3, 3]], np.float32).reshape(2, 1, 4, 1, 1)
    size: dict[str, Any] = {"target_height": 2, "target_width": 2, "sampling_mode": "ALIGN_CORNERS"}

    @mb.program(input_specs=[b.tensor(images.shape)], opset_version=ct.target.iOS16)
    def program(x):
        return mb.crop_resize(x=x, roi=every, name="every", **size)

    found = old_target(tmp_path, program, ct.target.iOS16, {"x": images})["every"]
    corners = images[:, :, [[[0], [1]], [[1], [3]]], [[[0, 1]], [[2, 3]]]]  # (2, 1, N, 2, 2)
    np.testing.assert_allclose(found, corners.transpose(2, 0, 1, 3, 4), atol=1e-6)
    one = torch.tensor([1.0, 2, 0, 3, 1]).reshape(1, 1, 5, 1, 1)
    assert_close(resizing.crop_resize(T(images), roi=one, **size), T(images[None, 1:, :, 2:, :2]))


def test_coremltools_declares_one_numbered_box_with_the_shape_of_all_images(tmp_path):
    """A fault of coremltools: its documentation says (N, 1, C, h, w) for boxes that name their image."""
    one = np.zeros((3, 1, 5, 1, 1), np.float32)

    @mb.program(input_specs=[b.tensor((2, 1, 4, 4))], opset_version=ct.target.iOS16)
    def program(x):
        return mb.crop_resize(x=x, roi=one, name="y")

    with pytest.raises(PackageError, match=r"shape \[3, 1, 1, 1, 1\], declared is fp32\[3, 2, 1, 1, 1\]"):
        old_target(tmp_path, program, ct.target.iOS16, {"x": np.zeros((2, 1, 4, 4), np.float32)})


def old_target(tmp_path: Path, program: Any, target: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "old.mlpackage"))
    return mil.load(tmp_path / "old.mlpackage").predict(inputs)


# Sampling


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_resampling_matches_grid_sample(mode, align):
    grid = T(b.random((2, 5, 6, 2), 16, 1.5))
    pairs = {"zeros": "constant", "border": "border", "reflection": "reflection" if align else "symmetric"}
    for theirs, ours in pairs.items():
        expected = F.grid_sample(T(IMAGE), grid, mode, theirs, align)
        got = sampling.resample(T(IMAGE), grid, mode, ours, 0.0, "normalized_minus_one_to_one", align)
        assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_coordinate_modes_name_the_same_points():
    places = T(b.random((1, 3, 4, 2), 17, 2.0)) + 2  # in elements
    plain = sampling.resample(SQUARE, places, "bilinear", "constant", 9.0, "unnormalized", False)
    for align in (True, False):
        unit = places / 3 if align else (places + 0.5) / 4
        for mode, at in (("normalized_zero_to_one", unit), ("normalized_minus_one_to_one", 2 * unit - 1)):
            assert_close(
                sampling.resample(SQUARE, at, "bilinear", "constant", 9.0, mode, align), plain, atol=1e-5, rtol=0
            )


def test_paddings_continue_the_image_as_documented():
    x, places = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3), torch.zeros(1, 1, 9, 2)
    places[..., 0] = torch.arange(-3.0, 6)
    lines = {
        "constant": [5, 5, 5, 1, 2, 3, 5, 5, 5],
        "border": [1, 1, 1, 1, 2, 3, 3, 3, 3],
        "reflection": [2, 3, 2, 1, 2, 3, 2, 1, 2],
        "symmetric": [3, 2, 1, 1, 2, 3, 3, 2, 1],
    }
    for (padding, expected), mode in itertools.product(lines.items(), ("nearest", "bilinear")):
        got = sampling.resample(x, places, mode, padding, 5.0, "unnormalized", True)
        assert got.flatten().tolist() == expected, (padding, mode)


@pytest.mark.parametrize("padding", ["constant", "border", "reflection", "symmetric"])
def test_coordinates_that_are_no_numbers_stay_inside(padding):
    places = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30]).reshape(1, 2, 1, 2)
    got = sampling.resample(SQUARE, places, "bilinear", padding, 0.0, "unnormalized", True)
    assert ((got >= 0) & (got <= 16)).all()


def test_affine_matches_torch():
    theta = T(b.random((2, 2, 3), 18))
    for align, size in ((True, (3, 5)), (True, (2, 4)), (False, (3, 5)), (False, (1, 4))):
        grid = F.affine_grid(theta, [2, 4, *size], align)
        expected = F.grid_sample(T(IMAGE), grid, "bilinear", "zeros", align)
        mode = ("bilinear", "constant", 0.0, "normalized_minus_one_to_one", align)
        assert_close(sampling.affine(T(IMAGE), theta.flatten(1), *size, *mode), expected, atol=1e-5, rtol=1e-5)


def test_sampling_in_a_program(tmp_path):
    grid, theta = b.random((2, 3, 3, 2), 19), b.random((1, 6), 20)
    fixed = {"sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": 0.0, "align_corners": True}
    fixed["coordinates_mode"] = "normalized_minus_one_to_one"
    turned = F.affine_grid(T(theta).reshape(1, 2, 3).expand(2, 2, 3), [2, 4, 3, 3], True)
    cases = {
        "resample": (
            lambda name, x, g: mb.resample(x=x, coordinates=g, name=name, **fixed),
            F.grid_sample(T(IMAGE), T(grid), align_corners=True),
        ),
        "affine": (
            lambda name, x, g: mb.affine(
                x=x, transform_matrix=theta, output_height=3, output_width=3, name=name, **fixed
            ),
            F.grid_sample(T(IMAGE), turned, align_corners=True),
        ),
    }
    check(tmp_path, {"x": IMAGE, "g": grid}, cases, atol=1e-5)


# Non-maximum suppression

# Three boxes side by side, each overlapping the next by half: intersection over union 1 / 3; a fourth far away.
PLACES = torch.tensor([[0.0, 0, 2, 2], [1, 0, 2, 2], [2, 0, 2, 2], [9, 9, 1, 1]])
BEST = torch.tensor([[0.5], [0.9], [0.8], [0.1]])


def kept(iou: float, score: float = 0.0, limit: int = 4, scores: torch.Tensor = BEST, per_class: bool = False):
    found = detection.non_maximum_suppression(PLACES[None], scores[None], iou, limit, score, per_class)
    assert [list(f.shape) for f in found] == [[1, limit, 4], [1, limit, scores.shape[1]], [1, limit], [1]]
    n = int(found[3])
    numbers = found[2][0].tolist()
    assert numbers[n:] == [-1] * (limit - n)
    assert not found[0][0, n:].any()
    assert not found[1][0, n:].any()
    assert_close(found[0][0, :n], PLACES[numbers[:n]])
    assert_close(found[1][0, :n], scores[numbers[:n]])
    return numbers[:n]


def test_suppression_keeps_the_best_of_those_that_overlap():
    assert kept(0.3) == [1, 3]
    assert kept(0.34) == [1, 2, 0, 3]
    assert kept(0.34, limit=2) == [1, 2]
    assert kept(0.34, score=0.5) == [1, 2, 0]
    assert kept(0.3, score=2.0) == [1]  # one box is given even where none is good enough


def test_suppression_by_class_leaves_other_classes_alone():
    scores = torch.tensor([[0.5, 0.0], [0.9, 0.2], [0.1, 0.8], [0.1, 0.0]])
    assert kept(0.3, scores=scores) == [1, 3]
    assert kept(0.3, scores=scores, per_class=True) == [1, 2, 3]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6])
def test_what_suppression_keeps_and_drops_is_justified(threshold):
    rng = np.random.default_rng(21)
    places, scores = rng.uniform(1, 20, (60, 4)).astype(np.float32), rng.uniform(size=(60, 1)).astype(np.float32)
    found = detection.non_maximum_suppression(T(places)[None], T(scores)[None], threshold, 60, 0.2)
    numbers = found[2][0, : int(found[3])].tolist()
    low, high = places[:, :2] - places[:, 2:] / 2, places[:, :2] + places[:, 2:] / 2
    sides = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    common, area = sides.clip(0).prod(-1), places[:, 2:].prod(-1)
    close = common / (area[:, None] + area - common) > threshold
    assert [float(s) for s in scores[numbers, 0]] == sorted(scores[numbers, 0], reverse=True)
    assert not close[np.ix_(numbers, numbers)][~np.eye(len(numbers), dtype=bool)].any()
    for dropped in set(range(60)) - set(numbers):
        better = [n for n in numbers if close[n, dropped] and scores[n] > scores[dropped]]
        assert better or scores[dropped] < 0.2


def test_equal_scores_and_empty_boxes_are_kept_in_order():
    empty = torch.zeros(1, 3, 4)
    found = detection.non_maximum_suppression(empty, torch.ones(1, 3, 1), 0.5, 3, 0.0)
    assert found[2].tolist() == [[0, 1, 2]]


def test_suppression_of_both_targets_in_programs(tmp_path):
    places, scores = PLACES.numpy()[None], BEST.numpy()[None]
    fixed = {"iou_threshold": 0.3, "max_boxes": 3}

    @mb.program(input_specs=[b.tensor((1, 4, 4)), b.tensor((1, 4, 1))], opset_version=ct.target.iOS15)
    def program(x, s):
        found = mb.non_maximum_suppression(boxes=x, scores=s, score_threshold=0.0, **fixed)
        return tuple(mb.identity(x=f, name=name) for f, name in zip(found, "abcd", strict=True))

    old = old_target(tmp_path, program, ct.target.iOS15, {"x": places, "s": scores})
    assert old["c"].tolist() == [[1, 3, -1]]
    assert old["d"].tolist() == [2]

    def body(x, s):
        found = mb.non_maximum_suppression(boxes=x, scores=s, **fixed)
        return tuple(mb.identity(x=f, name=name) for f, name in zip(found, "abc", strict=True))

    new = b.load(tmp_path / "new.mlpackage", [b.tensor((1, 4, 4)), b.tensor((1, 1, 4))], body, "fp32")
    results = new.predict({"x": places.transpose(0, 2, 1), "s": scores.transpose(0, 2, 1)})
    assert results["c"].tolist() == [[1, 3, -1]]
    np.testing.assert_array_equal(results["a"], old["a"].transpose(0, 2, 1))
    np.testing.assert_array_equal(results["b"], old["b"].transpose(0, 2, 1))


# Misuse


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: pooling.max_pool(x, [2], "valid"), "kernel_sizes"),
        (lambda x: pooling.max_pool(x, [0, 2], "valid"), "positive"),
        (lambda x: pooling.max_pool(x, [2, 2], "odd"), "unknown pad_type"),
        (lambda x: pooling.max_pool(x, [2, 2], "custom", None, [1, 1]), "expected 4 numbers"),
        (lambda x: pooling.max_pool(x, [2, 2], "custom", None, [2**30] * 4), "refusing to allocate"),
        (lambda x: pooling.avg_pool(RUN, x, [2, 2], "custom", None, [-1] * 4), "must not be negative"),
        (lambda x: conv.conv(RUN, x, torch.ones(1, 3, 1, 1)), "do not agree"),
        (lambda x: conv.conv(RUN, x, torch.ones(1, 4, 1, 1), strides=[1]), "strides"),
        (lambda x: conv.conv(RUN, x, torch.ones(1, 4, 1)), "kernel"),
        (lambda x: conv.conv_transpose(RUN, x, torch.ones(3, 1, 1, 1)), "do not agree"),
        (lambda x: conv.conv_transpose(RUN, x, torch.ones(4, 1, 1, 1), strides=[2**20] * 2), "refusing to allocate"),
        (lambda x: conv.conv_transpose(RUN, x, torch.ones(4, 1, 1, 1), pad=[9] * 4, pad_type="custom"), "size"),
        (lambda x: conv.conv_transpose(RUN, x, torch.ones(4, 1, 1, 1), output_shape=[1]), "output_shape"),
        (lambda x: conv.conv_quantized(RUN, x, x, "lut", x, x), "linear"),
        (lambda x: resizing.resize_bilinear(x, 0, 1), "cannot resize"),
        (lambda x: resizing.resize_bilinear(x, 2**30, 2**30), "refusing to allocate"),
        (lambda x: resizing.resize_bilinear(x, 2, 2, "ODD"), "sampling_mode"),
        (lambda x: resizing.resize(x, [1, 1], 3), "resized_dims"),
        (lambda x: resizing.resize(x, [1, 1], 2, "ODD"), "interpolation_mode"),
        (lambda x: resizing.upsample_bilinear(x, 2, 2, True, True), "exclude each other"),
        (lambda x: resizing.upsample_nearest_neighbor(x, -1.0, 1.0), "cannot resize"),
        (lambda x: resizing.crop(x, [4, 4], [0, 0]), "cannot crop"),
        (lambda x: resizing.crop_resize(x), "roi"),
        (lambda x: resizing.crop_resize(x, boxes=torch.ones(1, 3)), "expected 4 numbers"),
        (lambda x: resizing.crop_resize(x, boxes=torch.ones(1, 4), box_indices=[2]), "image numbers"),
        (lambda x: resizing.crop_resize(x, boxes=torch.ones(1, 4), box_coordinate_mode="ODD"), "box_coordinate_mode"),
        (lambda x: resizing.crop_resize(x, boxes=torch.ones(1, 4), target_width=2**40), "refusing to allocate"),
        (lambda x: sampling.resample(x, x, "bilinear", "border", 0.0, "unnormalized", True), "coordinates"),
        (lambda x: sampling.resample(x, x[..., :2], "cubic", "border", 0.0, "unnormalized", True), "sampling_mode"),
        (lambda x: sampling.resample(x, x[..., :2], "nearest", "odd", 0.0, "unnormalized", True), "padding_mode"),
        (lambda x: sampling.resample(x, x[..., :2], "nearest", "border", 0.0, "odd", True), "coordinates_mode"),
        (lambda x: detection.non_maximum_suppression(x[0], x[0], 0.5, 1, 0.0), "do not agree"),
        (lambda x: detection.non_maximum_suppression(x[:1, :1, 0, :4], x[:1, :1, 0, :1], 0.5, -1, 0.0), "allocate"),
    ],
)  # fmt: skip
def test_misuse_is_one_clear_error(call, message):
    with pytest.raises((ValueError, PackageError), match=message):
        call(T(IMAGE))
