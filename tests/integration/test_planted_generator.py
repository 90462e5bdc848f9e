"""Faults of a package with several functions over one state: each fails the gates that exist for it, with every sha256
made to match. Most of them change one function only: the others, and the weights, are as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill import mil
from distill.artifacts import sha256_file
from distill.convert import functions
from distill.convert.package import WEIGHT_FILE, sidecar_folder
from distill.errors import DistillError, InputError
from distill.formats import Formats
from distill.mil.state import State
from distill.verify import in_use
from distill.verify.generator import Session
from distill.verify.runner import Conversation, Cut, PackageRunner
from tests.conftest import Toy
from tests.integration.conftest import Verify
from tests.integration.spoil import Spoilt

USE = {"use_tokens", "use_kv", "use_chunks", "use_conversations", "use_limit"}


def test_a_good_package_passes_every_gate_that_this_machine_can_check(generator: Path, verify: Verify) -> None:
    verdict = verify(generator)
    skipped = {name for name, gate in verdict.items() if gate["status"] == "skipped"}
    assert (verdict.code, verdict.failed()) == (3, [])  # one prompt is too few to judge tool calls by
    assert skipped <= {"core_ml"} and verdict["tool_span_f1"]["status"] == "inconclusive"
    assert "prompt of 53 as 24+24+5, then 75 steps, 0 ties" in verdict.reason("use_tokens")


def test_two_builds_in_weight_formats_are_the_same_bytes_and_pass(toy: Toy, tmp_path: Path, verify: Verify) -> None:
    packages = [tmp_path / name / "toy.mlpackage" for name in "ab"]
    for package in packages:
        package.parent.mkdir()
        config = functions.FunctionsConfig(
            toy.checkpoint, package, 32, (8,), Formats(blocks="int4/32", embedding="int8")
        )
        functions.build(config, lambda line: None)
    a, b = (
        {str(f.relative_to(p.parent)): sha256_file(f) for f in sorted(p.parent.rglob("*")) if f.is_file()}
        for p in packages
    )
    assert a == b and len(a) == 8
    verdict = verify(packages[0])
    assert verdict.failed() == [] and float(verdict["weights_shared"]["observed"]) == pytest.approx(1.0, abs=0.003)


@pytest.mark.parametrize("entry", ["decode", "prefill_8", "prefill_24"])
@pytest.mark.parametrize("which", [0, 3])
def test_a_state_write_dropped_in_one_function_is_seen(
    generator: Path, tmp_path: Path, verify: Verify, entry: str, which: int
) -> None:
    """The keys of block 0, or the values of block 1."""
    spoilt = Spoilt(generator, tmp_path, entry)
    writes = [op for op in spoilt.operations if op.type == "write_state"]
    update = spoilt.operation(writes[which].inputs["data"].arguments[0].name)
    spoilt.rename_use(update.outputs[0].name, update.inputs["x"].arguments[0].name)
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and {"state", "use_kv", "use_chunks"} <= set(verdict.failed())
    assert verdict["interface"]["status"] == verdict["program_unaltered"]["status"] == "pass"


def test_values_written_where_the_keys_belong_are_seen(generator: Path, tmp_path: Path, verify: Verify) -> None:
    spoilt = Spoilt(generator, tmp_path, "prefill_8")
    updates = [op for op in spoilt.operations if op.type == "slice_update"]
    for part in ("begin", "end"):
        updates[1].inputs[part].CopyFrom(updates[0].inputs[part])
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and {"state", "parity_exact", "use_kv", "use_chunks"} <= set(verdict.failed())


def test_a_chunk_written_at_the_beginning_whatever_its_position_is_seen(
    generator: Path, tmp_path: Path, verify: Verify
) -> None:
    """The first chunk is right; the second one overwrites it. Its rows then are not those of its tokens."""
    spoilt = Spoilt(generator, tmp_path, "prefill_24")
    scalar = next(op for op in spoilt.operations if op.type == "slice_by_index" and _uses(op, "position"))
    name = scalar.outputs[0].name
    zero = type(scalar).FromString(scalar.SerializeToString())
    zero.type = "sub"
    for key in list(zero.inputs):
        del zero.inputs[key]
    zero.outputs[0].name = "nowhere"
    for side in ("x", "y"):
        zero.inputs[side].arguments.add().name = name
    kept = [type(op).FromString(op.SerializeToString()) for op in spoilt.operations]
    spoilt.rename_use(name, "nowhere")
    renamed = [type(op).FromString(op.SerializeToString()) for op in spoilt.operations]
    at = next(i for i, op in enumerate(kept) if op.outputs and op.outputs[0].name == name)
    operations = spoilt.operations
    del operations[:]
    operations.extend([*renamed[: at + 1], zero, *renamed[at + 1 :]])
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and {"state", "use_kv", "use_chunks"} <= set(verdict.failed())
    assert "changed the state at another position" in verdict.reason("use_kv") + verdict.reason("use_tokens")


def test_a_rope_that_is_not_shifted_with_the_chunk_is_seen(generator: Path, tmp_path: Path, verify: Verify) -> None:
    """Its tables are looked up at 0, 1, ... in every chunk: the first chunk, at position 0, is right."""
    spoilt = Spoilt(generator, tmp_path, "prefill_24")
    for op in spoilt.operations:
        if op.type == "gather" and op.inputs["x"].arguments[0].name.endswith(("cos_to_fp16", "sin_to_fp16")):
            op.inputs["indices"].arguments[0].name = "offsets"
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and {"parity_exact", "state", "use_kv", "use_chunks"} <= set(verdict.failed())
    assert verdict["named_points"]["status"] == "pass" and "prefill_24" in verdict.reason("parity_exact")


@pytest.mark.parametrize("entry", ["decode", "prefill_8"])
def test_a_mask_that_hides_a_token_from_itself_is_seen(
    generator: Path, tmp_path: Path, verify: Verify, entry: str
) -> None:
    spoilt = Spoilt(generator, tmp_path, entry)
    next(op for op in spoilt.operations if op.type == "less_equal").type = "less"
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and {"parity_exact", "use_kv", "use_chunks"} <= set(verdict.failed())


def test_a_mask_that_shows_the_next_row_is_seen(generator: Path, tmp_path: Path, verify: Verify) -> None:
    """In all functions: they share the table. What a token sees there is another's, or what was left there."""
    spoilt = Spoilt(generator, tmp_path, "decode")
    record = spoilt.operation("steps").attributes["val"].blobFileValue.offset
    raw = bytearray(spoilt.weights.read_bytes())
    start, size = record + 64, 4 * 128
    positions = np.frombuffer(raw, np.int32, 128, start)
    assert positions.tolist() == list(range(128))
    raw[start : start + size] = np.maximum(positions - 1, 0).tobytes()
    spoilt.weights.write_bytes(raw)
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and {"parity_exact", "state", "use_chunks", "use_conversations"} <= set(verdict.failed())


def test_exchanged_functions_are_seen(generator: Path, tmp_path: Path, verify: Verify) -> None:
    spoilt = Spoilt(generator, tmp_path, "prefill_8")
    program = spoilt.model.mlProgram.functions
    a, b = (type(program["decode"]).FromString(program[n].SerializeToString()) for n in ("prefill_8", "prefill_24"))
    program["prefill_8"].CopyFrom(b)
    program["prefill_24"].CopyFrom(a)
    described = {f.name: f for f in spoilt.model.description.functions}
    described["prefill_8"].name, described["prefill_24"].name = "prefill_24", "prefill_8"
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and "interface" in verdict.failed()
    assert "int32[1, 8], package int32[1, 24] in prefill_8" in verdict.reason("interface")


def test_another_default_function_is_seen(generator: Path, tmp_path: Path, verify: Verify) -> None:
    spoilt = Spoilt(generator, tmp_path)
    spoilt.model.description.defaultFunctionName = "prefill_8"
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and "the default function is prefill_8" in verdict.reason("interface")


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_that_one_function_has_for_itself_are_seen_by_build_and_verification(
    generator: Path, tmp_path: Path, verify: Verify
) -> None:
    before = (generator / WEIGHT_FILE).stat().st_size
    package = Spoilt(generator, tmp_path, "prefill_24").detach("embed_weight_to_fp16", lambda values: values).seal()
    verdict = verify(package)
    assert verdict.code == 1 and verdict.failed() == ["weights_shared"]
    with pytest.raises(DistillError, match="do not share their weights"):
        functions.require_shared(before, (package / WEIGHT_FILE).stat().st_size)


def test_a_matrix_changed_in_one_function_alone_is_seen(generator: Path, tmp_path: Path, verify: Verify) -> None:
    name = "block_1_attention_k_weight_to_fp16"
    verdict = verify(Spoilt(generator, tmp_path, "prefill_8").detach(name, lambda values: values * 1.01).seal())
    assert verdict.code == 1 and "parity_exact" in verdict.failed()
    assert "prefill_8: block_1.attention.k.weight" in verdict.reason("parity_exact")


# --- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "gate"),
    [
        ("greedy", lambda v: np.where(np.arange(len(v)) == len(v) - 1, (v + 3) % 300, v), "use_tokens"),
        ("kv", lambda v: v * 1.5, "use_kv"),
        ("kv_half", lambda v: v * 1.01, "use_chunks"),
        ("logits", lambda v: v * 1.5, "parity_fp16"),
        ("logits_half", lambda v: v * 1.001, "parity_exact"),
        ("end.logits", lambda v: v * 2, "use_limit"),
        ("far.prefill_24.kv_half", lambda v: v * 1.01, "state"),
        ("kv_sigma", lambda v: v[:, :-1], "shapes_run"),
        ("rows", lambda v: v[::-1], "shapes_run"),
        ("prompt", lambda v: v - 1, "shapes_run"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_its_reference_fails(
    generator: Path, tmp_path: Path, verify: Verify, name: str, change: Callable[[Any], Any], gate: str
) -> None:
    spoilt = Spoilt(generator, tmp_path)
    path = spoilt.sidecar / "goldens.safetensors"
    golden = load_file(path)
    golden[name] = np.ascontiguousarray(change(golden[name]).astype(golden[name].dtype))
    save_file(golden, path)
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and gate in verdict.failed()


def test_a_tie_is_counted_and_the_reference_s_token_is_fed(generator: Path, tmp_path: Path, verify: Verify) -> None:
    """PyTorch's last choice is made another one, with a margin that fp16 can turn, and then with one it cannot."""
    for share, status in ((0.5, "pass"), (1.5, "fail")):
        spoilt = Spoilt(generator, tmp_path / str(share))
        path = spoilt.sidecar / "goldens.safetensors"
        golden = load_file(path)
        session = Session(PackageRunner(generator))
        golden["greedy"][-1] += 3
        golden["margins"][-1] = share * golden["fp16_sigma"][-1, 0] * session.factor
        save_file(golden, path)
        verdict = verify(spoilt.seal())
        assert verdict["use_tokens"]["status"] == status
        assert ("1 ties" in verdict.reason("use_tokens")) == (status == "pass")


# --- the runner -----------------------------------------------------------------------------------------------------


class _Leaking(PackageRunner):
    """Gives every conversation the same state."""

    kept: State | None = None

    def begin(self) -> Conversation:
        conversation = super().begin()
        self.kept = self.kept or conversation.state
        conversation.state = self.kept
        return conversation


class _Unbounded(PackageRunner):
    """Feeds what does not fit, as far back as it does."""

    def call(self, function: str, ids: Any, position: int, state: State) -> np.ndarray:
        return super().call(function, ids, max(0, min(position, self.capacity - self.functions[function])), state)


def test_a_state_that_leaks_between_conversations_is_seen(generator: Path) -> None:
    assert in_use.conversations_gate(Session(PackageRunner(generator))).status == "pass"
    gate = in_use.conversations_gate(Session(_Leaking(generator)))
    assert gate.status == "fail" and "conversation 0" in str(gate.reason)


def test_a_runner_that_writes_at_a_full_context_is_seen(generator: Path) -> None:
    with pytest.raises(DistillError, match=r"a call that was refused changed the state|only .* were refused"):
        in_use.limit_gate(Session(_Unbounded(generator)))


def test_a_conversation_that_is_full_says_so_and_keeps_its_state(generator: Path) -> None:
    runner = PackageRunner(generator)
    conversation = runner.begin()
    conversation.feed(list(range(5, 131)))
    held = conversation.state.read("kv")
    with pytest.raises(InputError, match=r"its context of 128 tokens is full: 3 more do not fit after 126"):
        conversation.feed([1, 2, 3])
    assert np.array_equal(held, conversation.state.read("kv")) and conversation.position == 126
    assert np.isfinite(conversation.feed([1, 2])).all() and conversation.position == 128


def test_a_padded_chunk_leaves_rows_that_no_later_token_sees(generator: Path) -> None:
    """Five tokens through the function of eight, padded with three; the next tokens are what they are without."""
    runner, ids = PackageRunner(generator), [5, 9, 70, 8, 33, 41, 2, 17, 60, 4]
    padded, one_by_one = runner.begin(), runner.begin()
    a = np.concatenate([padded.feed(ids[:5], [Cut("prefill_8", 5)]), padded.feed(ids[5:], [Cut("decode", 1)] * 5)])
    b = one_by_one.feed(ids, [Cut("decode", 1)] * 10)
    assert np.abs(a - b).max() < 0.02 * np.abs(b).max()
    spoilt = runner.begin()
    spoilt.feed(ids[:5], [Cut("prefill_8", 5)])
    kv = spoilt.state.read("kv")
    assert kv[:, :, 5:8].any()  # the padding did write
    kv[:, :, 5:8] = 100.0
    spoilt.state.write("kv", kv)
    again = spoilt.feed(ids[5:], [Cut("decode", 1)] * 5)
    assert np.array_equal(again, a[5:])


def test_one_state_serves_every_function(generator: Path) -> None:
    """Made for one function, it is taken by the others: a state goes by its name."""
    program = mil.load(generator)
    state = program.make_state("prefill_8")
    feed = {"input_ids": np.full((1, 8), 7, np.int32), "position": np.zeros(1, np.int32)}
    program.predict(feed, "prefill_8", state)
    one = {"input_ids": np.full((1, 1), 7, np.int32), "position": np.full(1, 8, np.int32)}
    program.predict(one, "decode", state)
    assert state.read("kv")[:, :, 8].any() and not state.read("kv")[:, :, 9:].any()


def test_a_package_without_its_checkpoint_is_verified_all_the_same(generator: Path, tmp_path: Path) -> None:
    """Package and sidecar are all that is read."""
    copy = tmp_path / "elsewhere" / "model.mlpackage"
    shutil.copytree(generator, copy)
    shutil.copytree(sidecar_folder(generator), sidecar_folder(copy))
    session = Session(PackageRunner(copy))
    assert in_use.tokens_gate(session, session.run_all())[0].status == "pass"


def _uses(op: Any, name: str) -> bool:
    return any(b.name == name for argument in op.inputs.values() for b in argument.arguments)
