"""Checkpoint -> one Core ML package that generates: decode and chunked prefill as functions over one KV state.

    distill package --checkpoint C --out X.mlpackage --context 2048 --prefill 64 256 [--formats blocks=int8]

`decode` takes one token, `prefill_64` takes 64; each also takes the position of the first, and all keep keys and values
in the state `kv`. The weights are in the package once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from distill.artifacts import provenance, require_replaceable, require_writable, write_json
from distill.contract import Contract, Function, ShapeValidation, TensorSpec
from distill.convert import chunks, coreml
from distill.convert import plan as planner
from distill.convert.package import WEIGHT_FILE, save_package, sidecar_folder
from distill.errors import DistillError, InputError, stage_main
from distill.export import goldens, programs, pytorch
from distill.export.conversation import alone, conversation
from distill.export.deployed import parse_formats
from distill.export.twin import CachedTwin
from distill.formats import Formats
from distill.versions import import_coremltools, quiet, versions

LARGEST_EXCESS = 0.01
"""Weights of the package above those of its largest function alone."""


class FunctionsConfig(NamedTuple):
    """What to build."""

    checkpoint: Path
    out: Path
    context: int | None = None
    """Positions of the state; None: the longest of `export.seq` of the training configuration."""
    prefill: tuple[int, ...] = ()
    """Tokens of each prefill function; empty: the other lengths of `export.seq`."""
    formats: Formats | None = None
    """As `ExportConfig.formats`."""
    toy: bool = False
    """As `ExportConfig.toy`."""


class _Source(NamedTuple):
    """What every function is made from and judged by."""

    shared: pytorch.Shared
    contract: Contract
    """Of the package to be; its functions have no probes yet."""
    golden: dict[str, Tensor]
    folder: Path


def build(config: FunctionsConfig, say: Callable[[str], None] = print) -> Contract:
    """Build the package; returns its contract. InputError for bad input, DistillError where a function is not the
    trained model, or where the weights are not shared."""
    if config.out.suffix != ".mlpackage":
        raise InputError(f"--out {config.out}: a Core ML package's name ends in .mlpackage")
    require_replaceable(config.out)
    require_replaceable(sidecar_folder(config.out))
    require_writable(config.out.parent)
    ct = import_coremltools()
    with tempfile.TemporaryDirectory(prefix="distill.package.") as name:
        source = _prepare(config, Path(name), say)
        made, checked, models = {}, {}, {}
        for function in source.contract.functions:
            say(f"{function}: tracing")
            traced, checked[function] = _traced(source, function)
            say(f"{function}: max error {checked[function].max_abs_err:.2e} in fp32; converting")
            models[function] = Path(name) / f"{function}.mlpackage"
            made[function] = _converted(ct, traced, source, function, models[function])
            del traced  # one program at a time: it holds the weights
        contract = msgspec.structs.replace(
            source.contract,
            functions=made, shape_validation=checked, probes=made["decode"].probes, tables=None, versions=versions(),
        )  # fmt: skip
        say(f"merging {len(models)} functions")
        written = save_package(Merged(ct, models), config.out, contract, Path(name))
    assert written is not None
    return written


def _prepare(config: FunctionsConfig, folder: Path, say: Callable[[str], None]) -> _Source:
    lengths = () if config.context is None else (config.context,)
    export = pytorch.ExportConfig(
        config.checkpoint, folder, enumerated_T=lengths, toy=config.toy, formats=config.formats
    )
    shared = pytorch.prepare(export)
    context = max(shared.lengths)
    planner.require_ids(shared.student.config, host_embedding=False)
    chunks = sorted(config.prefill or [t for t in shared.lengths if t < context] or [context])
    if len(set(chunks)) != len(chunks) or min(chunks) < 2 or max(chunks) > context:
        raise InputError(f"--prefill {chunks}: lengths must be distinct, at least 2, and no longer than {context}")
    say(f"{config.checkpoint}: context {context}, prefill by {', '.join(map(str, chunks))} tokens; computing goldens")
    evaluated = goldens.evaluation(shared.reference, shared.items, context)
    names = {f"prefill_{t}": t for t in chunks}
    golden = conversation(shared.reference, context, names, _material(evaluated))
    sidecar = shared.sidecar | {
        "goldens": programs.file_ref(goldens.write_goldens(folder / "goldens.safetensors", golden)),
        "evaluation": programs.file_ref(write_json(folder / "evaluation.json", evaluated)),
    }
    fields = shared.fields | programs.interface(programs.Shape("decode", context, "decode"), shared.student.config)
    made_by = provenance(
        {"context": context, "prefill": chunks, "target": "iOS18"}, {"checkpoint": config.checkpoint}
    ) | {key: shared.fields["made_by"][key] for key in ("stage", "step", "lineage")}
    fields |= {"mode": "generator", "enumerated_T": [context], "made_by": made_by, "sidecar": sidecar}
    contract = Contract(
        **fields, name=config.out.stem, file=None, shape_validation={}, evaluation_items=len(evaluated["items"]),
        functions={name: _interface(fields, t) for name, t in {"decode": 1, **names}.items()},
    )  # fmt: skip
    return _Source(shared, contract, golden, folder)


def _material(evaluated: dict[str, Any]) -> list[int]:
    """The evaluation's dialogues one after another, a prompt at the end."""
    rows = evaluated["items"]
    dialogues = [token for row in rows for token in row["prompt_ids"] + row["greedy"]["tokens"]]
    return dialogues + rows[0]["prompt_ids"] if rows else []


def _interface(decode: dict[str, Any], tokens: int) -> Function:
    (ids, position), (logits,), states = decode["inputs"], decode["outputs"], decode["states"]
    return Function(
        [TensorSpec(ids.name, [1, tokens], ids.dtype), position],
        [TensorSpec(logits.name, [1, tokens, logits.shape[2]], logits.dtype)],
        states,
    )


@torch.no_grad()
def _traced(source: _Source, name: str) -> tuple[Any, ShapeValidation]:
    """The function's program, which gave the training model's logits on the golden conversation."""
    function, golden = source.contract.functions[name], source.golden
    seq, ids = function.tokens(), golden["input_ids"]
    twin = CachedTwin(source.shared.student, function.states[0].shape[2], seq)
    traced = programs.trace(twin, (torch.zeros((1, seq), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)))
    traced.kv.zero_()
    rows, columns, found, expected = golden["rows"], golden["columns"], [], []
    for first in alone(seq, ids.shape[1]):
        logits = traced(_padded(ids[:, first : first + seq], seq), torch.tensor([first], dtype=torch.int32))[0]
        here = rows[(rows >= first) & (rows < min(first + seq, ids.shape[1]))]
        found.append(logits[here - first][:, columns])
        expected.append(golden["logits"][torch.isin(rows, here)])
    traced.kv.zero_()
    checked = programs.compare(torch.cat(found), {"logits": torch.cat(expected)})
    if checked.status == "fail":
        raise DistillError(f"{name}: {checked.reason}")
    return traced, checked


def _padded(ids: Tensor, seq: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, seq - ids.shape[1]))


def _converted(ct: Any, traced: Any, source: _Source, name: str, out: Path) -> Function:
    """Convert and save one function; returns it with its probes."""
    function = source.contract.functions[name]
    part = msgspec.structs.replace(
        source.contract, mode="decode", inputs=function.inputs, outputs=function.outputs, functions={}
    )
    with quiet(), coreml.one_line(source.contract.name):
        model = coreml.lower(ct, traced, part, source.folder)
        coreml.check_state_writes(model, part)
        model.save(str(out))
    return msgspec.structs.replace(function, probes=coreml.probes(model, part))


class Merged:
    """The functions as one package, each weight once."""

    def __init__(self, ct: Any, models: dict[str, Path]) -> None:
        self.ct, self.models = ct, models

    def save(self, path: str) -> None:
        """As MLModel.save."""
        descriptor = self.ct.utils.MultiFunctionDescriptor()
        for name, model in self.models.items():
            descriptor.add_function(str(model), "main", name)
        descriptor.default_function_name = "decode"
        with quiet():
            self.ct.utils.save_multifunction(descriptor, path)
        alone_bytes = max((model / WEIGHT_FILE).stat().st_size for model in self.models.values())
        require_shared(alone_bytes, (Path(path) / WEIGHT_FILE).stat().st_size)


def require_shared(alone_bytes: int, merged_bytes: int) -> None:
    """DistillError where the weights of the package are not those of its largest function, in size."""
    if merged_bytes > alone_bytes * (1 + LARGEST_EXCESS):
        raise DistillError(
            f"the functions do not share their weights: weight.bin has {merged_bytes} bytes, "
            f"that of the largest function {alone_bytes}"
        )


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse and build."""
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        return planner.main([arg for arg in argv if arg != "--plan"])
    parser = argparse.ArgumentParser(
        prog="distill package", description=(__doc__ or "").splitlines()[0], epilog=planner.parser().format_usage()
    )
    parser.add_argument("--checkpoint", type=Path, default=pytorch.DEFAULT_CHECKPOINT, help="a trained student")
    parser.add_argument("--out", type=Path, required=True, help="X.mlpackage")
    parser.add_argument("--context", type=int, metavar="C", help="positions (default: the longest of export.seq)")
    parser.add_argument(
        "--prefill", type=int, nargs="+", default=[], metavar="T",
        help="tokens of each prefill function (default: the other lengths of export.seq)",
    )  # fmt: skip
    parser.add_argument("--toy", action="store_true", help="evaluate on the toy set's held-out prompts")
    parser.add_argument(
        "--formats", type=parse_formats, metavar="blocks=int4/32,embedding=int8",
        help="weight formats (default: those that the student was trained in, else fp16)",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print what it would hold and cost; see --plan --help")
    parser.add_argument("--chunks", type=int, default=1, metavar="N", help="cut the blocks into N packages")
    parser.add_argument("--host-embedding", action="store_true", help="the runner looks up ids, in a table beside it")
    args = parser.parse_args(argv)
    if args.chunks != 1 or args.host_embedding:
        return chunks.main(args)
    config = FunctionsConfig(args.checkpoint, args.out, args.context, tuple(args.prefill), args.formats, args.toy)
    contract = build(config, lambda line: print(line, flush=True))
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    names = ", ".join(contract.functions)
    print(f"wrote {args.out}: {size / 1e6:.2f} MB, functions {names}, weights sha256 {_digest(contract)}")
    return 0


def _digest(contract: Contract) -> str:
    return contract.file.sha256[:12] if contract.file else "none"
