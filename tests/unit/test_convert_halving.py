"""Our step to fp16 beside coremltools' own: the same programs, and less memory."""

import weakref

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder

from distill.convert import halving
from distill.convert.package import program_sha256
from distill.export import programs
from distill.export.twin import CachedTwin, PrefillTwin
from distill.model import ModelConfig, Student
from distill.versions import import_coremltools, quiet

CONFIG = ModelConfig(512, 64, 128, 2, 4, 2, head_dim=32, qk_norm=True, attention_bias=True, tie_word_embeddings=True)


def traced(seq, spoil=lambda student: None):
    student = Student(CONFIG).init_weights(2).eval()
    with torch.no_grad():
        spoil(student)
    if seq is not None:
        return programs.trace(PrefillTwin(student, seq), (torch.zeros((1, seq), dtype=torch.int32),))
    example = (torch.zeros((1, 1), dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    out = programs.trace(CachedTwin(student, 64), example)
    out.kv.zero_()
    return out


def converted(program, ours, consume=False):
    ct = import_coremltools()
    Builder.name_count.clear()  # as distill.convert.coreml.lower does
    passes = ct.PassPipeline()
    if ours:
        halving.use(passes, program if consume else None)
    states, inputs = None, [("input_ids", (1, 1)), ("position", (1,))]
    if hasattr(program, "kv"):
        shape = ct.TensorType(shape=tuple(program.kv.shape), dtype=np.float16)
        states = [ct.StateType(wrapped_type=shape, name="kv")]
    else:
        inputs = [("input_ids", (1, program.mask.shape[-1]))]
    with quiet():
        return ct.convert(
            program, source="pytorch", convert_to="mlprogram", states=states, pass_pipeline=passes,
            inputs=[ct.TensorType(name, shape=shape, dtype=np.int32) for name, shape in inputs],
            outputs=[ct.TensorType("logits", dtype=np.float16)], skip_model_load=True,
            minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT16,
        )  # fmt: skip


def same(one, other):
    from pathlib import Path

    first, second = (Path(m.weights_dir, "weight.bin").read_bytes() for m in (one, other))
    return first == second and program_sha256(one.get_spec()) == program_sha256(other.get_spec())


@pytest.mark.parametrize("seq", [None, 16])
@pytest.mark.parametrize("consume", [False, True])
def test_the_program_and_its_weights_are_those_of_coremltools_own_pass_byte_for_byte(seq, consume):
    program = traced(seq)
    assert same(converted(program, False), converted(program, True, consume))


def test_an_operator_with_a_weight_beyond_fp16_stays_in_fp32_as_with_coremltools():
    def spoil(student):
        student.model.layers[0].mlp.up_proj.weight[3, 4] = 70_000.0

    def kinds(model):
        ops = model._mil_program.functions["main"].operations
        return [op.outputs[0].dtype.__name__ for op in ops if op.op_type == "conv"]

    own, ours = converted(traced(16, spoil), False), converted(traced(16, spoil), True)
    assert kinds(own) == kinds(ours) and len(set(kinds(ours))) == 2
    assert same(own, ours)
    assert len(set(kinds(converted(traced(16), True)))) == 1


def test_an_infinity_and_what_is_no_number_do_not_count_as_beyond_fp16():
    large = np.zeros(3_000_000, np.float32)
    assert not halving._beyond_half(large)
    for value, beyond in ((65504.0, False), (65600.0, True), (-70_000.0, True), (np.inf, False), (np.nan, False)):
        large[-1] = value
        assert halving._beyond_half(large) is beyond, value


def test_a_consumed_program_gives_up_its_weights_and_another_keeps_them():
    kept, consumed = traced(16), traced(16)
    converted(kept, True)
    converted(consumed, True, consume=True)
    assert all(p.numel() for p in kept.parameters())
    assert not any(p.numel() for p in consumed.parameters())


def test_no_fp32_constant_outlives_the_pass(monkeypatch):
    watched = []
    original = halving._fold

    def fold(var):
        if var.val is not None and np.size(var.val) > 1000:
            watched.append(weakref.ref(var.op))
        return original(var)

    monkeypatch.setattr(halving, "_fold", fold)
    converted(traced(16), True, consume=True)
    assert len(watched) > 10 and not any(ref() is not None for ref in watched)
