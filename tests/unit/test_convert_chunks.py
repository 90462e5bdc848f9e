"""Chunked packages of a toy student: run by the executor, against PyTorch and against one package."""

import json

import numpy as np
import pytest
import torch

from distill import checkpoint
from distill.cli import main as distill
from distill.convert.chunks import ChunksConfig, build
from distill.errors import InputError, PackageError
from distill.formats import Formats
from distill.model import ModelConfig, Student
from distill.tokenizer import toy_tokenizer
from distill.verify.chunks import ChunkedRunner

PROMPT = [5, 900, 17, 3, 250, 41, 7, 7, 12, 600, 33, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("chunks")
    tokenizer = toy_tokenizer()
    config = ModelConfig(tokenizer.vocab_size, 64, 96, 2, 4, 2, tie_word_embeddings=True, max_position_embeddings=128)
    checkpoint.save(out / "c.pt", Student(config).init_weights(4), tokenizer, step=0, loss=0.0, stage="toy")
    return out


def built(folder, name, **changes):
    config = ChunksConfig(folder / "c.pt", folder / f"{name}.mlpackage", 64, (8,))._replace(**changes)
    return build(config, lambda line: None)


@pytest.fixture(scope="module")
def two(folder):
    return built(folder, "two", chunks=2)


def test_two_chunks_give_the_tokens_of_pytorch_and_the_logits_of_one_package(folder, two):
    tokens, logits = ChunkedRunner(two).generate(PROMPT, 24, set())
    alone, expected = ChunkedRunner(built(folder, "one", chunks=1)).generate(PROMPT, 24, set())
    student = checkpoint.load(folder / "c.pt").student
    assert tokens == alone == student.generate(PROMPT, 24, set())
    assert np.array_equal(logits, expected)


def test_the_embedding_on_the_host_changes_nothing_and_leaves_the_package(folder, two):
    listed = built(folder, "host", chunks=2, prefill=(), host_embedding=True)
    tokens, logits = ChunkedRunner(listed).generate(PROMPT, 12, set())
    expected = ChunkedRunner(two).generate(PROMPT, 12, set())
    assert tokens == expected[0] and np.abs(logits - expected[1]).max() < 4e-3  # prefill sums in another order
    sizes = [(folder / f"{n}_chunk0.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
             for n in ("two", "host")]  # fmt: skip
    rows = checkpoint.load(folder / "c.pt").student.config.vocab_size
    assert sizes[0] - sizes[1] >= rows * 64 * 2 * 0.5


def test_two_conversations_do_not_touch_each_other(two):
    runner = ChunkedRunner(two)
    a, b = runner.states(), runner.states()
    alone = runner.generate(PROMPT, 3, set())[1]
    first = runner.prompt(PROMPT, a)
    runner.prompt(PROMPT[::-1], b)
    second = runner.run("decode", np.array([int(first.argmax())]), len(PROMPT), a)[-1]
    assert np.array_equal(first, alone[0]) and np.array_equal(second, alone[1])


def test_compressed_chunks_hold_exactly_the_deployed_weights(folder):
    listed = built(folder, "small", chunks=2, prefill=(), formats=Formats("int4/32", "int8"))
    _, logits = ChunkedRunner(listed, "fp32").generate(PROMPT, 4, set())
    from distill.export.deployed import deploy

    loaded = checkpoint.load(folder / "c.pt")
    deploy(loaded, Formats("int4/32", "int8"))
    with torch.no_grad():
        expected = loaded.student(torch.tensor([PROMPT]))[0, -1].numpy()
    assert np.abs(logits[0] - expected).max() < 2e-2 * np.abs(expected).max()


def test_a_chunk_whose_weights_were_altered_is_refused(folder, two):
    weights = folder / "two_chunk1.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(PackageError, match="two_chunk1"):
            ChunkedRunner(two)
    finally:
        weights.write_bytes(whole)


def test_a_list_that_names_other_keys_is_no_list_of_chunks(two, tmp_path):
    data = json.loads(two.read_text())
    (tmp_path / "x.chunks.json").write_text(json.dumps(data | {"extra": 1}))
    with pytest.raises(InputError, match="does not list chunks"):
        ChunkedRunner(tmp_path / "x.chunks.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"chunks": 3}, "--chunks 3"), ({"context": 999}, "--context 999"), ({"prefill": (65,)}, r"--prefill \[65\]")],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(folder, changes, message):
    with pytest.raises(InputError, match=message):
        built(folder, "none", **changes)
    assert not list(folder.glob("none*"))


def test_the_plan_of_a_checkpoint_reads_no_weights_and_the_command_prints_it(folder, capsys):
    args = ["package", "--plan", "--checkpoint", str(folder / "c.pt"), "--context", "64", "--prefill", "8"]
    assert distill([*args, "--json", str(folder / "plan.json")]) == 0
    assert "decode, prefill_8 over a context of 64" in capsys.readouterr().out
    assert json.loads((folder / "plan.json").read_text())["functions"] == ["decode", "prefill_8"]
    assert distill(["package", "--plan", "--checkpoint", str(folder / "c.pt"), "--context", "999"]) == 2
