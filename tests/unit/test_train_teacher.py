"""A white-box teacher beside the student: its targets against transformers and the plain computation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from distill import pretrained
from distill.data.batches import Batch, Examples
from distill.data.records import Dataset
from distill.errors import ConfigError
from distill.model import ModelConfig, Student
from distill.tokenizer import CALL_END, Tokenizer, toy_tokenizer
from distill.train.config import TeacherSection
from distill.train.sampling import own_batch
from distill.train.targets import Dense, Sampled, Target, TopK
from distill.train.teacher import OnlineTeacher
from tests.unit.train_sets import write_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher with the toy tokenizer, none of whose tokens is certain."""
    path = tmp_path_factory.mktemp("teacher") / "t"
    size = toy_tokenizer().vocab_size
    model = Student(ModelConfig(size, 32, 48, 2, 4, 2, max_position_embeddings=512)).init_weights(3)
    pretrained.save_pretrained(model, path)
    (path / "tokenizer.json").write_text(toy_tokenizer().to_json())
    return path


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    data = write_set(tmp_path_factory.mktemp("data") / "kd.jsonl", 10, distributions=False)
    return Examples(Dataset.open(data), toy_tokenizer(), "train", max_length=256)


def teacher(folder: Path, target: str, k: int = 6, seed: int = 0) -> OnlineTeacher:
    return OnlineTeacher(TeacherSection(str(folder), target, k), toy_tokenizer(), CPU, seed)  # type: ignore[arg-type]


def plain(folder: Path, batch: Batch) -> torch.Tensor:
    """Log-probabilities of all ids at each target, by transformers, a sequence at a time."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = torch.cat([model(ids[None]).logits[0] for ids in batch.ids_T.split(batch.lengths)])
    return logits_TV[batch.positions_N].double().log_softmax(1)


def test_its_whole_distributions_are_those_of_transformers(folder: Path, examples: Examples) -> None:
    batch = examples.batch([0, 3, 1])
    target = teacher(folder, "dense").target(batch)
    assert isinstance(target, Dense) and not target.hidden_NE.requires_grad and not target.weight_VE.requires_grad
    found = (target.hidden_NE @ target.weight_VE.T).log_softmax(1).double()
    torch.testing.assert_close(found, plain(folder, batch), rtol=1e-4, atol=1e-4)


def test_its_likeliest_ids_and_their_tail_are_those_of_transformers(folder: Path, examples: Examples) -> None:
    batch = examples.batch([2, 0])
    target, expected = teacher(folder, "top_k").target(batch), plain(folder, batch)
    assert isinstance(target, TopK) and target.ids_NK.shape == (batch.targets, 6)
    logprobs, ids = expected.topk(6)
    assert torch.equal(target.ids_NK, ids)
    torch.testing.assert_close(target.logprobs_NK.double(), logprobs, rtol=1e-4, atol=1e-4)
    tail_N = torch.log1p(-logprobs.exp().sum(1))
    torch.testing.assert_close(target.tail_N.double(), tail_N, rtol=1e-4, atol=1e-4)


def test_its_draws_have_its_probabilities(folder: Path, examples: Examples) -> None:
    batch, n = examples.batch([1]), 4000
    target, expected = teacher(folder, "sampled", n).target(batch), plain(folder, batch).exp()
    assert isinstance(target, Sampled)
    torch.testing.assert_close(target.weights_NK.sum(1), torch.ones(batch.targets))
    shares = torch.zeros_like(expected).scatter_add_(1, target.ids_NK, target.weights_NK.double())
    assert bool(((shares - expected).abs() <= 5 * (expected / n).sqrt() + 2 / n).all())
    torch.testing.assert_close(
        target.logprobs_NK.double(), expected.log().gather(1, target.ids_NK), rtol=1e-4, atol=1e-4
    )


def by_sequence(target: Target, batch: Batch) -> dict[int, list[torch.Tensor]]:
    """The rows of each record."""
    ends = torch.tensor(batch.lengths).cumsum(0)
    each = torch.bucketize(batch.positions_N, ends, right=True)
    columns = [target.hidden_NE] if isinstance(target, Dense) else list(target)
    return {record: [column[each == i] for column in columns] for i, record in enumerate(batch.records)}


@pytest.mark.parametrize("kind", ["dense", "top_k", "sampled"])
def test_targets_do_not_depend_on_how_a_step_is_cut_into_batches(folder: Path, examples: Examples, kind: str) -> None:
    one = teacher(folder, kind)

    def found(cut: Sequence[Sequence[int]]) -> dict[int, list[torch.Tensor]]:
        batches = [examples.batch(part) for part in cut]
        return {r: rows for batch in batches for r, rows in by_sequence(one.target(batch), batch).items()}

    whole = found([[0, 1, 2, 3, 4]])
    for cut in ([[4], [3], [2], [1], [0]], [[2, 0], [1, 4, 3]]):
        for record, rows in found(cut).items():
            for a, b in zip(rows, whole[record]):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_draws_change_with_the_seed_and_differ_between_sequences(folder: Path, examples: Examples) -> None:
    batch = examples.batch([0])
    same = own_batch([batch.ids_T[:-3].tolist()] * 2, [batch.ids_T[-3:].tolist()] * 2, [0, 1])
    first, again, other = (teacher(folder, "sampled", seed=seed).target(same) for seed in (0, 0, 1))
    assert isinstance(first, Sampled) and isinstance(again, Sampled) and isinstance(other, Sampled)
    assert torch.equal(first.ids_NK, again.ids_NK) and not torch.equal(first.ids_NK, other.ids_NK)
    assert not torch.equal(first.ids_NK[:3], first.ids_NK[3:])


def test_a_teacher_with_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    other = Tokenizer.from_json(text.replace(CALL_END, "</another>"), "another")
    with pytest.raises(ConfigError, match=r"teacher.folder .*: its tokenizer is not the student's \(another\)"):
        OnlineTeacher(TeacherSection(str(folder)), other, CPU, 0)


def test_a_whole_target_of_a_longer_sequence_is_made_in_pieces(folder: Path) -> None:
    ids = torch.randint(3, 900, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = own_batch([ids[:60]], [ids[60:]], [0])  # more targets than a piece
    target = teacher(folder, "top_k").target(batch)
    assert isinstance(target, TopK)
    torch.testing.assert_close(target.logprobs_NK.double(), plain(folder, batch).topk(6).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "top_k", "sampled"])
def test_a_teacher_stored_in_bf16_has_targets_in_fp32(
    folder: Path, examples: Examples, tmp_path: Path, kind: str
) -> None:
    pretrained.save_pretrained(
        pretrained.from_pretrained(folder).to(torch.bfloat16), tmp_path / "t", tokenizer_from=folder
    )
    batch = examples.batch([0, 1])
    target, expected = teacher(tmp_path / "t", kind).target(batch), plain(folder, batch)
    if isinstance(target, Dense):
        found = (target.hidden_NE.float() @ target.weight_VE.float().T).log_softmax(1)
    else:
        found, expected = target.logprobs_NK, expected.gather(1, target.ids_NK)
        assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)
