"""The planner against packages that coremltools really wrote, and against arithmetic by hand."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch

from distill.config import load_yaml
from distill.contract import Contract
from distill.convert import coreml
from distill.convert.package import WEIGHT_FILE
from distill.convert.plan import LIMITS, Limits, plan, split, state_bytes
from distill.errors import InputError
from distill.export import goldens, programs
from distill.export.deployed import deploy, promised, tables_of_matrices
from distill.export.twin import CachedTwin
from distill.formats import Formats
from distill.model import ModelConfig, Student
from distill.versions import import_coremltools, quiet

SMALL = ModelConfig(512, 64, 128, 2, 4, 2, head_dim=32, tie_word_embeddings=True)
SMOLLM2 = ModelConfig(49152, 576, 1536, 30, 9, 3, max_position_embeddings=8192, tie_word_embeddings=True)


class Loaded(NamedTuple):
    student: Student
    formats: Formats | None = None


def decode_contract(student: Student, context: int, **fields: Any) -> Contract:
    return Contract(
        **programs.interface(programs.Shape("decode", context, "decode"), student.config), schema="distill-export/1",
        name="decode", file=None, enumerated_T=[context], shape_validation={}, model_config=student.config, rope="",
        mask="", tokenizer_sha256="", chat_template_sha256="", weights_sha256="", fp16_gain=1.0, sidecar={}, probes={},
        made_by={}, versions={}, **fields,
    )  # fmt: skip


def weight_bin(config: ModelConfig, formats: Formats | None, context: int, folder: Path) -> int:
    """Bytes of weight.bin of a decode program with random weights: no two constants are equal."""
    student = Student(config).init_weights(3).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    used, tables = deploy(Loaded(student, None), formats)  # type: ignore[arg-type]
    ref = None
    if used is not None and (matrices := tables_of_matrices(student, used, tables)):
        ref = programs.file_ref(goldens.write_goldens(folder / "tables.safetensors", matrices))
    contract = decode_contract(student, context, formats=used, weights=promised(student, used), tables=ref)
    example = (torch.zeros((1, 1), dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    traced = programs.trace(CachedTwin(student, context), example)
    ct = import_coremltools()
    with quiet():
        model = coreml.lower(ct, traced, contract, folder)
        model.save(str(folder / "made.mlpackage"))
    return (folder / "made.mlpackage" / WEIGHT_FILE).stat().st_size


@pytest.mark.parametrize(
    ("changes", "formats"),
    [
        ({}, None),
        ({"tie_word_embeddings": False}, Formats("int8", "int4", "lut6")),
        ({"vocab_size": 20000, "hidden_size": 96, "head_dim": 24}, Formats("int4/32", "int8")),
        ({"qk_norm": True, "attention_bias": True, "num_hidden_layers": 3}, Formats("lut4/16", "lut8")),
        ({"mlp_bias": True, "output_bias": True, "attention_bias": True}, Formats("lut3", "fp16")),
    ],
)
def test_the_plan_has_the_bytes_of_the_weight_file_that_coremltools_writes(changes, formats, tmp_path):
    config = msgspec.structs.replace(SMALL, **changes)
    real = weight_bin(config, formats, 128, tmp_path)
    found = plan(config, formats, context=128)
    assert [chunk.weights for chunk in found.chunks] == [sum(found.parts.values())]
    assert found.chunks[0].weights == real


def test_smollm2_has_the_bytes_that_arithmetic_by_hand_gives():
    found = plan(SMOLLM2, context=2048, prefill=(64,), platform="macos")
    matrix = 2 * 49152 * 576  # stored twice: gather table, and head in three slices
    assert found.parts["embedding"] == matrix + 64
    assert found.parts["head"] == matrix + 3 * 64
    assert found.parts["blocks"] == 30 * (2 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536) + 7 * 64)
    assert found.chunks[0].state == 2 * 30 * 3 * 2048 * 64 * 2 == state_bytes(SMOLLM2, 30, 2048)
    assert found.functions == ["decode", "prefill_64"]


def test_the_nine_billion_worker_is_cut_so_that_every_chunk_is_within_the_limits():
    config = msgspec.convert(load_yaml(Path(__file__).parents[2] / "configs/worker_9b.yaml")["model"], ModelConfig)
    for platform, limits in LIMITS.items():
        found = plan(config, Formats("int8", "int8"), context=4096, prefill=(64, 512), platform=platform)
        assert all(chunk.weights <= limits.chunk_bytes for chunk in found.chunks)
        assert [c.first for c in found.chunks[1:]] == [c.last for c in found.chunks[:-1]]
        assert (found.chunks[0].first, found.chunks[-1].last) == (0, 40)
        fewer = len(found.chunks) - 1
        assert fewer * limits.chunk_bytes < sum(chunk.weights for chunk in found.chunks) * 1.2
        assert sum(chunk.state for chunk in found.chunks) == 2 * 40 * 8 * 4096 * 128 * 2


def test_split_leaves_no_better_cut():
    for first, last in ((0, 0), (500, 0), (250, 330)):
        spans = split(12, 3, 100, first, last)
        ends = [first, 0, last]
        largest = max((b - a) * 100 + end for (a, b), end in zip(spans, ends, strict=True))
        every = [
            max(i * 100 + first, j * 100, (12 - i - j) * 100 + last) for i in range(1, 11) for j in range(1, 12 - i)
        ]
        assert largest == min(every)


def test_an_id_too_large_for_the_graph_puts_the_embedding_on_the_host_and_says_why():
    wide = msgspec.structs.replace(SMOLLM2, vocab_size=65_536)
    found = plan(wide, context=512)
    assert found.host_embedding and found.parts["embedding"] == 0 and found.host_bytes == 2 * 65_536 * 576
    assert "65,536 ids, the limit is 65,535: the embedding is on the host" in found.table()
    kept = plan(wide, context=512, host_embedding=False)
    assert not kept.host_embedding and "cannot look them all up" in kept.table()
    assert not plan(SMOLLM2, context=512).host_embedding


def test_what_fits_no_chunk_is_refused_with_a_way_out():
    with pytest.raises(InputError, match="keep the embedding on the host"):
        plan(SMOLLM2, context=512, limits=Limits(10_000_000, None))
    with pytest.raises(InputError, match="--chunks 31"):
        split(30, 31, 1, 0, 0)


def test_the_plan_as_json_names_the_source_of_every_limit_in_its_notes():
    found = plan(SMOLLM2, Formats("int4/32"), context=500, platform="ios")
    data = json.loads(json.dumps(found.to_json()))
    assert len(data["chunks"]) == len(found.chunks) and data["parts"] == found.parts
    for word in ("chunk_bytes", "layers", "head_slice", "state", "formats"):
        assert any(data["sources"][word] in note for note in data["notes"]), word
