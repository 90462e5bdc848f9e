"""The plan of a run: what it counts, what it refuses, and what a run really takes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from distill.model import ModelConfig, Student
from distill.pretrained import save_pretrained
from distill.train import memory
from distill.train.config import LoraSection, TeacherSection, TrainConfig
from distill.train.footprint import MOMENTS, activation_bytes
from distill.train.kd import load_config, main
from distill.train.toy import toy_model
from tests.bench_memory import in_process

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WORKER = str(Path(__file__).parents[2] / "configs/worker_9b.yaml")
MODEL = ModelConfig(8192, 256, 512, 3, 4, 2, head_dim=64)


def settings(**changes: object) -> TrainConfig:
    return TrainConfig(**({"data": "absent.jsonl", "model": MODEL, "device": "cpu"} | changes))  # type: ignore[arg-type]


def test_the_9b_worker_is_counted_as_torch_counts_it_and_says_what_a_step_reads() -> None:
    found = memory.plan(load_config(WORKER), CPU)
    with torch.device("meta"):
        built = sum(p.numel() for p in Student(load_config(WORKER).model).parameters())  # type: ignore[arg-type]
    assert found.parameters == found.trained == built
    assert found.rows["optimiser"].size == 8 * built and found.rows["gradients"].size == 4 * built
    assert [s.batch * s.accumulation for s in found.stages] == [131072] * 3
    text = found.table()
    assert all(
        word in text for word in ("weights", "activations", "ten thousand samples", "131,072", "fits, in devices")
    )


def test_ranks_divide_what_is_sharded_and_nothing_else() -> None:
    one, eight = (memory.plan(load_config(WORKER), GPU, n) for n in (1, 8))
    for name in ("weights", "gradients", "optimiser"):
        assert 8 * eight.rows[name].size == pytest.approx(one.rows[name].size, rel=1e-4)
    assert 8 * eight.host["snapshot"].size == pytest.approx(one.host["snapshot"].size, rel=1e-4)
    assert eight.rows["activations"] == one.rows["activations"] and "snapshot" not in eight.rows
    root = 2 * 32000 * 4096 + 4096
    assert eight.rows["root whole"].size == eight.rows["root gradient"].size == 4 * root
    assert eight.rows["blocks whole"].size == 2 * 2 * (one.parameters - root) // 40


def test_a_plan_for_more_ranks_than_micro_batches_says_what_idles() -> None:
    assert "idles" not in memory.plan(load_config(WORKER), GPU, 8).table()
    assert "8 micro-batches a step over 16 ranks: 50% of the machines idles" in memory.plan(
        load_config(WORKER), GPU, 16).table()  # fmt: skip
    assert [s.idle for s in memory.plan(load_config(WORKER), GPU, 3).stages] == pytest.approx([1 / 9] * 3)


def test_the_fewest_ranks_that_fit_do_and_half_as_many_do_not() -> None:
    for name, n in memory.plan(load_config(WORKER), GPU).fitting.items():
        assert n is not None and memory.plan(load_config(WORKER), GPU, n).needed <= memory.GPUS[name]
        assert memory.plan(load_config(WORKER), GPU, n // 2).needed > memory.GPUS[name]


def test_adapters_alone_have_gradients_and_moments_and_8_bits_make_moments_smaller() -> None:
    rank, d, f, kv = 4, 256, 512, 128
    wanted = 3 * rank * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f))
    found = memory.plan(settings(lora=LoraSection(rank=rank)), CPU)
    assert found.trained == wanted and found.rows["gradients"].size == 4 * wanted
    assert found.rows["optimiser"].size == 8 * wanted and found.parameters == MODEL.n_params() + wanted
    vectors = (2 * 3 + 1) * d  # norms stay in fp32
    matrices = MODEL.n_params() - vectors
    found = memory.plan(settings(optimiser="adamw8bit"), CPU)
    assert found.rows["optimiser"].size == 2 * matrices + 8 * matrices // 256 + 8 * vectors


def test_a_teacher_beside_the_student_is_counted_as_it_is_stored_on_every_rank(tmp_path: Path) -> None:
    save_pretrained(Student(MODEL).init_weights(0).bfloat16(), tmp_path / "t")
    teacher = TeacherSection(folder=str(tmp_path / "t"))
    rows = memory.plan(settings(teacher=teacher), GPU, 4).rows
    assert rows["teacher"].size == pytest.approx(2 * MODEL.n_params(), rel=0.01) and rows["teacher"].at == MOMENTS


def test_a_run_that_cannot_fit_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    if memory.available_bytes(GPU) > 150 << 30:
        pytest.skip("this machine has the memory")
    assert main(["--config", WORKER]) == 2
    captured = capsys.readouterr()
    assert "training needs about" in captured.err and captured.err.count("\n") == 1
    assert "8,986,628,096 parameters" in captured.out
    assert main(["--config", WORKER, "--plan"]) == 0 and "on one device" in capsys.readouterr().out
    assert main(["--config", WORKER, "--plan", "16"]) == 0 and "on each of 16 devices" in capsys.readouterr().out
    assert main(["--config", WORKER, "--plan", "-1"]) == 2


def test_a_real_run_takes_what_its_plan_says() -> None:
    """Bounds wide enough for a busy machine; without activations, it would be half of it."""
    found = in_process("small")
    assert 0.75 < found["planned"] / found["measured"] < 1.5


@pytest.mark.parametrize("bf16", [False, True])
def test_the_planned_activations_are_those_that_autograd_keeps(bf16: bool) -> None:
    model = msgspec.structs.replace(toy_model(128, 6), intermediate_size=448)
    student, ids = Student(model).init_weights(0), torch.zeros(2, 96, dtype=torch.long)
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}

    alive = []  # a freed storage's address could come again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        student.hidden(ids)
    casts = 2 * model.n_params() if bf16 else 0
    measured = sum(sizes.values()) - casts
    planned = activation_bytes(model, bf16) * ids.numel() * model.num_hidden_layers
    assert measured * 0.75 < planned < measured * 1.4
