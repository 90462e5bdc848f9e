"""distill.mil: what an application passes and gets: images, shapes, optional inputs, states, functions, types."""

from __future__ import annotations

import subprocess
import sys

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import get_new_symbol
from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction
from coremltools.proto import Model_pb2
from PIL import Image

from distill import mil
from distill.errors import InputError, PackageError
from distill.mil.coreml_proxy import MLModelProxy
from distill.mil.images import to_pil
from distill.mil.policy import make_policy
from distill.mil.program import POLICIES
from tests.unit import mil_build as b

# 2 x 3 pixels; a channel is its own range of numbers
PIXELS = np.stack([np.arange(6), np.arange(6) + 100, np.arange(6) + 200], -1).reshape(2, 3, 3).astype(np.uint8)
LAYOUT = ct.colorlayout


def symbol():
    return get_new_symbol()


def image_program(path, layout, channels: int, output=None, shape=None, precision: str = "fp32") -> mil.Program:
    """An image as it came, and each channel's sum."""

    def body(x0):
        return mb.mul(x=x0, y=1.0, name="same"), mb.reduce_sum(x=x0, axes=[2, 3], keep_dims=False, name="sums")

    sizes = (2, 3) if shape is None else (symbol(), symbol())
    shape = shape or ct.Shape((1, channels, 2, 3))
    inputs = [ct.ImageType("x0", shape=shape, color_layout=layout)]
    b.build(path, [b.tensor((1, channels, *sizes))], body, precision, inputs=inputs)
    if output is not None:
        describe_output_as_image(path, output)
    return mil.load(path)


def describe_output_as_image(path, layout) -> None:
    """What ct.convert does where it is given image outputs, which it ignores for a MIL program."""
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model.FromString(file.read_bytes())
    image = model.description.output[0].type.imageType
    image.width, image.height = 3, 2
    image.colorSpace = type(image).ColorSpace.Value(layout.name)
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(("layout", "sums"), [(LAYOUT.RGB, [15, 615, 1215]), (LAYOUT.BGR, [1215, 615, 15])])
def test_a_colour_image_comes_in_the_order_of_its_colour_space(tmp_path, layout, sums):
    program = image_program(tmp_path / "m.mlpackage", layout, 3)
    (feature,) = program.function().inputs
    assert (feature.kind, feature.color, feature.shape) == ("image", layout.name, (1, 3, 2, 3))
    outputs = program.predict({"x0": Image.fromarray(PIXELS)})
    assert outputs["sums"].tolist() == [sums]
    array = outputs["same"]
    assert array.shape == (1, 3, 2, 3)
    np.testing.assert_array_equal(program.predict({"x0": array})["same"], array)


def test_a_grey_image(tmp_path):
    program = image_program(tmp_path / "m.mlpackage", LAYOUT.GRAYSCALE, 1)
    outputs = program.predict({"x0": Image.fromarray(PIXELS[:, :, 1])})
    assert outputs["same"].tolist() == [[[[100, 101, 102], [103, 104, 105]]]]


def test_a_grey_image_of_any_number(tmp_path):
    program = image_program(
        tmp_path / "m.mlpackage", LAYOUT.GRAYSCALE_FLOAT16, 1, LAYOUT.GRAYSCALE_FLOAT16, precision="fp16"
    )
    values = np.array([[0.5, -300, 2], [0, 1, 1.25]], np.float32)
    outputs = program.predict({"x0": Image.fromarray(values)})
    assert outputs["same"][0, 0].tolist() == values.tolist()
    image = to_pil(program.function().outputs[0], outputs["same"])
    assert image.mode == "F"
    np.testing.assert_array_equal(np.asarray(image), values)


@pytest.mark.parametrize("layout", [LAYOUT.RGB, LAYOUT.BGR])
def test_an_output_becomes_an_image_of_its_colour_space(tmp_path, layout):
    program = image_program(tmp_path / "m.mlpackage", LAYOUT.RGB, 3, layout)
    outputs = program.predict({"x0": Image.fromarray(PIXELS)})
    image = to_pil(program.function().outputs[0], outputs["same"])
    expected = PIXELS if layout is LAYOUT.RGB else PIXELS[:, :, ::-1]
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_coremltools_gets_an_image(tmp_path):
    image_program(tmp_path / "m.mlpackage", LAYOUT.BGR, 3, LAYOUT.BGR)
    model = MLModelProxy(str(tmp_path / "m.mlpackage"), "ALL", "", {}, None)
    outputs = model.predict({"x0": Image.fromarray(PIXELS)})
    np.testing.assert_array_equal(np.asarray(outputs["same"]), PIXELS)


def test_numbers_are_rounded_and_cut_for_an_image():
    (feature,) = grey_features()
    image = to_pil(feature, np.array([[[[-3.0, 300.0, 1.6, 2.4]]]], np.float32))
    assert np.asarray(image).tolist() == [[0, 255, 2, 2]]
    with pytest.raises(InputError, match="not that of a GRAYSCALE image"):
        to_pil(feature, np.zeros((1, 3, 2, 2), np.float32))


def grey_features() -> list[mil.Feature]:
    kind = mil.TensorType("fp32", (1, 1, 1, 4))
    return [mil.Feature("y", "fp32", kind.shape, kind, "image", "GRAYSCALE")]


def test_the_wrong_image_is_one_clear_error(tmp_path):
    program = image_program(tmp_path / "m.mlpackage", LAYOUT.RGB, 3)
    with pytest.raises(InputError, match="takes an image of mode RGB, not L"):
        program.predict({"x0": Image.fromarray(PIXELS[:, :, 0])})
    with pytest.raises(InputError, match=r"has shape \[1, 3, 4, 4\], expected \[1, 3, 2, 3\]"):
        program.predict({"x0": Image.new("RGB", (4, 4))})
    plain = b.load(tmp_path / "n.mlpackage", [b.tensor((1, 3, 2, 3))], lambda x0: mb.relu(x=x0), "fp32")
    with pytest.raises(InputError, match="takes an array, got an image"):
        plain.predict({"x0": Image.fromarray(PIXELS)})


def test_an_image_may_have_one_of_several_sizes(tmp_path):
    shapes = ct.EnumeratedShapes([[1, 3, 2, 3], [1, 3, 4, 4]])
    program = image_program(tmp_path / "m.mlpackage", LAYOUT.RGB, 3, shape=shapes)
    for width, height in [(3, 2), (4, 4)]:
        assert program.predict({"x0": Image.new("RGB", (width, height))})["same"].shape == (1, 3, height, width)
    with pytest.raises(InputError, match=r"one of \[1, 3, 2, 3\], \[1, 3, 4, 4\]"):
        program.predict({"x0": Image.new("RGB", (4, 2))})


def test_an_image_may_have_a_range_of_sizes(tmp_path):
    shape = ct.Shape((1, 3, ct.RangeDim(2, 5, default=2), ct.RangeDim(3, 6, default=3)))
    program = image_program(tmp_path / "m.mlpackage", LAYOUT.RGB, 3, shape=shape)
    assert program.predict({"x0": Image.new("RGB", (6, 5))})["same"].shape == (1, 3, 5, 6)
    with pytest.raises(InputError, match=r"\[1..1, 3..3, 2..5, 3..6\]"):
        program.predict({"x0": Image.new("RGB", (7, 5))})


def test_the_executor_needs_no_pil():
    code = "import sys; sys.modules['PIL'] = None; import distill.mil.interpreter, distill.mil.images"
    subprocess.run([sys.executable, "-c", code], check=True)


def add_image(model, color: int, shape: tuple[int, ...]) -> None:
    image = model.description.input[0].type.imageType
    image.width, image.height, image.colorSpace = 3, 2, color


@pytest.mark.parametrize(
    ("color", "shape", "message"),
    [
        (20, (1, 1, 2, 3), "has 3 channels, but is"),
        (10, (2,), "has 1 channels, but is"),
        (0, (1, 1, 2, 3), "unknown colour space 0"),
    ],
)
def test_an_image_that_the_program_cannot_take_is_refused(tmp_path, color, shape, message):
    model = b.raw_model(shape=shape)
    add_image(model, color, shape)
    with pytest.raises(PackageError, match=message):
        mil.load(b.write_package(tmp_path / "m.mlpackage", model))


@pytest.mark.parametrize("kind", ["int64Type", "doubleType", "sequenceType", None])
def test_an_input_of_a_kind_that_no_program_takes_is_refused(tmp_path, kind):
    model = b.raw_model()
    model.description.input[0].type.ClearField("multiArrayType")
    if kind:
        getattr(model.description.input[0].type, kind).SetInParent()
    with pytest.raises(PackageError, match="which an ML Program does not take"):
        mil.load(b.write_package(tmp_path / "m.mlpackage", model))


def flexible(path, shapes: list, **options) -> mil.Program:
    """Every input plus one."""
    specs = [b.tensor(tuple(symbol() for _ in range(2))) for _ in shapes]
    names = [f"x{n}" for n in range(len(shapes))]
    body = eval(f"lambda {', '.join(names)}: tuple(add(v) for v in [{', '.join(names)}])", {"add": plus_one})
    inputs = [ct.TensorType(name, shape=shape, **options) for name, shape in zip(names, shapes)]
    return b.load(path, specs, body, "fp32", inputs=inputs)


def plus_one(x):
    return mb.add(x=x, y=1.0)


def zeros(*shapes) -> dict[str, np.ndarray]:
    return {f"x{n}": np.zeros(s, np.float32) for n, s in enumerate(shapes)}


def test_enumerated_shapes_of_several_inputs_go_together(tmp_path):
    shapes = [ct.EnumeratedShapes([[1, 2], [3, 4]]), ct.EnumeratedShapes([[5, 6], [7, 8]])]
    program = flexible(tmp_path / "m.mlpackage", shapes)
    made = program.predict(zeros((3, 4), (7, 8)))
    assert sorted(v.shape for v in made.values()) == [(3, 4), (7, 8)]
    with pytest.raises(InputError, match="do not belong together"):
        program.predict(zeros((1, 2), (7, 8)))
    with pytest.raises(InputError, match=r"expected one of \[1, 2\], \[3, 4\]"):
        program.predict(zeros((1, 3), (5, 6)))


def test_ranges_have_bounds(tmp_path):
    program = flexible(tmp_path / "m.mlpackage", [ct.Shape((ct.RangeDim(2, 4), ct.RangeDim(1, 3)))])
    assert next(iter(program.predict(zeros((4, 3))).values())).shape == (4, 3)
    for bad in [(1, 3), (5, 3), (4, 4), (4, 3, 1)]:
        with pytest.raises(InputError, match=r"expected \[2..4, 1..3\]"):
            program.predict(zeros(bad))
    with pytest.raises(InputError, match=r"Size \(5\) of dimension \(0\) is not in allowed range \(2\.\.4\)"):
        program.predict(zeros((5, 3)))


def test_a_range_without_an_upper_bound(tmp_path):
    model = b.raw_model()
    array = model.description.input[0].type.multiArrayType
    array.shapeRange.sizeRanges.add(lowerBound=2, upperBound=-1)
    operation = b.operations(model)[0]
    main = model.mlProgram.functions["main"]
    for declared in (main.inputs[0].type, operation.outputs[0].type):
        declared.tensorType.dimensions[0].unknown.variadic = False
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    assert program.predict({"x": np.ones(1000, np.float32)})["y"].shape == (1000,)
    with pytest.raises(InputError, match=r"expected \[2..\]"):
        program.predict({"x": np.ones(1, np.float32)})


def test_an_absent_optional_input_holds_its_default(tmp_path):
    inputs = [
        ct.TensorType("x0", shape=(2,)),
        ct.TensorType("x1", shape=(2,), default_value=np.full(2, 7.0, np.float32)),
    ]
    program = b.load(
        tmp_path / "m.mlpackage",
        [b.tensor((2,)), b.tensor((2,))],
        lambda x0, x1: mb.add(x=x0, y=x1, name="y"),
        "fp32",
        inputs=inputs,
    )
    one = np.array([1, 2], np.float32)
    assert program.predict({"x0": one})["y"].tolist() == [8, 9]
    assert program.predict({"x0": one, "x1": one})["y"].tolist() == [2, 4]
    with pytest.raises(InputError, match="needs input x0"):
        program.predict({"x1": one})


def test_an_integer_default_is_exact(tmp_path):
    model = b.raw_model("int32")
    model.description.input[0].type.isOptional = True
    model.description.input[0].type.multiArrayType.intDefaultValue = 2**24 + 1
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    assert program.predict({})["y"].tolist() == [2**25 + 2] * 2


def counter(path, width: int, states: int) -> None:
    """Adds x to each state, the n-th taking n + 1 of it."""
    specs = [b.tensor((width,), "fp16")] + [b.state((width,)) for _ in range(states)]
    names = ", ".join(f"s{n}" for n in range(states))

    def update(x0, *held):
        made = []
        for n, one in enumerate(held):
            grown = mb.add(x=mb.read_state(input=one), y=mb.mul(x=x0, y=np.float16(n + 1)))
            made.append(mb.coreml_update_state(state=one, value=grown))
        return tuple(mb.add(x=v, y=np.float16(0)) for v in made)

    b.build(path, specs, eval(f"lambda x0, {names}: update(x0, {names})", {"update": update}))


def test_several_states_live_side_by_side(tmp_path):
    counter(tmp_path / "m.mlpackage", 2, 3)
    program = mil.load(tmp_path / "m.mlpackage")
    state = program.make_state()
    assert state.names == ["s0", "s1", "s2"]
    for _ in range(2):
        outputs = list(program.predict({"x0": np.array([1, 10], np.float32)}, state=state).values())
    assert [v.tolist() for v in outputs] == [[2, 20], [4, 40], [6, 60]]
    assert state.read("s2").tolist() == [6, 60]
    # what updates a state is written as two operations
    assert {"read_state", "write_state"} <= {op.type for op in program.function().block.walk()}


def test_functions_of_a_package_have_their_own_states_and_shapes(tmp_path):
    descriptor = MultiFunctionDescriptor()
    for name, width, states in [("small", 2, 1), ("large", 4, 2)]:
        counter(tmp_path / f"{name}.mlpackage", width, states)
        descriptor.add_function(str(tmp_path / f"{name}.mlpackage"), "main", name)
    descriptor.default_function_name = "small"
    save_multifunction(descriptor, str(tmp_path / "m.mlpackage"))
    program = mil.load(tmp_path / "m.mlpackage")
    assert program.default_function == "small"
    for name, width, states in [("small", 2, 1), ("large", 4, 2)]:
        state = program.make_state(name)
        outputs = program.predict({"x0": np.ones(width, np.float32)}, name, state)
        assert [v.tolist() for v in outputs.values()] == [[n + 1.0] * width for n in range(states)]
    with pytest.raises(InputError, match="'s0' has shape"):
        program.predict({"x0": np.ones(2, np.float32)}, "small", program.make_state("large"))


@pytest.mark.parametrize("given", [3, np.float32(3), np.array([3.0]), np.array(3)])
def test_a_scalar_input(tmp_path, given):
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", b.raw_model(shape=())))
    made = program.predict({"x": given})["y"]
    assert made.shape == () and float(made) == 6


@pytest.mark.parametrize(
    ("dtype", "returned"), [("fp16", np.float32), ("fp32", np.float32), ("int32", np.int32), ("int8", np.int8)]
)
def test_numbers_are_taken_and_given_in_the_types_of_the_interface(tmp_path, dtype, returned):
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", b.raw_model(dtype)))
    for given in (np.int64, np.float64, np.uint8):
        made = program.predict({"x": np.array([3, 60], given)})["y"]
        assert made.dtype == returned and made.tolist() == [6, 120]
    if np.dtype(returned).kind == "i":
        with pytest.raises(InputError, match=f"takes {dtype}, got"):
            program.predict({"x": np.array([0.5, 1.0])})


def test_a_boolean_comes_and_goes_as_a_number(tmp_path):
    """coremltools puts a cast at either end: an interface has no boolean arrays."""
    program = b.load(tmp_path / "m.mlpackage", [b.tensor((3,), "bool")], lambda x0: mb.logical_not(x=x0), "fp32")
    assert program.function().inputs[0].dtype != "bool"
    (made,) = program.predict({"x0": np.array([True, False, True])}).values()
    assert made.dtype in (np.float32, np.int32) and made.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "given",
    [
        np.array([3, 60], ">f4"),
        np.array([3, 60], ">i8"),
        np.array([3, 60], np.longdouble),
        torch.tensor([3, 60], dtype=torch.bfloat16),
        torch.tensor([3.0, 60.0], requires_grad=True),
        torch.tensor([3j, 60j]).conj().imag.neg(),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "int32"])
def test_an_array_is_taken_in_any_representation(tmp_path, dtype, given):
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", b.raw_model(dtype)))
    assert program.predict({"x": given})["y"].tolist() == [6, 120]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, device="meta"), "is not an array: Cannot copy out of meta tensor"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "is an array of complex64, not of numbers"),
        (torch.zeros(2).to_sparse(), "is not an array"),
        (np.array([0, np.inf]), "takes int32, got inf"),
        (np.array([0, np.nan]), "takes int32, got nan"),
        (None, "is an array of object, not of numbers"),
    ],
)
def test_what_is_no_array_of_numbers_is_one_clear_error(tmp_path, given, message):
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", b.raw_model("int32")))
    with pytest.raises(InputError, match=f"input 'x' {message}"):
        program.predict({"x": given})


@pytest.mark.parametrize("given", [None, 3, ["x"]])
def test_inputs_that_are_no_dictionary_are_one_clear_error(tmp_path, given):
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", b.raw_model()))
    with pytest.raises(InputError, match="takes its inputs as a dictionary of arrays by name"):
        program.predict(given)


def test_the_policies_are_called_what_they_are_listed_as():
    assert [make_policy(name).name for name in POLICIES] == list(POLICIES)
