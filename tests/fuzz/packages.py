"""The sound packages that fuzzing starts from: small, and of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.proto import Model_pb2

from tests.unit import mil_build as b


def decoder(folder: Path) -> None:
    """One attention step with a cache kept in a state."""

    def body(x, at, cache):
        old = mb.read_state(input=cache)
        new = mb.linear(x=x, weight=b.random((8, 8), 1).astype(np.float16))
        end = mb.add(x=at, y=np.int32(1))
        zero, full = np.zeros(1, np.int32), np.array([8], np.int32)
        begin, end = mb.concat(values=[at, zero], axis=0), mb.concat(values=[end, full], axis=0)
        made = mb.slice_update(x=old, update=new, begin=begin, end=end)
        mb.coreml_update_state(state=cache, value=made)
        scores = mb.matmul(x=new, y=made, transpose_y=True)
        return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=made, name="y")

    specs = [b.tensor((1, 8), "fp16"), b.tensor((1,), "int32"), b.state((4, 8))]
    b.build(folder, specs, body)


def convolution(folder: Path) -> None:
    """Compressed weights of every kind, a pooling and a resize."""
    rng = np.random.default_rng(0)

    def body(x):
        lut = mb.constexpr_lut_to_dense(
            indices=rng.integers(0, 16, (8, 3, 3, 3)).astype(types.np_uint4_dtype),
            lut=b.random((1, 1, 1, 1, 16, 1), 2).astype(np.float16),
        )
        blocks = mb.constexpr_blockwise_shift_scale(
            data=rng.integers(-8, 8, (8, 8)).astype(types.np_int4_dtype), scale=b.random((8, 2), 3).astype(np.float16)
        )
        mask = rng.integers(0, 2, (8, 8))
        sparse = mb.constexpr_sparse_to_dense(
            nonzero_data=b.random((int(mask.sum()),), 4).astype(np.float16), mask=mask.astype(types.np_uint1_dtype)
        )
        y = mb.relu(x=mb.conv(x=x, weight=lut, pad_type="same", strides=[2, 2]))
        y = mb.avg_pool(x=y, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
        y = mb.upsample_bilinear(x=y, scale_factor_height=2.0, scale_factor_width=2.0)
        y = mb.reduce_mean(x=y, axes=[2, 3])
        return mb.add(x=mb.matmul(x=y, y=blocks), y=mb.linear(x=y, weight=sparse), name="y")

    b.build(folder, [b.tensor((1, 3, 8, 8), "fp16")], body)


def loops(folder: Path) -> None:
    """A while loop around a branch, and a list that grows in it."""

    def body(x):
        names = mb.make_list(init_length=2, dynamic_length=True, elem_shape=[3])

        def go_on(i, ls):
            return mb.less(x=i, y=np.int32(4))

        def step(i, ls):
            even = mb.equal(x=mb.mod(x=i, y=np.int32(2)), y=np.int32(0))
            value = mb.cond(pred=even, _true_fn=lambda: mb.add(x=x, y=1.0), _false_fn=lambda: mb.mul(x=x, y=2.0))
            return mb.add(x=i, y=np.int32(1)), mb.list_write(ls=ls, index=i, value=value)

        _, ls = mb.while_loop(_cond=go_on, _body=step, loop_vars=(np.int32(0), names))
        return mb.list_gather(ls=ls, indices=np.array([0, 1, 3], np.int32), name="y")

    b.build(folder, [b.tensor((3,))], body, "fp32")


def shapes(folder: Path) -> None:
    """Operators whose results are as large as their arguments say."""

    def body(x, n):
        tiled = mb.tile(x=x, reps=[2, 3])
        padded = mb.pad(x=tiled, pad=[1, 1, 2, 2], mode="reflect")
        cut = mb.slice_by_index(x=padded, begin=[0, 1], end=[6, 9], stride=[1, 2])
        hot = mb.one_hot(indices=n, one_hot_vector_size=5)
        filled = mb.fill(shape=mb.concat(values=[n, np.array([4], np.int32)], axis=0), value=1.0)
        near = mb.gather(x=cut, indices=n, axis=0)
        top, _ = mb.topk(x=cut, k=2, axis=1)
        counted = mb.range_1d(start=np.int32(0), end=mb.squeeze(x=n), step=np.int32(1))
        parts = mb.split(x=mb.transpose(x=cut, perm=[1, 0]), num_splits=2, axis=0)
        joined = mb.stack(values=parts, axis=0)
        moved = mb.reshape(x=mb.scatter(data=cut, indices=n, updates=near), shape=[-1])
        sums = [mb.reduce_sum(x=mb.cast(x=v, dtype="fp32"), keep_dims=False) for v in (hot, filled, top, counted)]
        return mb.add(x=mb.cumsum(x=moved), y=mb.add(x=sums[0], y=sums[3])), joined, sums[1], sums[2]

    b.build(folder, [b.tensor((2, 3)), b.tensor((1,), "int32")], body, "fp32")


def classifier(folder: Path) -> None:
    def body(x):
        return mb.softmax(x=mb.linear(x=x, weight=b.random((3, 4), 5)), axis=-1, name="scores")

    labels = ct.ClassifierConfig(["cat", "dog", "owl"])
    b.build(folder, [b.tensor((1, 4))], body, "fp32", classifier_config=labels)


def recurrent(folder: Path) -> None:
    def body(x):
        weights = {"weight_ih": b.random((8, 3), 6), "weight_hh": b.random((8, 2), 7)}
        zero = np.zeros((1, 2), np.float32)
        return mb.lstm(x=x, initial_h=zero, initial_c=zero, output_sequence=True, **weights)

    b.build(folder, [b.tensor((4, 1, 3))], body, "fp32")


def spatial(folder: Path) -> None:
    """Windows, grids and boxes."""

    def body(x):
        grid, boxes = b.random((1, 4, 4, 2), 8), np.array([[0.1, 0.1, 0.5, 0.6]], np.float32)
        y = mb.conv_transpose(x=x, weight=b.random((4, 2, 3, 3), 9), strides=[2, 2], pad_type="same", groups=2)
        y = mb.max_pool(x=y, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True)
        y = mb.pixel_shuffle(x=y, upscale_factor=2)
        mode = {"sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": 0.0, "align_corners": False}
        a = mb.resample(x=y, coordinates=grid, coordinates_mode="normalized_minus_one_to_one", **mode)
        c = mb.crop_resize(x=y, boxes=boxes, target_height=4, target_width=4, normalized_coordinates=True)
        d = mb.resize_bilinear(x=y, target_size_height=4, target_size_width=4)
        e = mb.space_to_depth(x=mb.batch_norm(x=d, mean=[0.0], variance=[1.0]), block_size=2)
        return (
            mb.add(x=a, y=c),
            e,
            mb.local_response_norm(x=e, size=3),
            mb.crop(x=d, crop_height=[1, 1], crop_width=[1, 0]),
        )

    b.build(folder, [b.tensor((1, 4, 6, 6))], body, "fp32")


def places(folder: Path) -> None:
    """Gathers, scatters and products."""

    def body(x, n):
        y = mb.scatter_nd(data=x, indices=mb.expand_dims(x=n, axes=[1]), updates=mb.gather(x=x, indices=n, axis=0))
        y = mb.slice_update(x=y, update=mb.gather_nd(x=x, indices=[[0], [1]]), begin=[0, 0], end=[4, 6], stride=[2, 1])
        near = mb.gather_along_axis(x=y, indices=np.zeros((4, 2), np.int32), axis=1)
        y = mb.scatter_along_axis(data=y, indices=np.ones((4, 2), np.int32), updates=near, axis=1, mode="max")
        y = mb.reverse_sequence(x=y, lengths=[1, 2, 3, 4], seq_axis=1, batch_axis=0)
        q = mb.reshape(x=y, shape=[1, 2, 4, 3])
        z = mb.scaled_dot_product_attention(query=q, key=q, value=q)
        e = mb.einsum(values=[z, mb.transpose(x=z, perm=[0, 3, 2, 1])], equation="nchw,nwhu->nchu")
        boxes, scores = (
            mb.reshape(x=mb.slice_by_size(x=y, begin=[0, 0], size=[4, 4]), shape=[1, 4, 4]),
            np.ones((1, 2, 4)),
        )
        kept = mb.non_maximum_suppression(
            boxes=boxes, scores=scores.astype(np.float32), iou_threshold=0.5, max_boxes=3, per_class_suppression=False
        )
        low = mb.quantize(input=y, scale=0.1, output_dtype="int8")
        return e, kept[2], mb.dequantize(input=low, scale=0.1), mb.non_zero(x=y)

    b.build(folder, [b.tensor((4, 6)), b.tensor((2,), "int32")], body, "fp32")


def functions(folder: Path) -> None:
    """Two functions that share a weight file; written by hand."""
    model = b.raw_model(shape=(16,))
    b.add_blob_const(model, "w", "fp32", (16,), 64)
    b.operations(model)[1].inputs["y"].arguments[0].name = "w"
    described = Model_pb2.ModelDescription()
    described.defaultFunctionName = "main"
    for name in ("main", "other"):
        model.mlProgram.functions[name].CopyFrom(model.mlProgram.functions["main"])
        function = described.functions.add(name=name)
        function.input.extend(model.description.input)
        function.output.extend(model.description.output)
    model.description.CopyFrom(described)
    b.write_package(folder, model, b.weight_bin(2, b.random((16,)).tobytes()))


BUILDERS: dict[str, Callable[[Path], Any]] = {
    f.__name__: f for f in (decoder, convolution, loops, shapes, classifier, recurrent, spatial, places, functions)
}


def build(name: str, folder: Path) -> Path:
    """The package `name`, with its model written in one fixed order."""
    BUILDERS[name](folder)
    path = folder / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model.FromString(path.read_bytes())
    path.write_bytes(model.SerializeToString(deterministic=True))
    return folder
