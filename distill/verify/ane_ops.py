"""What is publicly known about operators on the Neural Engine, and a view of a program for the rules to walk.

Apple publishes no operator list. ELIGIBLE is what ANEForge's catalogue measured on the direct path (M1 to
M5), less whatever another source places elsewhere: those are in the other tables, each with who says what.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from distill.mil.program import Binding, Function, Operation, Program, TensorType, Value

ANEFORGE = "sbryngelson/ANEForge docs/op-catalog.md"
CML_LLM = "john-rocky/CoreML-LLM docs/"


def names(text: str) -> frozenset[str]:
    """A set of operator names, written as words."""
    return frozenset(text.split())


ELIGIBLE = names("""
    abs add atan avg_pool batch_norm batch_to_space cast ceil clamped_relu clip concat conv
    conv_transpose crop depth_to_space dequantize einsum elu equal erf exp exp2 expand_dims fill
    fill_like flatten2d floor floor_div gather gelu greater greater_equal identity instance_norm inverse
    l2_norm l2_pool layer_norm leaky_relu less less_equal linear linear_activation local_response_norm
    log logical_not matmul max_pool maximum minimum mul not_equal pad pixel_shuffle pixel_unshuffle pow
    prelu quantize read_state real_div reduce_l1_norm reduce_l2_norm reduce_log_sum reduce_log_sum_exp
    reduce_max reduce_mean reduce_min reduce_sum reduce_sum_square relu relu6 reshape reshape_like
    reverse round rsqrt scaled_dot_product_attention scaled_tanh select sigmoid sigmoid_hard sign silu
    slice_by_index slice_by_size slice_update softmax softplus softplus_parametric softsign
    space_to_batch space_to_depth split sqrt square squeeze stack sub tanh threshold thresholded_relu
    tile transpose write_state
""")

_NO_PATH = f"{ANEFORGE}: no hardware path on any family"
_RECURRENT = f"apple/coremltools#1780; hollance/neural-engine docs/unsupported-layers.md; {ANEFORGE}"
_CUSTOM = "hollance/neural-engine docs/unsupported-layers.md: a custom layer has CPU and GPU code only"
_BRANCH = f"apple/coreai-models guidance.md: limited or no control flow; {ANEFORGE}: flatten it"
_EMPTY = f"{_NO_PATH}; the output's shape depends on data, against Apple's static-shape rule"
_LISTS = names("make_list list_gather list_length list_read list_scatter list_write")

# Every source that speaks of these agrees.
OFF_ANE: dict[str, str] = (
    dict.fromkeys(("rnn", "lstm", "gru"), _RECURRENT)
    | dict.fromkeys(("cond", "while_loop", "call"), _BRANCH)
    | dict.fromkeys(_LISTS, _NO_PATH)
    | dict.fromkeys(("random_bernoulli", "random_categorical", "random_normal"), f"{_NO_PATH}; draw on the host")
    | {"non_zero": _EMPTY, "custom_layer": _CUSTOM}
)

_ARGMAX = (
    f"{CML_LLM}EXPERIMENTS.md: the argmax tail is 8 operations on the CPU; apple/coreai-torch#116: in-graph "
    f"argmax silently wrong on iOS 27. {ANEFORGE}: native"
)
DISPUTED: dict[str, str] = {
    "topk": f"roboflow/rf-detr#1495: MLComputePlan has it on the CPU. {ANEFORGE}: native from A14",
    "reduce_argmax": _ARGMAX,
    "reduce_argmin": _ARGMAX,
    "gather_along_axis": f"{_ARGMAX}, with limits on M1",
    "gather_nd": "apple/coreai-models neural_engine_rules.md: yields 3-D outputs, keep tables outside. "
    f"{ANEFORGE}: native from A14",
    "cumsum": f"{CML_LLM}QWEN35_ROADMAP.md: the one operation left on the CPU. {ANEFORGE}: native",
    "non_maximum_suppression": f"ANEForge docs/capabilities.md: runs on CPU or GPU. {ANEFORGE}: native",
}

# Only ANEForge says so, about the direct path: Core ML may rewrite the operation before placement.
ONE_SOURCE = names("""
    logical_and logical_or logical_xor mod reduce_prod acos acosh asin asinh atanh cosh sinh tan
    band_part one_hot range_1d reverse_sequence scatter scatter_along_axis scatter_nd shape
    sliding_windows
""")

FAMILY: dict[str, str] = {
    "sin": "A15 / M3", "cos": "A15 / M3", "random_uniform": "A15 / M3", "argsort": "A14 / M2",
    "affine": "A14 / M2", "crop_resize": "A14 / M2", "resample": "A14 / M2", "resize": "A14 / M2",
    "resize_bilinear": "A14 / M2", "resize_nearest_neighbor": "A14 / M2", "upsample_bilinear": "A14 / M2",
    "upsample_nearest_neighbor": "A14 / M2",
}  # fmt: skip

LISTED = ELIGIBLE | OFF_ANE.keys() | DISPUTED.keys() | ONE_SOURCE | FAMILY.keys()

INT32 = frozenset({"int32", "uint32"})
FLOATING = frozenset({"fp16", "fp32"})
RUNTIME_DTYPES = frozenset({"fp16", "fp32", "int8", "uint8", "int16", "uint16", "int32", "bool"})


@dataclass(frozen=True)
class Limits:
    """Numbers that the rules compare with: change one where your sources differ."""

    max_rank: int = 5
    max_dim: int = 16_384
    """Raise for A16 and later, or where a whole LM head is one convolution."""
    min_last_axis: int = 32
    max_enumerated: int = 128
    max_token_id: int = 65_535
    mask_floor: float = 4e4
    depthwise_channels: int = 1024
    state_multiple: int = 32
    chunk_bytes: int = 250_000_000
    ios_bytes: int = 1_000_000_000
    max_bytes: int = 2_000_000_000
    floor_bytes: int = 20_000_000
    scan_elements: int = 1 << 26
    """Constants larger than this are not searched for masks."""
    min_ane_cost: float = 0.9
    """Placement passes when at least this share of Core ML's estimated cost is on the Neural Engine."""


class Tensor(NamedTuple):
    """A runtime value: a function's input (no operation) or what an operation makes."""

    function: FunctionView
    operation: Operation | None
    name: str
    type: TensorType


@dataclass(frozen=True, eq=False)
class FunctionView:
    """One function: `operations` run at prediction time, `constexprs` when the model loads."""

    function: Function

    @property
    def name(self) -> str:
        return self.function.name

    @cached_property
    def operations(self) -> list[Operation]:
        ops = self.function.block.walk()
        return [op for op in ops if op.type != "const" and not op.type.startswith("constexpr_")]

    @cached_property
    def constexprs(self) -> list[Operation]:
        return [op for op in self.function.block.walk() if op.type.startswith("constexpr_")]

    @cached_property
    def consumers(self) -> dict[str, list[Operation]]:
        """Which operations read each value."""
        uses: dict[str, list[Operation]] = {}
        for op in self.operations:
            for name in sorted({b for bindings in op.inputs.values() for b in bindings if isinstance(b, str)}):
                uses.setdefault(name, []).append(op)
        return uses

    @cached_property
    def types(self) -> dict[str, TensorType]:
        """Types of runtime values and of weights that are decompressed at load."""
        known = {f.name: f.type for f in self.function.inputs if isinstance(f.type, TensorType)}
        for op in self.function.block.walk():
            known |= {out.name: out.type for out in op.outputs if isinstance(out.type, TensorType)}
            for block in op.blocks:
                known |= {i.name: i.type for i in block.inputs if isinstance(i.type, TensorType)}
        return known

    def producer(self, binding: Binding | None) -> Operation | None:
        """The runtime operation behind a binding."""
        op = self.function.producers.get(binding) if isinstance(binding, str) else None
        return None if op is None or op.type == "const" or op.type.startswith("constexpr_") else op

    def input(self, op: Operation, parameter: str) -> Binding | None:
        """The first binding of a parameter; those of iOS 16's constexprs are attributes."""
        bindings = op.inputs.get(parameter)
        return bindings[0] if bindings else op.attributes.get(parameter)

    def type_of(self, binding: Binding | None) -> TensorType | None:
        """The type of a binding, constant or not."""
        if isinstance(binding, Value):
            return binding.type if isinstance(binding.type, TensorType) else None
        return self.types.get(binding) if binding is not None else None

    def is_runtime(self, binding: Binding | None) -> bool:
        """Whether a binding is computed at prediction time."""
        if not isinstance(binding, str):
            return False
        op = self.function.producers.get(binding)
        return op is None or (op.type != "const" and not op.type.startswith("constexpr_"))

    def constant(self, op: Operation, parameter: str) -> np.ndarray | None:
        """A parameter's value where it is a constant tensor."""
        binding = self.input(op, parameter)
        value = None if binding is None else self.function.constant(binding)
        return value.numpy() if value is not None and isinstance(value.type, TensorType) else None

    def runtime_inputs(self, op: Operation) -> Iterator[tuple[str, TensorType]]:
        """Parameters that are computed at prediction time, with their types."""
        for parameter, bindings in op.inputs.items():
            for binding in bindings:
                type_ = self.type_of(binding)
                if self.is_runtime(binding) and type_ is not None:
                    yield parameter, type_


@dataclass(frozen=True, eq=False)
class View:
    """A program as the rules see it."""

    program: Program

    @cached_property
    def functions(self) -> list[FunctionView]:
        return [FunctionView(function) for function in self.program.functions.values()]

    def operations(self, *types: str) -> Iterator[tuple[FunctionView, Operation]]:
        """Every runtime operation (of the given types), with its function."""
        for f in self.functions:
            yield from ((f, op) for op in f.operations if not types or op.type in types)

    def constexprs(self, prefix: str) -> Iterator[tuple[FunctionView, Operation]]:
        """Every weight decompression whose type starts with `constexpr_` + `prefix`."""
        for f in self.functions:
            yield from ((f, op) for op in f.constexprs if op.type.startswith("constexpr_" + prefix))

    def tensors(self) -> Iterator[Tensor]:
        """Every runtime tensor: inputs first, then operations in order."""
        for f in self.functions:
            for feature in f.function.inputs:
                if isinstance(feature.type, TensorType):
                    yield Tensor(f, None, feature.name, feature.type)
            for op in f.operations:
                for out in op.outputs:
                    if isinstance(out.type, TensorType):
                        yield Tensor(f, op, out.name, out.type)

    @cached_property
    def package_bytes(self) -> int:
        """Size of all files of the package."""
        path = self.program.path
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
