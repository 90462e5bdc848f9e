"""The contract: what an exported program or a Core ML package promises, as JSON beside it (and inside a package).

Written by distill/export/pytorch.py for an export and by distill/convert/coreml.py for a package; read by both and by
every verification. Nothing else decides names, shapes or tolerances.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from distill.artifacts import read_json
from distill.errors import ConfigError, InputError
from distill.formats import Format, Formats
from distill.model import ModelConfig

SIDECAR_NAMES = {
    "goldens": "goldens.safetensors",
    "evaluation": "evaluation.json",
    "tokenizer": "tokenizer.json",
    "chat_template": "chat_template.jinja",
}
"""What travels with a program: role -> file name beside a package."""


_RANKS = {"prefill": [2, 3], "decode": [2, 3, 4], "block": [4, 4], "generator": [2, 3, 4]}
"""Of the first input, the first output and the state."""
WITH_STATE = ("decode", "generator")
"""Modes that take a position besides the tokens, and keep a state."""


class TensorSpec(msgspec.Struct, frozen=True):
    """An input, output or state."""

    name: str
    shape: list[int]
    dtype: str
    """int32, float16 or float32."""


class FileRef(msgspec.Struct, frozen=True):
    """A file beside the contract, and its fingerprint."""

    name: str
    sha256: str
    bytes: int


class ShapeValidation(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the exported program of one shape compared with the training model, in fp32."""

    status: Literal["pass", "fail"]
    max_abs_err: float | None = None
    """None: there is no number, since there is no program or it gave one that is not finite; the reason says which."""
    tolerance: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.status == "pass" and (self.max_abs_err is None or self.tolerance is None):
            raise ValueError("shape_validation: a pass has an error and a tolerance")


class Weight(msgspec.Struct, frozen=True):
    """A matrix of the program, as the device gets it."""

    format: str
    """distill/formats.py: fp16, int8, int4/32, lut4, ..."""
    shape: list[int]
    sha256: str
    """Over its values in fp16, decompressed."""

    def __post_init__(self) -> None:
        Format.parse(self.format)
        if len(self.shape) not in (2, 4) or self.shape[2:] not in ([], [1, 1]) or min(self.shape) < 1:
            raise ValueError(f"weights: a matrix has no shape {self.shape}")


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry point of a generator: so many tokens at once, from a position on."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    states: list[TensorSpec]
    """Those of every other function: a conversation's state passes from one to the next."""
    probes: dict[str, str] = {}
    """As `Contract.probes`."""

    def tokens(self) -> int:
        """Tokens per call."""
        return self.inputs[0].shape[-1]


class Contract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of an exported program (distill-export/1), package (distill-package/1) or Core AI asset (distill-coreai/1)."""

    schema: Literal["distill-export/1", "distill-package/1", "distill-coreai/1"]
    name: str
    mode: Literal["prefill", "decode", "block", "generator"]
    """A generator has several functions over one state."""
    file: FileRef | None
    """The exported program; for a package: its weight.bin."""
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    states: list[TensorSpec]
    enumerated_T: list[int]
    """All sequence lengths of the export; a package lists its own, with a state the context."""
    shape_validation: dict[str, ShapeValidation]
    """Keyed by sequence length; of a generator by function."""
    model_config: ModelConfig
    kv_layout: str | None
    rope: str
    mask: str
    tokenizer_sha256: str
    chat_template_sha256: str
    weights_sha256: str
    """Over the training weights, by name."""
    fp16_gain: float
    """How much the model amplifies fp16 rounding (distill/export/tolerance.py)."""
    sidecar: dict[str, FileRef]
    """goldens, evaluation, tokenizer, chat_template."""
    probes: dict[str, str]
    """Twin module -> name of its value in the program; empty in an export."""
    made_by: dict[str, Any]
    versions: dict[str, str]
    program_sha256: str | None = None
    """Of the package's program and description; None in an export."""
    evaluation_items: int = 0
    """Prompts in the evaluation file."""
    formats: Formats | None = None
    """Weight formats; None: fp16, rounded by conversion."""
    weights: dict[str, Weight] = {}
    """Every matrix by its name in the twin; empty where the program is no twin of a student."""
    tables: FileRef | None = None
    """Of an export: the scales and palettes of the compressed matrices."""
    functions: dict[str, Function] = {}
    """Of a generator, by name. `inputs`, `outputs` and `states` above are those of `decode`, the default one."""

    def __post_init__(self) -> None:
        wanted = 2 if self.mode in WITH_STATE else 1
        if (
            len(self.inputs) != wanted
            or not self.outputs
            or not all(t.shape and min(t.shape) > 0 for t in (*self.inputs, *self.outputs))
        ):
            raise ValueError(f"a {self.mode} program takes {wanted} input(s) with a shape and gives an output")
        ranks = [len(t.shape) for t in (self.inputs[0], self.outputs[0], *self.states)]
        if ranks[: len(_RANKS[self.mode])] != _RANKS[self.mode]:
            raise ValueError(
                f"the first input, output and state of a {self.mode} program have ranks {_RANKS[self.mode]}"
            )
        if self.mode != "block" and min(self.enumerated_T, default=0) < 1:
            raise ValueError(f"enumerated_T {self.enumerated_T}: a {self.mode} program has a length, of at least 1")
        if self.mode == "generator" or self.functions:
            self._check_functions()
        if unknown := set(self.sidecar) - SIDECAR_NAMES.keys():
            raise ValueError(f"sidecar: no file has the role {', '.join(sorted(unknown))}")

    def _check_functions(self) -> None:
        """Every function is like `decode` but for the number of tokens."""
        if self.mode != "generator" or "decode" not in self.functions:
            raise ValueError("a generator, and nothing else, has functions; one of them is decode")
        for name, function in self.functions.items():
            tokens = function.inputs[0].shape[-1] if function.inputs and function.inputs[0].shape else 0
            if tokens < 1 or name != (f"prefill_{tokens}" if tokens > 1 else "decode"):
                raise ValueError(f"function {name} takes {tokens} tokens: it is not called so")
            for kind in ("inputs", "outputs", "states"):
                if _with_tokens(getattr(self, kind), tokens, kind) != getattr(function, kind):
                    raise ValueError(f"the {kind} of function {name} are not those of decode for {tokens} tokens")

    def sequence(self) -> int:
        """Tokens per call: T of a prefill, 1 of a decode."""
        return self.inputs[0].shape[-1]


def _with_tokens(specs: list[TensorSpec], tokens: int, kind: str) -> list[TensorSpec]:
    """The first tensor of decode's, but with so many tokens; a state is the same whatever their number."""
    if kind == "states" or not specs:
        return specs
    shape = list(specs[0].shape)
    shape[1] = tokens
    return [msgspec.structs.replace(specs[0], shape=shape), *specs[1:]]


def read_contract(path: str | Path) -> Contract:
    """Read a contract; InputError names the file and the field that is wrong."""
    return parse_contract(read_json(path), str(path))


def parse_contract(data: Any, source: str) -> Contract:
    """A contract from plain JSON values."""
    try:
        return msgspec.convert(data, Contract)
    except (msgspec.ValidationError, ValueError, ConfigError) as error:
        raise InputError(f"{source}: not a contract: {error}") from error


def sidecar_path(folder: Path, ref: FileRef) -> Path:
    """A sidecar file's path, refusing a name that leaves the folder."""
    if Path(ref.name).name != ref.name or ref.name in ("", ".", ".."):
        raise InputError(f"{folder}: the contract names a file outside its folder: {ref.name!r}")
    return folder / ref.name
