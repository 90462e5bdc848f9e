"""Toy programs for smoke tests of conversion: one block, a tiny student as TorchScript, a tiny student as ONNX.

    python -m conversion.make_toy_block    models/toy_block.pt
    python -m conversion.make_toy_torch    models/toy_torch.pt
    python -m conversion.make_toy_onnx     onnx/toy.onnx

Weights are random, from a seed. They take the real export's path; only the sizes are toys.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import checkpoint
from distill.artifacts import atomic_file
from distill.contract import TensorSpec
from distill.errors import stage_main
from distill.export import goldens, programs, pytorch
from distill.export.tolerance import relative_error
from distill.export.twin import PrefillTwin, Rope, TwinBlock, round_to_half
from distill.model import ModelConfig, Student, rope_tables
from distill.tokenizer import toy_tokenizer
from distill.versions import optional

SEQ = 64
_OPSET = 20


def toy_student(seed: int) -> Student:
    """A 2-layer student of width 64 with random weights large enough for every matrix to matter."""
    vocab = -(-toy_tokenizer().vocab_size // 64) * 64
    config = ModelConfig(vocab, 64, 256, 2, 4, 2, head_dim=16, max_position_embeddings=512)
    student = Student(config).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def _prepare(out: Path, seed: int, name: str) -> tuple[pytorch.Shared, pytorch.ExportConfig]:
    saved = checkpoint.save(
        out.with_name(f"{name}_checkpoint.pt"),
        toy_student(seed),
        toy_tokenizer(),
        step=0,
        loss=math.nan,
        stage="random",
    )
    config = pytorch.ExportConfig(saved, out.parent, "prefill", SEQ, (SEQ,), name=name)
    return pytorch.prepare(config), config


class _Block(torch.nn.Module):
    """One block with its tables and mask inside: x (1,D,1,S) -> (1,D,1,S)."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        tables = PrefillTwin(student, SEQ, copy=True)
        self.block_0: TwinBlock = tables.blocks()[0]
        for name in (*Rope._fields, "mask"):
            self.register_buffer(name, getattr(tables, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_0(x, Rope(*(getattr(self, name) for name in Rope._fields)), self.mask)


def make_block(out: Path, seed: int) -> Path:
    """Export one transformer block; returns its contract."""
    shared, _ = _prepare(out, seed, out.stem)
    shared.fields["weights"] = {}
    d = shared.student.config.hidden_size
    x = torch.randn((1, d, 1, SEQ), generator=torch.Generator().manual_seed(seed)).half().float()
    block = _Block(shared.student)
    with torch.no_grad():
        cos, sin = rope_tables(shared.student.config, torch.arange(SEQ))
        tokens = x[:, :, 0].transpose(1, 2)  # (1,S,D)
        attend = shared.student.causal(len(cos))
        y, _ = shared.student.model.layers[0](tokens, cos[None, None], sin[None, None], attend, None)
        traced = programs.trace(block, (x,))
        found = traced(x)[:, :, 0].transpose(1, 2)
        half = round_to_half(_Block(shared.student))(x)[:, :, 0].transpose(1, 2)
        sigma = relative_error(1) * y.norm(dim=-1, keepdim=True) / math.sqrt(d)
    golden = {"input": x, "logits": y, "logits_half": half, "fp16_sigma": sigma}
    spec = [1, d, 1, SEQ]
    return pytorch.write_contract(
        shared,
        out.parent,
        out.stem,
        golden,
        None,
        {str(SEQ): programs.compare(found, golden)},
        mode="block",
        file=programs.save_program(traced, out),
        states=[],
        kv_layout=None,
        inputs=[TensorSpec("x", spec, "float16")],
        outputs=[TensorSpec("y", spec, "float16")],
    )


def make_torch(out: Path, seed: int) -> Path:
    """Export a tiny student as TorchScript; returns its contract."""
    _, config = _prepare(out, seed, out.stem)
    return pytorch.run(config)[0]


def make_onnx(out: Path, seed: int) -> Path:
    """Export a tiny student as ONNX, its named points named in the graph; returns its contract."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        optional(name, "onnx")
    shared, _ = _prepare(out, seed, out.stem)
    model = _onnx_model(shared.student)
    probes = _name_points(model.graph)
    with atomic_file(out) as temporary:
        temporary.write_bytes(model.SerializeToString())
    golden = goldens.prefill_goldens(shared.reference, SEQ, [])
    golden = {name: value for name, value in golden.items() if not name.startswith("probe.")}
    golden["logits_half"] = _run_rounded(model, golden)
    vocab = shared.student.config.vocab_size
    evaluated = goldens.evaluation(shared.reference, shared.items, SEQ)
    checked = {str(SEQ): programs.compare(_run(model, golden), golden)}
    shared.fields.update(probes=probes, weights={})  # no program of a twin
    return pytorch.write_contract(
        shared,
        out.parent,
        out.stem,
        golden,
        evaluated,
        checked,
        mode="prefill",
        file=programs.file_ref(out),
        states=[],
        kv_layout=None,
        inputs=[TensorSpec("input_ids", [1, SEQ], "int32")],
        outputs=[TensorSpec("logits", [1, SEQ, vocab], "float32")],
    )


def _onnx_model(student: Student) -> Any:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    ids = torch.zeros((1, SEQ), dtype=torch.int64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            student,
            (ids,),
            dynamo=True,
            input_names=["input_ids"],
            output_names=["logits"],
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _name_points(graph: Any) -> dict[str, str]:
    """Rename the value of each block's output and of the final norm to its point's name; returns point -> value."""
    last: dict[str, str] = {}
    for node in graph.node:
        scopes = {p.key: p.value for p in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
        for scope in parts:
            if scope.startswith("model.layers.") and scope.count(".") == 2:
                last[f"block_{scope.split('.')[-1]}"] = node.output[0]
            elif scope == "model.norm":
                last["final_norm"] = node.output[0]
    renamed = {value: point for point, value in last.items()}
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    for info in graph.value_info:
        info.name = renamed.get(info.name, info.name)
    return {point: point for point in last} | {"logits": "logits"}


def _run(model: Any, golden: dict[str, torch.Tensor]) -> torch.Tensor:
    session = optional("onnxruntime", "onnx").InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = [
        session.run(["logits"], {"input_ids": row[None].numpy().astype(np.int64)})[0][0] for row in golden["input_ids"]
    ]
    return torch.from_numpy(np.stack(rows)[:, golden["positions"].numpy()])


def _run_rounded(model: Any, golden: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the graph with every float constant rounded to fp16, computed by onnxruntime in fp32."""
    numpy_helper = optional("onnx", "onnx").numpy_helper
    rounded = type(model)()
    rounded.CopyFrom(model)
    nodes = [node for node in rounded.graph.node if node.op_type == "Constant"]
    constants = [a.t for node in nodes for a in node.attribute if a.name == "value"]
    for tensor in [*rounded.graph.initializer, *constants]:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            # a mask's lowest float is as masked at fp16's lowest
            half = value.clip(-65504, 65504).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    return _run(rounded, golden)


def _main(argv: list[str] | None, what: str, default: str, make: Any) -> int:
    parser = argparse.ArgumentParser(prog=f"distill toy-{what}", description=f"Export a toy program to {default}.")
    parser.add_argument("--out", type=Path, default=Path(default), help=f"default: {default}")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args(argv)
    contract = make(args.out, args.seed)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.2f} MB, with {contract.name}")
    return 0


@stage_main
def block_main(argv: list[str] | None = None) -> int:
    """One transformer block."""
    return _main(argv, "block", "models/toy_block.pt", make_block)


@stage_main
def torch_main(argv: list[str] | None = None) -> int:
    """A tiny student as TorchScript."""
    return _main(argv, "torch", "models/toy_torch.pt", make_torch)


@stage_main
def onnx_main(argv: list[str] | None = None) -> int:
    """A tiny student as ONNX."""
    return _main(argv, "onnx", "onnx/toy.onnx", make_onnx)
