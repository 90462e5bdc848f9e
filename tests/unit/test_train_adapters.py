"""Adapters: only they train, what is written is the plain student, a stopped run goes on bit for bit."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill import checkpoint
from distill.errors import CheckpointError, ConfigError, InputError
from distill.model import ModelConfig, Student
from distill.pretrained import save_pretrained
from distill.tokenizer import toy_tokenizer
from distill.train import loop
from distill.train.adapters import adapters, add_adapters, plain
from distill.train.config import LoraSection, OnPolicySection, TeacherSection, TrainConfig
from distill.train.evaluation import held_out
from distill.train.optimiser import make_optimiser, optimiser_bytes
from distill.train.prepare import prepare
from distill.train.step import gradients
from distill.train.toy import toy_model
from tests.unit.test_train_loop import _assert_same_run, _stopped
from tests.unit.train_sets import config, write_set

SMALL = LoraSection(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "d.jsonl", 16, truth="No.")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    save_pretrained(Student(toy_model(32, 1)).init_weights(9), folder)
    (folder / "tokenizer.json").write_text(toy_tokenizer().to_json())
    return str(folder)


def _run(settings: TrainConfig) -> tuple[loop.Report, str]:
    out = io.StringIO()
    return loop.run(settings, console=Console(file=out, width=200)), out.getvalue()


def _adapted(model: ModelConfig, section: LoraSection = SMALL, seed: int = 0) -> Student:
    """With adapters that do something."""
    student = Student(model).init_weights(1)
    add_adapters(student, section, seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.1, generator=generator)
    return student


MODELS = {
    "tied": msgspec.structs.replace(toy_model(32, 2), tie_word_embeddings=True),
    "untied, biases, QK-norm": msgspec.structs.replace(
        toy_model(32, 2), attention_bias=True, output_bias=True, mlp_bias=True, qk_norm=True
    ),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_merged_student_is_the_adapted_one_to_fp32_rounding(model: ModelConfig) -> None:
    student = _adapted(model)
    ids_BT = torch.randint(0, model.vocab_size, (2, 20), generator=torch.Generator().manual_seed(2))
    merged = plain(student)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == model.tie_word_embeddings
    with torch.no_grad():
        before, after = student(ids_BT), merged(ids_BT)
        unadapted = Student(model).init_weights(1)(ids_BT)
    scale = float(before.norm())
    assert float((before - after).norm()) < 2e-6 * scale < 2e-2 * float((before - unadapted).norm())
    own, base = student.state_dict(), Student(model).init_weights(1).state_dict()
    for name, weight in merged.state_dict().items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in own:
            a, b = (own[f"{stem}.lora_{x}.default.weight"].double() for x in "AB")
            expected = base[name].double() + 8.0 / 4 * b @ a
            assert float((weight - expected).abs().max()) < 2e-7 * float(expected.abs().max())
            assert not torch.equal(weight, base[name])
        else:
            assert torch.equal(weight, base[name])


def test_at_the_start_adapters_change_nothing_and_only_the_seed_decides_them() -> None:
    students = [Student(toy_model(32, 1)).init_weights(1) for _ in range(3)]
    before = torch.get_rng_state()
    for student, seed in zip(students, (0, 0, 1)):
        add_adapters(student, SMALL, seed)
    first, same, other = (adapters(student) for student in students)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)
    merged, base = plain(students[0]).state_dict(), Student(toy_model(32, 1)).init_weights(1).state_dict()
    assert merged.keys() == base.keys() and all(torch.equal(merged[name], base[name]) for name in base)
    assert plain(merged_student := plain(students[0])) is merged_student


def test_a_step_with_a_frozen_head_trains_the_adapters_and_computes_no_gradient_of_the_head(
    tmp_path: Path, data: Path
) -> None:
    """Autograd through plain logits says what the adapters' gradients are."""
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            new = "zeros" in str(func) or "mm" in str(func)
            if isinstance(out, Tensor) and out.shape == head.shape and new:
                made.append(str(func))
            return out

    for lora, expected in ((SMALL, False), (None, True)):
        it = prepare(config(tmp_path, data, lora=lora))
        head = it.start.student.lm_head.weight
        made.clear()
        with Watch():
            gradients(it.model, [it.train.batch([0, 1])], it.objective)
        assert bool(made) == expected
        assert [name for name, p in it.start.student.named_parameters() if (p.grad is None) != (lora is None)] == [
            name for name, _ in it.start.student.named_parameters() if lora is None or "lora_" not in name
        ]


def test_adapters_have_autograd_s_gradient(tmp_path: Path, data: Path) -> None:
    it = prepare(config(tmp_path, data, lora=SMALL))
    student, batch = it.start.student, it.train.batch([0, 1, 2])
    weights = {"ce_teacher": 1.0}
    gradients(it.model, [batch], it.objective._replace(weights=weights))
    logits = student(batch.ids_T[None, : batch.lengths[0]])[0]
    whole = [logits] + [
        student(part[None])[0] for part in batch.ids_T.split(batch.lengths)[1:]
    ]  # each document by itself
    nll = -torch.cat(whole)[batch.positions_N].log_softmax(-1).gather(1, batch.labels_N[:, None])[:, 0]
    loss = nll[batch.teacher_N].sum() / len(batch.labels_N)
    trained = [p for p in student.parameters() if p.requires_grad]
    for p, theirs in zip(trained, torch.autograd.grad(loss, trained)):
        assert p.grad is not None and float((p.grad - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-7


def test_a_run_learns_with_its_base_untouched_and_writes_a_plain_student(tmp_path: Path, data: Path) -> None:
    settings = config(tmp_path, data, lora=SMALL, epochs=6, lr=2e-2)
    report, text = _run(settings)
    after = report.values["held_out"]["after"]
    assert all(after[name] < value for name, value in report.values["held_out"]["before"].items())
    assert "lora: rank 4 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: 2,944 parameters" in text
    found, base = checkpoint.load(report.checkpoint).student.state_dict(), Student(toy_model(32, 1)).init_weights(0)
    assert found.keys() == base.state_dict().keys()
    changed = {name.split(".")[-2] for name, value in base.state_dict().items() if not torch.equal(value, found[name])}
    assert changed == set(SMALL.targets)
    it = prepare(msgspec.structs.replace(settings, lora=None))
    it.start.student.load_state_dict(found)
    judged = held_out(it, [])
    assert judged.means["kl_div"] == pytest.approx(after["kl_div"], rel=1e-5)


def test_gradients_and_moments_take_the_adapters_bytes_only(tmp_path: Path, data: Path) -> None:
    found = []
    for lora in (None, SMALL):
        it = prepare(config(tmp_path, data, lora=lora, model=toy_model(64, 4)))
        optimiser = make_optimiser(it.model, it.config)
        gradients(it.model, [it.train.batch([0])], it.objective)
        optimiser.step()
        held = sum(p.grad.numel() * 4 for p in it.model.parameters() if p.grad is not None)
        found.append((held, optimiser_bytes(optimiser)))
        n = sum(x.numel() for x in adapters(it.start.student).values()) if lora else it.start.student.config.n_params()
        assert found[-1] == (4 * n, 8 * n)
    assert found[1][0] < 0.1 * found[0][0]


def _cases(teacher: str) -> dict[str, dict[str, Any]]:
    beside = TeacherSection(folder=teacher, target="dense")
    return {
        "fp32": {},
        "bf16, checkpointing": {"dtype": "bf16", "gradient_checkpointing": True},
        "on policy": {"teacher": beside, "on_policy": OnPolicySection(0.5, 8), "epochs": 1},
        # rank 128: 4,096 weights each, whose moments are kept in 8 bits
        "adamw8bit, bf16, on policy": {
            "teacher": beside, "on_policy": OnPolicySection(0.5, 8), "epochs": 1, "dtype": "bf16",
            "optimiser": "adamw8bit", "lora": LoraSection(128, 256.0, ["q_proj"]), "gradient_checkpointing": True,
        },
    }  # fmt: skip


@pytest.mark.parametrize("case", ["fp32", "bf16, checkpointing", "on policy", "adamw8bit, bf16, on policy"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, data: Path, teacher: str, case: str) -> None:
    changes = {"lora": SMALL} | _cases(teacher)[case]
    _run(config(tmp_path / "whole", data, save_every=0, **changes))
    _stopped(config(tmp_path / "cut", data, **changes), 4)
    (partial,) = (tmp_path / "cut/checkpoints").glob("worker.step_000004.pt")
    between = checkpoint.load(partial).student.state_dict()  # a plain student, as far as it has come
    assert "continuing" in _run(config(tmp_path / "cut", data, **changes))[1]
    _assert_same_run(tmp_path / "cut", tmp_path / "whole")
    finished = checkpoint.load(tmp_path / "whole/checkpoints/worker.pt").student.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    start = Student(toy_model(32, 1)).init_weights(0).state_dict()[name]
    assert 0 < float((between[name] - start).norm()) < float((finished[name] - start).norm())


def _cut(saved: dict[str, Tensor]) -> None:
    saved.update({name: value[:1] for name, value in saved.items()})


@pytest.mark.parametrize("spoil", [_cut, dict.popitem, lambda saved: saved.update(more=torch.ones(1))])
def test_adapters_that_do_not_fit_are_one_line(tmp_path: Path, data: Path, spoil: Callable[[Any], object]) -> None:
    settings = config(tmp_path, data, lora=SMALL)
    _stopped(settings, 2)
    newest = tmp_path / "checkpoints/worker.step_000002.pt"
    contents = torch.load(newest)
    spoil(contents["resume"]["adapters"])
    checkpoint.write_sealed(newest, contents)
    with pytest.raises(CheckpointError, match="cannot be continued") as caught:
        _run(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["q", "lm_head", "embed_tokens", "self_attn", "input_layernorm", ""])
def test_a_target_that_is_no_linear_layer_of_a_block_is_one_line(tmp_path: Path, data: Path, target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(config(tmp_path, data, lora=LoraSection(targets=["q_proj", target])))
    assert f"lora.targets: no linear layer of a block is called {target!r}" in str(caught.value)
    assert "'down_proj', 'gate_proj', 'k_proj'" in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"targets": []}, {"targets": ["q_proj"] * 2}]
)
def test_values_that_make_no_adapter_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"lora.{next(iter(values))} must"):
        LoraSection(**values)


def test_a_missing_package_is_one_line_that_names_the_extra(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError) as caught:
        prepare(config(tmp_path, data, lora=SMALL))
    assert str(caught.value) == "lora: the package peft is not installed: pip install 'distill[scale]'"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_adapters_and_8_bit_moments_train_on_a_gpu_and_go_on_after_a_stop(tmp_path: Path, data: Path) -> None:
    changes = {"lora": LoraSection(128, 256.0, ["q_proj"]), "optimiser": "adamw8bit", "device": "cuda", "lr": 2e-2}
    report, _ = _run(config(tmp_path / "whole", data, **changes))
    assert report.values["loss"] < report.values["first_loss"]
    _stopped(config(tmp_path / "cut", data, **changes), 4)
    again, text = _run(config(tmp_path / "cut", data, **changes))
    assert "continuing" in text and again.values["loss"] == pytest.approx(report.values["loss"], rel=1e-3)
