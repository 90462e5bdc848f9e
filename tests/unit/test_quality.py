"""The runs of `make quality`: they differ in what they learn from, and in nothing else."""

from __future__ import annotations

from pathlib import Path

import msgspec

from distill.model import ModelConfig, Student
from tests import quality_formats
from tests.quality import SIGNALS, config_of, row


def test_the_runs_differ_in_their_signal_alone(tmp_path: Path) -> None:
    runs = {name: msgspec.to_builtins(config_of(name, 3, 5000, tmp_path)) for name in SIGNALS}
    first = runs["text only"]
    for name, config in runs.items():
        assert {key for key in config if config[key] != first[key]} <= {"stage", "out", "teacher", "loss_weights"}, name
        assert config["seed"] == 3 and config["token_budget"] == 5000
    signals = {name: (run["teacher"]["target"], run["loss_weights"]["kl_div"] > 0) for name, run in runs.items()}
    assert signals == {
        "text only": ("dense", False), "top 50 and tail": ("top_k", True), "50 draws": ("sampled", True),
        "whole distribution": ("dense", True),
    }  # fmt: skip


def test_the_table_gives_mean_and_spread() -> None:
    found = [{"kl_div": 1.0, "ce_teacher": 2.0, "top1": 0.5}, {"kl_div": 3.0, "ce_teacher": 2.0, "top1": 0.5}]
    assert "2.0000 ± 1.4142" in row("x", found) and "±" not in row("x", found[:1])


def test_the_runs_in_formats_differ_in_format_and_learning_rate_alone(tmp_path: Path) -> None:
    student = tmp_path / "float.pt"
    runs = {
        name: msgspec.to_builtins(quality_formats.config_of(name, 3, 5000, student, tmp_path))
        for name in quality_formats.FORMATS
    }
    first = runs["fp16"]
    for name, config in runs.items():
        assert {key for key in config if config[key] != first[key]} <= {"stage", "out", "quantisation", "lr"}, name
        assert config["quantisation"]["formats"]["blocks"] == name and config["init"]["checkpoint"] == str(student)


def test_weights_on_a_grid_of_sixteen_values_are_told_from_others() -> None:
    student = Student(ModelConfig(64, 64, 128, 1, 2, 1, head_dim=32)).init_weights(0)
    assert quality_formats.on_grid(student) == 0.0
    for weight in student.model.layers[0].parameters():
        if weight.ndim == 2:
            blocks = weight.data.reshape(-1, 32)
            low, step = blocks.amin(1, keepdim=True), (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
            weight.data = (low + step * ((blocks - low) / step).round()).reshape(weight.shape)
    assert quality_formats.on_grid(student) == 1.0
