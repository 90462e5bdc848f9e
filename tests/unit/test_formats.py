"""Weight formats: against numpy, what coremltools writes and our executor reads, and the exact optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ios18
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import fitting, mil
from distill.config import build
from distill.errors import ConfigError, InputError
from distill.formats import (
    Compressed,
    Format,
    Formats,
    compress,
    decompress,
    deployed,
    encode,
    fit,
    operands,
    saturated,
    stored_bytes,
)
from distill.model import ModelConfig, Student

NAMES = ["fp16", "int8", "int4", "int8/6", "int4/4", "lut1", "lut2", "lut3", "lut4", "lut6", "lut8",
         "lut1/6", "lut2/3", "lut3/6", "lut4/6", "lut6/2", "lut8/12"]  # fmt: skip
SHAPE = (12, 36)


def weight(shape: tuple[int, ...] = SHAPE, seed: int = 0, outliers: float = 0.02) -> torch.Tensor:
    """Like a trained layer's: normal, channels of different sizes, a few values far out."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * rng.uniform(0.02, 0.1, (shape[0], 1))
    w[rng.random(shape) < outliers] *= 6
    return torch.tensor(w, dtype=torch.float32)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, both fp16."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype == np.float16 and a.tobytes() == b.tobytes()


def in_numpy(stored: Compressed) -> np.ndarray:
    """Element by element, in numpy's fp16."""
    codes, table = stored.codes.numpy(), stored.table.numpy()
    out = np.empty(codes.shape, np.float16)
    for (o, i), code in np.ndenumerate(codes):
        if stored.format.kind == "int":
            scale = table[o, i * table.shape[1] // codes.shape[1]]
            out[o, i] = np.float16(code) * scale
        elif stored.format.kind == "lut":
            out[o, i] = table[o * table.shape[0] // codes.shape[0], code]
        else:
            out[o, i] = code
    return out


def package(path: Path, stored: Compressed, rank: int) -> Path:
    """A package that adds the weight to its input, written by coremltools."""
    op, arrays = operands(stored, rank)
    kind = types.string_to_builtin(stored.format.stored_type)
    shape = tuple(stored.codes.shape) + (1,) * (rank - 2)

    @mb.program(input_specs=[mb.TensorSpec(shape, dtype=types.fp16)], opset_version=ct.target.iOS18)
    def program(x):
        given = {
            name: a.astype(types.nptype_from_builtin(kind)) if name in ("data", "indices") else a
            for name, a in arrays.items()
        }
        w = given["val"] if op == "const" else getattr(mb, op)(**given)
        return mb.add(x=x, y=w, name="y")

    model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
                       outputs=[ct.TensorType(dtype=np.float16)])  # fmt: skip
    model.save(str(path))
    return path


def executed(path: Path) -> np.ndarray:
    """The weight as our executor gets it from the package's file."""
    program = mil.load(path)
    shape = next(iter(program.function().inputs)).shape
    got = next(iter(program.predict({"x": np.zeros(shape, np.float16)}).values()))
    assert np.array_equal(got, got.astype(np.float16))  # fp16 comes out in fp32, as of Core ML
    return got.astype(np.float16)


def weight_file(path: Path) -> Path:
    return path / "Data/com.apple.CoreML/weights/weight.bin"


def size_of_weights(path: Path) -> int:
    """Bytes, up to where the next constant would begin: the last one ends where its data does."""
    return -(-weight_file(path).stat().st_size // 64) * 64


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_written_as_it_is_read(name: str) -> None:
    assert str(Format.parse(name)) == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int3", "Core ML stores int4 or int8; try lut3"),
        ("int2/32", "try lut2"),
        ("lut5", "Core ML stores lut1 or lut2 or lut3 or lut4 or lut6 or lut8"),
        ("fp32", "Core ML stores fp16"),
        ("int4/0", "0 is no size"),
        ("fp16/8", "'fp16/8' is none of fp16, int4"),
        ("q4_0", "'q4_0' is none of"),
        ("int٤", "is none of"),
        ("int4/32 ", "is none of"),
    ],
)
def test_what_core_ml_cannot_store_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Format.parse(name)


def test_a_wrong_format_in_a_configuration_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml: blocks: weight format 'int5'.* Core ML stores int4 or int8"):
        build({"blocks": "int5"}, Formats, "c.yaml")


def student(tied: bool, hidden: int = 16) -> Student:
    with torch.device("meta"):
        return Student(ModelConfig(30, hidden, 40, 1, 2, 1, tie_word_embeddings=tied))


def test_each_part_gets_its_format_and_vectors_stay_fp16() -> None:
    formats = Formats(blocks="int4/8", embedding="int8", head="lut6")
    formats.require_fits(student(tied=False))
    got = {name: str(formats.of(name, p.ndim)) for name, p in student(tied=False).named_parameters()}
    assert got.pop("model.embed_tokens.weight") == "int8" and got.pop("lm_head.weight") == "lut6"
    assert {name for name, form in got.items() if form == "fp16"} == {n for n in got if "norm" in n}
    assert set(got.values()) == {"fp16", "int4/8"}


def test_a_head_without_a_format_of_its_own_takes_the_embeddings() -> None:
    assert str(Formats(blocks="int4", embedding="lut6/2").of("lm_head.weight")) == "lut6/2"


@pytest.mark.parametrize(
    ("formats", "tied", "words"),
    [
        (Formats(embedding="int8", head="lut4"), True, "head: lut4, but it is tied to the embedding, which is int8"),
        (Formats(blocks="int4/32"), False, r"q_proj\.weight: weight format int4/32: 16 inputs in blocks of 32"),
        (Formats(embedding="lut4/16"), False, r"embed_tokens\.weight: .* 30 output channels in groups of 16"),
    ],
)
def test_a_weight_that_does_not_divide_and_a_tied_head_of_its_own_are_refused(formats, tied, words) -> None:
    with pytest.raises(ConfigError, match=words):
        formats.require_fits(student(tied))


def test_the_operators_arithmetic_by_hand() -> None:
    scales = torch.tensor([[0.1, 3.0], [2.0**-24, 500.0]], dtype=torch.float16)
    codes = torch.tensor([[-8, 7, 1, -3], [3, 0, 7, -8]], dtype=torch.int8)
    got = decompress(Compressed(Format("int", 4, 2), codes, scales))
    tenth = float(np.float16(0.1))  # 0.0999755859375
    assert got.tolist() == [[-8 * tenth, float(np.float16(7 * tenth)), 3, -9], [3 * 2.0**-24, 0, 3500, -4000]]
    palettes = torch.tensor([[1, 5], [2, 10]], dtype=torch.float16)
    got = decompress(Compressed(Format("lut", 1, 1), torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8), palettes))
    assert got.tolist() == [[1, 5], [10, 10]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e5])
def test_decompressed_values_are_numpys_and_coremltools_own(name: str, size: float) -> None:
    stored = compress(weight().mul(size).clamp(-65504, 65504), Format.parse(name))
    got = decompress(stored).numpy()
    assert same(got, in_numpy(stored))
    op, arrays = operands(stored)
    if op == "constexpr_blockwise_shift_scale":
        theirs = ios18.constexpr_blockwise_shift_scale.decompress(arrays["data"], arrays["scale"], None)
    elif op == "constexpr_lut_to_dense":
        theirs = ios18.constexpr_lut_to_dense.decompress(arrays["indices"], arrays["lut"], None)
    else:
        theirs = arrays["val"]
    assert same(got, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_package_holds_what_was_compressed_in_as_many_bytes_as_said(name: str, tmp_path: Path) -> None:
    form = Format.parse(name)
    stored = compress(weight(seed=3), form)
    path = package(tmp_path / "m.mlpackage", stored, rank=4 if form.per else 2)
    assert same(executed(path).reshape(SHAPE), decompress(stored).numpy())
    assert size_of_weights(path) == 64 + stored_bytes(form, SHAPE)


@pytest.mark.parametrize("name", ["int4", "lut3", "lut1/7", "int8/3"])
def test_odd_sizes_are_packed_and_counted_too(name: str, tmp_path: Path) -> None:
    form = Format.parse(name)
    stored = compress(weight((7, 9), seed=4), form)
    path = package(tmp_path / "m.mlpackage", stored, rank=2)
    assert same(executed(path), decompress(stored).numpy())
    assert size_of_weights(path) == 64 + stored_bytes(form, (7, 9))


def test_codes_lie_low_nibble_first_in_the_file_and_the_other_order_is_seen(tmp_path: Path) -> None:
    stored = compress(weight(seed=5), Format.parse("int4/4"))
    path = package(tmp_path / "m.mlpackage", stored, rank=2)
    raw = bytearray(weight_file(path).read_bytes())
    flat = stored.codes.numpy().reshape(-1) & 15
    packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
    at = raw.find(packed)
    assert at > 0
    swapped = (flat[1::2] | flat[0::2] << 4).astype(np.uint8).tobytes()
    raw[at : at + len(packed)] = swapped
    weight_file(path).write_bytes(raw)
    assert not same(executed(path), decompress(stored).numpy())


@pytest.mark.parametrize("name", ["int8", "int4/4", "lut4/6"])
def test_a_code_off_by_one_a_wide_scale_and_a_transposed_table_are_seen(name: str, tmp_path: Path) -> None:
    stored = compress(weight(seed=6), Format.parse(name))
    good = decompress(stored).numpy()
    off = stored._replace(codes=stored.codes + 1 - 2 * (stored.codes == stored.codes.max()))
    assert not same(executed(package(tmp_path / "off.mlpackage", off, 2)), good)
    turned = stored._replace(table=stored.table.flip(0))
    assert not same(executed(package(tmp_path / "turned.mlpackage", turned, 2)), good)
    if name.startswith("int"):  # a scale that is not rounded to fp16, as a careless training loop would have it
        wide = (
            weight(seed=6).reshape(*stored.table.shape, -1).abs().amax(-1) / fitting.code_range(stored.format.bits)[1]
        )
        careless = (stored.codes.float().reshape(*wide.shape, -1) * wide[..., None]).reshape(SHAPE).half()
        assert not same(careless.numpy(), good)


def least_possible(x: np.ndarray, w: np.ndarray, entries: int) -> float:
    """The least weighted squared error of any palette: dynamic programming over sorted values."""
    order = np.argsort(x)
    x, w = x[order].astype(np.float64), w[order].astype(np.float64)
    n = len(x)
    sums = [np.concatenate([[0], np.cumsum(v)]) for v in (w, w * x, w * x * x)]
    cost = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        a, b, c = (s[i + 1 :] - s[i] for s in sums)
        cost[i, i + 1 :] = np.maximum(c - b * b / a, 0)
    best = np.full(n + 1, np.inf)
    best[0] = 0
    for _ in range(entries):
        best = np.minimum(best, (best[:, None] + cost).min(0))
    return float(best[n])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_palettes_come_close_to_the_exact_optimum(bits: int, weighted: bool) -> None:
    w = weight((4, 300), seed=bits)
    importance = torch.rand(300, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else None
    got = decompress(compress(w, Format("lut", bits, 1), importance)).float()
    counts = np.ones(300) if importance is None else importance.numpy()
    errors = ((got - w).double().square() * torch.tensor(counts)).sum(1)
    least = [least_possible(row.numpy(), counts, 1 << bits) for row in w]
    ratios = errors.numpy() / np.array(least)
    assert (ratios > 0.999).all() and ratios.max() < 1.05 and ratios.mean() < 1.02


@pytest.mark.parametrize("bits", [6, 8])
def test_large_palettes_beat_evenly_spread_ones_by_far(bits: int) -> None:
    w = weight((16, 400))
    step = (w.max() - w.min()) / (1 << bits)
    even = ((w - w.min()) / step).floor().clamp_max((1 << bits) - 1).add(0.5).mul(step).add(w.min())
    got = decompress(compress(w, Format("lut", bits))).float()
    assert (got - w).square().sum() < 0.5 * (even - w).square().sum()


@pytest.mark.parametrize("name", ["lut2", "lut4", "lut8"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_too_long_to_sort_gets_the_same_palette(name: str, weighted: bool, monkeypatch) -> None:
    w = weight((30, 400), seed=8)
    importance = torch.linspace(0.1, 3, 400) if weighted else None
    sorted_ = fit(w, Format.parse(name), importance)
    monkeypatch.setattr(fitting, "_SORTED", 1000)
    counted = fit(w, Format.parse(name), importance)
    errors = [float(((deployed(w, Format.parse(name), t) - w).square()).sum()) for t in (sorted_, counted)]
    assert errors[1] == pytest.approx(errors[0], rel=0.03 if name == "lut8" else 0.005)


def test_pieces_worked_on_at_one_time_do_not_change_the_result(monkeypatch) -> None:
    expected = {name: compress(weight((40, 36)), Format.parse(name)) for name in ("int4/4", "int8", "lut4", "lut3/4")}
    monkeypatch.setattr("distill.formats._AT_ONCE", 100)
    monkeypatch.setattr(fitting, "_CACHED", 100)
    monkeypatch.setattr(fitting, "_SORTED", 1500)
    for name, stored in expected.items():
        got = compress(weight((40, 36)), Format.parse(name))
        assert torch.equal(got.codes, stored.codes) and torch.equal(got.table, stored.table)
        assert torch.equal(decompress(got), decompress(stored))


def by_largest(w: torch.Tensor, bits: int, per: int) -> torch.Tensor:
    """Scales from the largest value alone, in fp16: what coremltools' linear_symmetric does."""
    rows, high = w.reshape(-1, per), (1 << bits - 1) - 1
    scale = (rows.abs().amax(1, keepdim=True) / high).half().float()
    scale[scale == 0] = 1
    return ((rows / scale).round().clamp(-high, high) * scale).half().float().reshape(w.shape)


@pytest.mark.parametrize(("name", "gain"), [("int8", 1.0), ("int4", 0.8), ("int4/12", 0.9)])
def test_searched_scales_err_less_than_those_of_the_largest_value(name: str, gain: float) -> None:
    form = Format.parse(name)
    w = weight((64, 288), seed=9, outliers=0.005)
    ours = decompress(compress(w, form, torch.ones(288))).float()
    theirs = by_largest(w, form.bits, form.per or 288)
    assert (decompress(compress(w, form)).float() - w).square().sum() <= (theirs - w).square().sum()
    assert (ours - w).square().sum() < gain * (theirs - w).square().sum()


def test_importance_moves_the_error_to_channels_that_matter_less() -> None:
    w, importance = weight((64, 32), seed=2), torch.tensor([100.0] * 4 + [0.01] * 27 + [0.0])
    for name in ("int4", "lut2/2"):
        plain, weighed = ((decompress(compress(w, Format.parse(name), i)).float() - w).square().sum(0)
                          for i in (torch.ones(32), importance))  # fmt: skip
        assert weighed[:4].sum() < 0.9 * plain[:4].sum() and weighed[4:].sum() > plain[4:].sum()


@pytest.mark.parametrize("bad", [torch.ones(5), torch.full((36,), -1.0), torch.full((36,), torch.nan)])
def test_importance_of_another_layer_or_below_zero_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(InputError, match="importance: 36 numbers of at least 0"):
        compress(weight(), Format.parse("int8"), bad)


def test_importance_that_is_zero_everywhere_counts_as_none() -> None:
    for name in ("int4", "lut3"):
        plain = compress(weight(), Format.parse(name))
        assert torch.equal(compress(weight(), Format.parse(name), torch.zeros(36)).codes, plain.codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65536.0])
@pytest.mark.parametrize("name", ["fp16", "int8", "lut4"])
def test_values_that_fp16_does_not_hold_are_refused(value: float, name: str) -> None:
    w = weight()
    w[3, 5] = value
    with pytest.raises(InputError, match=r"shape \[12, 36\] has values that are not finite or beyond 65504"):
        compress(w, Format.parse(name))


@pytest.mark.parametrize("table", [torch.ones(12, 2).half(), torch.ones(12, 1), torch.ones(1, 12).half()])
def test_a_table_of_another_weight_is_refused(table: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"int8 of shape \[12, 36\] has no table"):
        encode(weight(), Format.parse("int8"), table)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Any size from fp16's least subnormal to its largest number; with zeros, constant rows, far values, few values."""
    rows, columns = 4 * draw(st.integers(1, 3)), 3 * draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.standard_normal((rows, columns)) * 10.0 ** draw(st.floats(-9, 4.7))
    w *= 10.0 ** rng.uniform(-draw(st.floats(0, 6)), 0, (rows, 1))
    what = draw(st.sampled_from(["plain", "zeros", "constant", "far", "few", "sparse"]))
    if what == "zeros":
        w[rng.random(rows) < 0.5] = 0
    if what == "constant":
        w[:] = w[:, :1]
    if what == "far":
        w[rng.random(w.shape) < 0.1] *= 1000
    if what == "few":
        w = rng.choice(w.reshape(-1)[:3], w.shape)
    if what == "sparse":
        w[rng.random(w.shape) < 0.8] = 0
    return torch.tensor(w, dtype=torch.float32).clamp(-65504, 65504)


@settings(max_examples=150, deadline=None)
@given(
    weights(),
    st.sampled_from(["int4", "int8", "int4/3", "int8/3", "lut1", "lut2/4", "lut3", "lut4/2", "lut6/1"]),
    st.booleans(),
)
def test_any_weight_is_stored_finite_repeatable_and_no_worse_than_by_its_largest_value(w, name, calibrated) -> None:
    form, importance = Format.parse(name), torch.ones(w.shape[1]) if calibrated else None
    stored = compress(w, form, importance)
    got = decompress(stored)
    assert bool(got.isfinite().all()) and same(got.numpy(), in_numpy(stored))
    again = compress(got.float(), form, importance)
    assert torch.equal(decompress(again), got)  # what is on the grid stays
    assert torch.equal(encode(w, form, stored.table).codes, stored.codes)
    if form.kind == "int":
        low, high = fitting.code_range(form.bits)
        assert int(stored.codes.min()) >= low and int(stored.codes.max()) <= high and bool((stored.table > 0).all())
        theirs = by_largest(w, form.bits, form.per or w.shape[1])
        error, limit = ((x.double() - w).square().sum() for x in (got, theirs))
        assert error <= limit * (1 + 1e-5)
    else:
        assert bool((stored.table.diff(dim=1) >= 0).all()) and int(stored.codes.max()) < 1 << form.bits
        if len(w.unique()) <= 1 << form.bits:
            assert torch.equal(got, w.half())


@pytest.mark.parametrize("bits", [4, 8])
def test_every_fp16_scale_is_found_again_from_its_multiples(bits: int) -> None:
    low, high = fitting.code_range(bits)
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    for codes in (torch.arange(low, high + 1), torch.arange(low, 2), torch.arange(-1, high + 1)):
        values = (scales.float()[:, None] * codes).half()
        values = values[values.isfinite().all(1)]
        assert len(values) > 20_000
        assert torch.equal(decompress(compress(values.float(), Format("int", bits))), values)


def test_a_weight_is_saturated_beyond_half_a_step_past_the_last_code() -> None:
    w = torch.tensor([[-8.6, -8.4, 0.3, 7.4, 7.6, -1.0]]) * 0.5
    scale = torch.tensor([[0.5]], dtype=torch.float16)
    assert saturated(w, Format.parse("int4"), scale).tolist() == [[True, False, False, False, True, False]]
    assert saturated(w, Format.parse("lut4"), torch.zeros(1, 16).half()) is None


@pytest.mark.parametrize("name", ["lut2/16", "lut4/16", "lut6/16", "lut8/16"])
@pytest.mark.parametrize("size", [1e-6, 1e-8, 1e-9])
def test_values_that_fp16_cannot_tell_from_zero_give_palettes_that_are_found_again(name: str, size: float) -> None:
    """A zero of either sign is one value: encoded again, the deployed weight is the same bits."""
    form = Format.parse(name)
    w = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    w[:16] *= size
    table = fit(w, form)
    once = deployed(w, form, table)
    assert torch.equal(deployed(once, form, table).half().view(torch.int16), once.half().view(torch.int16))
    assert not ((table == 0) & table.signbit()).any()


def test_the_deployed_weight_keeps_its_type_and_is_the_decompressed_one() -> None:
    for name in NAMES:
        form, w = Format.parse(name), weight()
        table = fit(w, form)
        got = deployed(w, form, table)
        assert got.dtype == torch.float32 and same(got.half().numpy(), decompress(encode(w, form, table)).numpy())
        assert torch.equal(got, got.half().float())
