"""The plan of a run: what it counts, what it refuses, and what a run really takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from distill.errors import ConfigError
from distill.model import ModelConfig, Student
from distill.pretrained import save_pretrained
from distill.train import memory
from distill.train.config import LoraSection, TeacherSection, TrainConfig
from distill.train.footprint import MOMENTS, activation_bytes
from distill.train.kd import load_config, main
from distill.train.step import precision
from distill.train.toy import toy_model
from tests import bench_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WORKER = str(Path(__file__).parents[2] / "configs/worker_9b.yaml")
MODEL = ModelConfig(8192, 256, 512, 3, 4, 2, head_dim=64)


def settings(**changes: object) -> TrainConfig:
    return TrainConfig(**({"data": "absent.jsonl", "model": MODEL, "device": "cpu"} | changes))  # type: ignore[arg-type]


def test_the_9b_worker_is_counted_as_torch_counts_it_and_says_what_a_step_reads() -> None:
    found = memory.plan(load_config(WORKER), CPU)
    with torch.device("meta"):
        built = sum(p.numel() for p in Student(load_config(WORKER).model).parameters())  # type: ignore[arg-type, misc]
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
    assert eight.rows["root whole"].size == eight.rows["root gradient"].size // 2 == 4 * root
    assert eight.rows["blocks whole"].size == 2 * 4 * (one.parameters - root) // 40


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


def test_a_run_that_cannot_fit_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if memory.available_bytes(GPU) > 150 << 30:
        pytest.skip("this machine has the memory")
    if not torch.cuda.is_available():
        assert main(["--config", WORKER]) == 2
        assert "device: cuda, but PyTorch sees none" in capsys.readouterr().err
    large = tmp_path / "large.yaml"
    large.write_text(Path(WORKER).read_text().replace("device: cuda", "device: cpu"))
    assert main(["--config", str(large)]) == 2
    captured = capsys.readouterr()
    assert "training needs about" in captured.err and captured.err.count("\n") == 1
    assert "8,986,628,096 parameters" in captured.out
    assert main(["--config", WORKER, "--plan"]) == 0 and "on one device" in capsys.readouterr().out
    assert main(["--config", WORKER, "--plan", "16"]) == 0 and "on each of 16 devices" in capsys.readouterr().out
    assert main(["--config", WORKER, "--plan", "-1"]) == 2


@pytest.mark.parametrize("how", [{}, {"dtype": "bf16", "gradient_checkpointing": True}])
def test_a_real_run_takes_what_its_plan_says_and_each_large_row_of_it_is_needed(
    how: dict[str, Any], tmp_path: Path
) -> None:
    cell = bench_memory.Cell(128, 4, 4096, 512, settings=how)
    bench_memory.prepared(cell, tmp_path)
    plan, moment = bench_memory.planned(cell)
    taken = bench_memory.tensors(bench_memory.settings_of(cell, tmp_path))
    assert bench_memory.LOW < bench_memory.tensors_of(plan, moment) / taken < bench_memory.HIGH
    for name in ("weights", "optimiser", "activations", "head"):
        less = plan._replace(rows={other: row for other, row in plan.rows.items() if other != name})
        assert bench_memory.tensors_of(less, moment) / taken < bench_memory.LOW, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_planned_activations_are_those_that_autograd_keeps(dtype: str) -> None:
    ids = torch.zeros(1, 96, dtype=torch.long)
    model = msgspec.structs.replace(toy_model(128, 6), intermediate_size=448)
    small = msgspec.structs.replace(model, num_hidden_layers=2)
    with torch.device("meta"):
        matrices = sum(p.numel() for p in Student(model).model.layers[0].parameters() if p.ndim == 2)
    copies = 2 * matrices if dtype == "bf16" else 0
    each = (_kept(model, ids, dtype) - _kept(small, ids, dtype)) / 4 - copies
    assert each == pytest.approx(activation_bytes(model, dtype == "bf16") * 96, rel=0.01)


def _kept(model: ModelConfig, ids_BT: torch.Tensor, dtype: str) -> int:
    """Bytes that autograd keeps for the backward pass, beside the parameters."""
    student = Student(model).init_weights(0)
    sizes: dict[int, int] = {}
    alive = []  # a freed storage's address could come again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), precision(dtype, CPU):
        student.hidden(ids_BT, lengths=[48, 48])
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    return sum(size for address, size in sizes.items() if address not in own)


def test_a_machine_must_hold_the_snapshots_of_all_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = memory.plan(load_config(WORKER), GPU, 8)._replace(available=78 << 30, host_available=64 << 30)
    assert found.host_needed == 4 * found.host["snapshot"].size > found.host["whole"].size
    found.require_fits()
    with pytest.raises(ConfigError, match="checkpoints of 4 processes need about 50"):
        found._replace(host_available=50 << 30).require_fits()


def test_processes_on_one_cpu_share_its_memory() -> None:
    found = memory.plan(settings(), CPU, 2)
    found._replace(available=2 * found.needed).require_fits()
    with pytest.raises(ConfigError, match="for 2 processes"):
        found._replace(available=2 * found.needed - 1).require_fits()


def test_adapters_are_saved_beside_the_weights_that_they_change() -> None:
    lora = LoraSection(rank=4)
    one, trained = memory.plan(settings(lora=lora), CPU), 12 * memory.plan(settings(lora=lora), CPU).trained
    matrices = sum(a * b for a, b in ((256, 256), (256, 128), (256, 128), (256, 256), *[(256, 512)] * 3)) * 3
    assert one.rows["snapshot"].size == 4 * MODEL.n_params() + trained and one.rows["merged"].size == 4 * matrices
    assert memory.plan(settings(lora=lora), GPU, 2).host["snapshot"].size == pytest.approx(trained / 2, rel=0.01)
