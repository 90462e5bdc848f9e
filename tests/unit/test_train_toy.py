"""The toy presets learn what they are made to learn, and the smoke script checks what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from distill import chat, checkpoint
from distill.config import load
from distill.data import toy
from distill.data.toy_material import ANSWERS
from distill.tools import call_f1
from distill.train import kd
from distill.train import toy as train_toy
from distill.train.config import TrainConfig

ROOT = Path(__file__).parents[2]

DOCUMENTED = """\
==========================================
Toy Training Smoke Test
==========================================

Step 1: Creating toy training setup...
@ Toy setup created

Step 2: Verifying dataset loading...
   @ Dataset loaded: 10 samples
   @ Sample structure correct

Step 3: Verifying model creation...
   @ Model created
   @ Forward pass works (output shape: torch.Size([1, 10, 32000]))
   @ Model parameters: 4,219,200

Step 4: Testing training step...
   @ Training step works
      Loss: LOSS
      Loss components: ['kl_div', 'ce_teacher', 'ce_ground_truth', 'total']
   @ Backward pass works

Step 5: Testing checkpoint save/load...
   @ Checkpoint save/load works

==========================================
@ Toy Training Smoke Test PASSED
=========================================="""
"""spec/toy-training-tests.md, "Example Output", with @ for its mark of success."""


def _answers(path: Path, kind: str, n: int) -> list[tuple[str, str]]:
    """What the student writes, greedily, to prompts of no training set, and what it should."""
    found = checkpoint.load(path)
    student, tokenizer = found.student.eval(), found.tokenizer
    out = []
    for record in toy.held_out(n, 0, kind):
        ids = chat.encode(tokenizer, record.context, record.tools, add_generation_prompt=True).ids
        out.append((tokenizer.decode(student.generate(ids, 40, tokenizer.stop_ids)), record.teacher_text))
    return out


def _train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *flags: str) -> Path:
    monkeypatch.chdir(tmp_path)
    toy.write("d.jsonl", kind, 128)
    assert train_toy.main(["--in", "d.jsonl", "--out", "toy.ckpt", "--mps", "0", *flags]) == 0
    return tmp_path / "toy.ckpt"


def test_two_epochs_teach_the_tool_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _train(tmp_path, monkeypatch, "tools", "--epochs", "2")
    pairs = []
    for written, gold in _answers(path, "tools", 48):
        parsed = chat.parse(written)
        pairs.append((parsed.calls, chat.parse(gold).calls, len(parsed.malformed)))
    assert call_f1(pairs).value >= 0.9
    assert re.search(r"128 steps, loss \d+\.\d+ -> 0\.\d+", capsys.readouterr().out)


def test_the_8_ball_answers_unseen_questions_with_its_twenty_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _train(tmp_path, monkeypatch, "8-ball")
    assert checkpoint.load(path).loss < 1.8
    written = [text for text, _ in _answers(path, "8-ball", 50)]
    assert sum(text in ANSWERS for text in written) >= 48 and len(set(written) & set(ANSWERS)) >= 10


def test_the_same_command_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy.write("d.jsonl", "tools", 16)
    found = []
    for name in ("a.ckpt", "b.ckpt"):
        assert train_toy.main(["--in", "d.jsonl", "--out", name, "--epochs", "1"]) == 0
        found.append(checkpoint.load(name).student.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("flags", [["--lr", "0"], ["--epochs", "0"], ["--dmodel", "65"], ["--in", "none.jsonl"]])
def test_a_wrong_flag_is_one_line(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    toy.write("d.jsonl", "tools", 4)
    capsys.readouterr()
    assert train_toy.main(["--in", "d.jsonl", "--out", "x.ckpt", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path("x.ckpt").exists()


def test_make_toy_training_writes_what_distill_kd_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--out-dir", "D", "--samples", "10", "--steps", "5"]
    arguments += ["--dmodel", "64", "--nlayers", "2", "--vocab", "32000"]
    assert train_toy.make_main(arguments) == 0
    assert "4,219,200 parameters" in capsys.readouterr().out
    assert len(Path("D/toy_dataset.jsonl").read_text().splitlines()) == 10
    assert load("D/toy_config.yaml", TrainConfig).max_steps == 5
    assert checkpoint.load("D/toy_model_init.pt").student.config.n_params() == 4_219_200
    assert kd.main(["--config", "D/toy_config.yaml"]) == 0
    assert torch.load("D/checkpoints/toy.pt", map_location="cpu")["step"] == 5
    assert train_toy.make_main(["--out-dir", "E", "--vocab", "100"]) == 2
    assert train_toy.make_main(["--out-dir", "E", "--steps", "0"]) == 2
    assert not Path("E").exists()


def _script(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / "scripts/test_toy_training.sh")], capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | environment,
    )  # fmt: skip


def test_the_smoke_script_prints_the_documented_form() -> None:
    done = _script(ROOT)
    assert done.returncode == 0, done.stderr
    form = re.escape(DOCUMENTED.replace("@", "\u2705")).replace("LOSS", r"\d+\.\d{4}")
    assert re.fullmatch(form, done.stdout.rstrip("\n")), done.stdout


def test_the_smoke_script_fails_loudly_when_a_step_is_broken(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "distill", tmp_path / "distill", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "training", tmp_path / "training", ignore=shutil.ignore_patterns("__pycache__", "toy_test"))
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    formulae = tmp_path / "distill/train/divergences.py"
    text = formulae.read_text()
    assert "value = (t * (log_t - log_s)).sum(-1)" in text
    formulae.write_text(text.replace("value = (t * (log_t - log_s)).sum(-1)", "value = (t * float('nan')).sum(-1)"))
    done = _script(tmp_path)
    assert done.returncode == 1 and "FAILED: Step 4" in done.stderr and "PASSED" not in done.stdout


def test_documented_yaml_is_plain(tmp_path: Path) -> None:
    assert train_toy.make_main(["--out-dir", str(tmp_path)]) == 0
    text = (tmp_path / "toy_config.yaml").read_text()
    assert isinstance(yaml.safe_load(text), dict) and "!!" not in text
