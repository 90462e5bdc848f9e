"""Training on a GPU: the same numbers as on a CPU. Skipped, named, where there is none."""

from __future__ import annotations

import msgspec
import pytest
import torch

from distill.config import load_yaml
from distill.data.batches import Examples
from distill.data.records import Dataset
from distill.model import Student
from distill.tokenizer import toy_tokenizer
from distill.train import loop
from distill.train.config import TrainConfig
from distill.train.objective import Objective
from distill.train.step import gradients
from distill.train.toy import toy_model
from tests.unit.train_sets import config, write_set

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
WEIGHTS = {"kl_div": 0.5, "ce_teacher": 0.25, "ce_ground_truth": 0.25}


def _window(path, device):
    examples = Examples(Dataset.open(path), toy_tokenizer(), "train", max_length=512)
    return [examples.batch(range(i, i + 4)).to(torch.device(device)) for i in (0, 4)]


def _gradient(path, device, dtype="fp32"):
    student = Student(toy_model()).init_weights(1).to(device).train()
    sums = gradients(student, _window(path, device), Objective(WEIGHTS, dtype=dtype))
    return sums, torch.cat([p.grad.detach().double().flatten().cpu() for p in student.parameters()])


def test_a_step_on_the_gpu_has_the_cpus_loss_and_gradient(tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    path = write_set(tmp_path / "d.jsonl")
    expected_sums, expected = _gradient(path, "cpu")
    sums, found = _gradient(path, "cuda")
    for name, value in expected_sums.sums.items():
        assert sums.sums[name] == pytest.approx(value, rel=1e-5)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_a_bf16_step_on_the_gpu_is_within_bf16_of_fp32(tmp_path):
    path = write_set(tmp_path / "d.jsonl")
    _, expected = _gradient(path, "cpu")
    _, found = _gradient(path, "cuda", "bf16")
    assert (found - expected).norm() / expected.norm() < 3e-2


def test_a_run_on_the_gpu_learns_and_its_checkpoint_loads_on_a_cpu(tmp_path):
    from distill import checkpoint

    path = write_set(tmp_path / "d.jsonl")
    report = loop.run(config(tmp_path, path, device="cuda", epochs=12, lr=3e-3))
    assert report.values["loss"] < 0.7 * report.values["first_loss"]
    loaded = checkpoint.load(report.checkpoint)
    assert next(loaded.student.parameters()).device.type == "cpu"


def test_the_9b_configuration_takes_a_step_on_the_gpu_at_small_width(tmp_path):
    path = write_set(tmp_path / "d.jsonl")
    data = load_yaml("configs/worker_9b.yaml")
    small = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    data |= {"data": str(path), "tokenizer": "toy", "model": data["model"] | small, "device": "cuda", "max_steps": 2,
             "checkpoints": str(tmp_path / "c"), "runs": str(tmp_path / "r")}  # fmt: skip
    report = loop.run(msgspec.convert(data, TrainConfig))
    assert report.values["steps"] >= 1
