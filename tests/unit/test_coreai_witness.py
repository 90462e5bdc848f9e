"""A second witness of the lowering: one twin in PyTorch, through our executor as a package, through Apple's runtime.

All three hold the same constants, rounded to fp16. What Apple's CPU runtime shares with the executor's rounding, and
where it differs, is held operator by operator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import mil
from distill.convert import coreai
from distill.export.programs import trace
from distill.export.tolerance import fp16_gain, relative_error
from distill.export.twin import CachedTwin, ChannelRMSNorm, round_to_half
from distill.model import ModelConfig, RopeScaling, Student
from distill.versions import import_coremltools
from distill.versions import quiet as silent
from tests.unit.coreai_run import loaded, run_module  # skips this file where Core AI is not installed

BASE: dict[str, Any] = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "groups of 3": {},
    "one KV head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "every bias, no groups": {"num_key_value_heads": 6, "attention_bias": True, "output_bias": True, "mlp_bias": True},
    "qk-norm, wide heads": {"qk_norm": True, "head_dim": 16, "rms_norm_eps": 1e-6},
    "sliding window": {"sliding_window": 5},
    "rope scaling": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
}
CONTEXT, CHUNK, STEPS = 24, 8, 8
FP32 = 2e-5


class Found(NamedTuple):
    """What one implementation made of the tokens."""

    logits: np.ndarray
    kv: np.ndarray
    before: tuple[np.ndarray, ...] = ()
    """The state that each call began with."""


def random_student(family: str) -> Student:
    student = Student(ModelConfig(**BASE | FAMILIES[family])).eval()
    generator = torch.Generator().manual_seed(len(family))
    for name, parameter in student.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
    return student


IDS = torch.randint(0, 97, (1, CHUNK + STEPS), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
CALLS = [(CHUNK, 0), *((1, CHUNK + i) for i in range(STEPS))]


@torch.no_grad()
def by_pytorch(student: Student, *, half_state: bool = False) -> Found:
    """`half_state`: keys and values pass from call to call in fp16, as a package's state holds them."""
    twins = {seq: round_to_half(CachedTwin(student, CONTEXT, seq, copy=True)) for seq in (CHUNK, 1)}
    logits, before = [], []
    for seq, first in CALLS:
        before.append(twins[seq].kv.numpy().copy())
        logits.append(twins[seq](IDS[:, first : first + seq], torch.tensor([first], dtype=torch.int32))[0].numpy())
        kept = twins[seq].kv.clone()
        twins[1].kv.copy_(kept.half().float() if half_state else kept)
    return Found(np.concatenate(logits), twins[1].kv.numpy(), tuple(before))


def by_coreai(student: Student, dtype: torch.dtype, folder: Path) -> Found:
    from coreai.runtime import NDArray

    built = coreai.Built(student, CONTEXT, dtype, {})
    programs = {}
    with coreai.quiet():
        for seq in (CHUNK, 1):
            twin = round_to_half(coreai.twin(built, seq))
            example = torch.zeros(1, seq, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            programs[f"take_{seq}"] = coreai.lower(twin, example, dtype)
            shape = tuple(twin.kv.shape)
    state = NDArray(np.zeros(shape, np.float16 if dtype == torch.float16 else np.float32))
    with loaded(programs, folder, ["input_ids", "position"], ["kv"]) as functions:
        logits = []
        for seq, first in CALLS:
            feed = {"input_ids": IDS[:, first : first + seq].numpy(), "position": np.array([first], np.int32)}
            logits.append(functions(f"take_{seq}", feed, state)[0])
    return Found(np.concatenate(logits), state.numpy().astype(np.float32))


def package(student: Student, seq: int, path: Path) -> mil.Program:
    ct = import_coremltools()
    twin = CachedTwin(student, CONTEXT, seq, copy=True)
    example = torch.zeros(1, seq, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    state = ct.StateType(wrapped_type=ct.TensorType(shape=tuple(twin.kv.shape), dtype=np.float16), name="kv")
    traced = trace(twin, example)
    traced.kv.zero_()
    with silent():
        ct.convert(
            traced,
            inputs=[ct.TensorType("input_ids", (1, seq), np.int32), ct.TensorType("position", (1,), np.int32)],
            outputs=[ct.TensorType("logits", dtype=np.float16)],
            states=[state],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        ).save(str(path))
    return mil.load(path)


def by_executor(packages: dict[int, mil.Program], policy: str, before: tuple[np.ndarray, ...] = ()) -> Found:
    """`before`: states to begin the calls with; none: each begins with what the one before it left."""
    state = packages[1].make_state()
    logits = []
    for number, (seq, first) in enumerate(CALLS):
        program = packages[seq]
        own = program.make_state()
        own.write("kv", before[number] if before else state.read("kv"))
        feed = {"input_ids": IDS[:, first : first + seq].numpy(), "position": np.array([first], np.int32)}
        logits.append(program.predict(feed, state=own, policy=policy)["logits"][0])
        state.write("kv", own.read("kv"))
    return Found(np.concatenate(logits), state.read("kv"))


def apart(a: Found, b: Found) -> tuple[float, float]:
    """Largest relative error of logits at a position, and relative error of the whole state."""
    rows = np.linalg.norm(a.logits - b.logits, axis=1) / np.linalg.norm(b.logits, axis=1)
    return float(rows.max()), float(np.linalg.norm(a.kv - b.kv) / np.linalg.norm(b.kv))


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] if i > 1 else []) for i, f in enumerate(FAMILIES)]
)
def test_pytorch_the_executor_and_core_ai_agree(family: str, tmp_path: Path) -> None:
    """A chunk and then single tokens over one state: logits of every token, and keys and values at the end."""
    student = random_student(family)
    torch_fp32, torch_half = by_pytorch(student), by_pytorch(student, half_state=True)
    packages = {seq: package(student, seq, tmp_path / f"{seq}.mlpackage") for seq in (CHUNK, 1)}
    # each call from PyTorch's state: a value near a tie may round the other way, and what follows from it is no fault
    ours = {"fp32": by_executor(packages, "fp32", torch_half.before), "ieee16": by_executor(packages, "ieee16")}
    theirs = {t: by_coreai(student, t, tmp_path / str(t)) for t in (torch.float32, torch.float16)}
    errors = {
        "executor fp32": apart(ours["fp32"], torch_half),
        "Core AI fp32": apart(theirs[torch.float32], torch_fp32),
        "executor ieee16": apart(ours["ieee16"], torch_fp32),
        "Core AI fp16": apart(theirs[torch.float16], torch_fp32),
        "Core AI fp16 to executor ieee16": apart(theirs[torch.float16], ours["ieee16"]),
    }
    for name, (logits, kv) in errors.items():
        print(f"{family:22s} {name:32s} logits {logits:.1e} state {kv:.1e}")
    assert errors["executor fp32"][0] < FP32 and errors["executor fp32"][1] < 2.0**-11
    assert max(errors["Core AI fp32"]) < FP32
    half = 4 * fp16_gain(student) * relative_error(student.config.num_hidden_layers)
    assert all(max(errors[name]) < half for name in errors if "16" in name), (half, errors)


def test_a_twin_with_one_wrong_weight_is_told_apart_by_both(tmp_path: Path) -> None:
    student = random_student("groups of 3")
    reference = by_pytorch(student)
    student.model.layers[1].self_attn.k_proj.weight.data *= 1.01
    assert apart(by_coreai(student, torch.float32, tmp_path / "c"), reference)[0] > 10 * FP32
    packages = {seq: package(student, seq, tmp_path / f"{seq}.mlpackage") for seq in (CHUNK, 1)}
    found = by_executor(packages, "fp32")
    chunks = [Found(each.logits[:CHUNK], each.kv) for each in (found, reference)]
    assert apart(chunks[0], chunks[1])[0] > 10 * FP32


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.function(*inputs)
        return out


def half(*shape: int, scale: float = 1.0) -> Tensor:
    """Values that fp16 holds."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).half().float()


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    made = nn.Conv2d(inputs, outputs, 1, bias=False)
    made.weight.data = half(outputs, inputs, 1, 1, scale=inputs**-0.5)
    return made.requires_grad_(False)


MASK = torch.where(torch.arange(128)[None] <= 16 * torch.arange(8)[:, None], 0.0, -1e4)[None, None]


def written(kv: Tensor, row: Tensor) -> Tensor:
    out = kv.clone()
    out[:, :, 3:4] = row
    return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat([-x[:, :, 32:], x[:, :, :32]], 2) * sin


OPERATORS: dict[str, tuple[Any, tuple[Tensor, ...], float]] = {
    "conv1x1, 256 inputs": (conv(256, 64), (half(1, 256, 1, 16),), 0.99),
    "conv1x1, 4096 inputs": (conv(4096, 16), (half(1, 4096, 1, 16),), 0.99),
    "silu": (Function(F.silu), (half(1, 256, 1, 16, scale=4),), 1.0),
    "masked softmax": (Function(lambda x: (x + MASK.to(x.dtype)).softmax(-1)), (half(1, 4, 8, 128, scale=3),), 1.0),
    "softmax of 2048": (Function(lambda x: x.softmax(-1)), (half(1, 1, 8, 2048),), 0.99),
    "rotation": (Function(rotated), (half(1, 4, 64, 8), half(1, 1, 64, 8), half(1, 2, 64, 8)[:, :1]), 1.0),
    "residual": (Function(lambda a, b: a + b), (half(1, 256, 1, 16, scale=30), half(1, 256, 1, 15)[..., :1]), 1.0),
    "mean of 4096": (Function(lambda x: x.mean(1, keepdim=True)), (4 + half(1, 4096, 1, 16),), 0.99),
    "slice written": (Function(written), (half(1, 2, 8, 16), half(1, 2, 1, 16)), 1.0),
    "gather": (Function(lambda t, i: t[i]), (half(97, 16), torch.tensor([5, 96, 0], dtype=torch.int32)), 1.0),
}
"""Module, inputs, and the least share of fp16 results that are the executor's bit for bit."""


def executed(module: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> dict[str, np.ndarray]:
    """By policy."""
    ct = import_coremltools()
    kinds = [np.float16 if x.is_floating_point() else np.int32 for x in inputs]
    types = [ct.TensorType(f"x{i}", tuple(x.shape), kind) for i, (x, kind) in enumerate(zip(inputs, kinds))]
    with silent():
        ct.convert(
            trace(module.float().eval(), inputs),
            inputs=types,
            outputs=[ct.TensorType("y", dtype=np.float16)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        ).save(str(folder / "m.mlpackage"))
    program, feed = mil.load(folder / "m.mlpackage"), {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
    return {policy: program.predict(feed, policy=policy)["y"] for policy in ("fp32", "ieee16")}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_rounds_as_the_executor_says(name: str, tmp_path: Path) -> None:
    """Core AI's CPU runtime computes these in fp32 inside and rounds once, as `ieee16` does."""
    module, inputs, least = OPERATORS[name]
    ours = executed(module, inputs, tmp_path)
    exact = run_module(module, inputs, torch.float32, tmp_path)
    rounded = run_module(module, inputs, torch.float16, tmp_path)
    scale = np.abs(exact).max()
    assert np.abs(exact - ours["fp32"]).max() <= 2e-6 * scale + (2.0**-11 * scale if name == "gather" else 0)
    assert (rounded == ours["ieee16"]).mean() >= least
    assert np.abs(rounded - ours["ieee16"]).max() <= 2.0**-10 * scale


def test_core_ai_s_matmul_adds_in_fp16_where_the_executor_rounds_once(tmp_path: Path) -> None:
    """Bit for bit: each product is rounded, and each partial sum."""
    a, b = half(4, 512), half(512, 16)
    found = run_module(Function(torch.matmul), (a, b), torch.float16, tmp_path)
    total = np.zeros((4, 16), np.float16)
    for k in range(512):
        total = total + a[:, k : k + 1].half().numpy() * b[k : k + 1].half().numpy()
    assert total.dtype == np.float16
    assert np.array_equal(found, total.astype(np.float32))
    once = (a @ b).half().float().numpy()
    assert (found == once).mean() < 0.5


def test_a_plain_norm_in_fp16_overflows_in_core_ai_and_the_asset_s_does_not(tmp_path: Path) -> None:
    """coremltools fuses the norm to `layer_norm`; Core AI keeps its squares, so an asset's norms are in fp32."""
    norm, x = ChannelRMSNorm(torch.ones(256), 1e-5, 1).requires_grad_(False), half(1, 256, 1, 16, scale=400)
    plain = run_module(norm, (x,), torch.float16, tmp_path)
    assert not np.allclose(plain, norm.float()(x).numpy(), atol=0.1)
    inside = Function(lambda y: norm.float()(y.float()).to(y.dtype))
    found = run_module(inside, (x,), torch.float16, tmp_path)
    assert np.abs(found - norm.float()(x).numpy()).max() < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_faults_reported_for_core_ai_do_not_show_on_linux(dtype: torch.dtype, tmp_path: Path) -> None:
    """coreai-torch issues 116 (argmax in the graph) and 51 (2-D matmul, then hardswish)."""
    x = half(1, 1, 49152)
    assert run_module(Function(lambda v: v.argmax(-1).int()), (x,), dtype, tmp_path) == x.argmax()
    v, w = half(8, 64), half(64, 48, scale=0.125)
    found = run_module(Function(lambda v, w: F.hardswish(v @ w)), (v, w), dtype, tmp_path)
    expected = F.hardswish(v @ w).numpy()
    assert np.abs(found - expected).max() < (1e-5 if dtype == torch.float32 else 5e-3) * np.abs(expected).max()
