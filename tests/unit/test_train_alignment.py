"""A teacher with another vocabulary: chunks against the text's bytes, the loss against autograd in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from distill import pretrained
from distill.data.batches import Batch, Examples
from distill.data.records import Dataset
from distill.errors import ConfigError
from distill.model import ModelConfig, Student
from distill.tokenizer import END_OF_TEXT, TURN_END, TURN_START, Tokenizer, toy_tokenizer
from distill.train.alignment import Aligned, AlignedTeacher, aligned_divergence, coins, common_chunks
from distill.train.divergences import Divergence, Kind
from distill.train.sampling import own_batch
from tests.unit.train_sets import write_set

KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
TEXT = [
    "the theatre is there, and then the weather",
    "naïve café 東京 🙂🙂 e\u0301e\u0301",
    '{"city": "Paris", "n": 12}',
]


def bpe(texts: Sequence[str], size: int, *, words: bool = True, nfc: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer trained on these texts."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    inner.decoder = decoders.ByteLevel()
    if nfc:
        inner.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT, TURN_START, TURN_END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, "a BPE of the test")


def by_brute_force(ours: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]], size: int) -> list[int]:
    """Bytes that no token of either lies across, and at which one of each ends."""
    return [
        b for b in range(1, size + 1)
        if all(any(end == b for _, end in spans) and not any(start < b < end for start, end in spans)
               for spans in (ours, theirs))
    ]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
    | st.text(st.sampled_from("the ir\n🙂é\u0301\u200d東 "), max_size=60),
    more=st.lists(st.text(st.sampled_from("the ir🙂é\u0301東")), max_size=4),
    sizes=st.tuples(st.integers(259, 330), st.integers(259, 330)),
    words=st.tuples(st.booleans(), st.booleans()),
    nfc=st.booleans(),
)
def test_every_byte_is_in_exactly_one_chunk_of_both(
    text: str, more: list[str], sizes: tuple[int, int], words: tuple[bool, bool], nfc: bool
) -> None:
    pair = bpe([*TEXT, text], sizes[0], words=words[0]), bpe(more, sizes[1], words=words[1], nfc=nfc)
    spans = [tokenizer.encode_spans(text).bytes for tokenizer in pair]
    size = len(text.encode())
    borders = by_brute_force(*spans, size)
    for chunk, own in zip(common_chunks(*spans), spans):
        assert (np.diff(chunk) >= 0).all() and (chunk >= 0).all()
        covered = np.zeros((len(borders), size), bool)
        for c, (start, end) in zip(chunk, own):
            covered[c, start:end] = True
        assert (covered.sum(0) == 1).all()
        for c, (start, end) in enumerate(zip([0, *borders], borders)):
            assert covered[c, start:end].all()


def test_chunks_are_the_smallest_that_both_can_be_put_together_from() -> None:
    ours, theirs = [(0, 3), (3, 6), (6, 7), (7, 9)], [(0, 1), (1, 3), (3, 7), (7, 8), (8, 9)]
    found = common_chunks(ours, theirs)
    assert [chunk.tolist() for chunk in found] == [[0, 1, 1, 2], [0, 0, 1, 2, 2]]
    shared = [(0, 6), (3, 9)]  # two tokens that share a character
    assert common_chunks(shared, [(0, 3), (3, 6), (6, 9)])[1].tolist() == [0, 0, 0]
    assert common_chunks([(0, 0), (0, 2), (2, 2)], [(0, 2)])[0].tolist() == [0, 0, 0]
    assert common_chunks([(0, 2), (2, 5)], [(0, 2)])[0].tolist() == [0, -1]
    assert [len(chunk) for chunk in common_chunks([], [])] == [0, 0]


def by_autograd(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor, target: Aligned, kind: Kind, tau: float,
    weight_N: torch.Tensor, v_N: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The loss from the formulae, over whole logits."""
    logprob_N = (hidden_ND @ head_VD.T).log_softmax(1).gather(1, labels_N[:, None])[:, 0]
    total = -(v_N * logprob_N).sum()
    for c, theirs in enumerate(target.logprob_C):
        mine = target.chunk_N == c
        p, q = torch.exp(theirs / tau), torch.exp(logprob_N[mine].sum() / tau)
        t, s = torch.stack([p, 1 - p]), torch.stack([q, 1 - q])
        m = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.9}.get(kind, 0.5)
        m = m * t + (1 - m) * s
        value = {
            "forward_kl": (t * (t / s).log()).sum(), "reverse_kl": (s * (s / t).log()).sum(),
            "jsd": ((t * (t / m).log()).sum() + (s * (s / m).log()).sum()) / 2,
            "skew_kl": (t * (t / m).log()).sum(), "skew_reverse_kl": (s * (s / m).log()).sum(),
            "tvd": (s - t).abs().sum() / 2,
        }[kind]  # fmt: skip
        total = total + weight_N[mine].mean() * tau * value
    return total


def problem(
    seed: int, n: int = 14
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Aligned, torch.Tensor, torch.Tensor]:
    """Hidden states, head, labels, chunks of 1 to 3 tokens with gaps between them, weights, cross-entropy weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, head_VD = (torch.randn(k, 6, generator=generator, dtype=torch.float64) for k in (n, 31))
    labels_N = torch.randint(31, (n,), generator=generator)
    chunk_N = torch.tensor([0, 0, -1, 1, 2, 2, 2, -1, -1, 3, 4, 4, 5, -1])
    logprob_C = -torch.rand(6, generator=generator, dtype=torch.float64) * 8
    weight_N, v_N = (torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(2))
    return hidden_ND, head_VD, labels_N, Aligned(chunk_N, logprob_C), weight_N, v_N * (v_N > 0.4)


@pytest.mark.parametrize("tau", [1.0, 3.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_autograd_over_whole_logits(kind: Kind, tau: float) -> None:
    for seed in range(3):
        hidden_ND, head_VD, labels_N, target, weight_N, v_N = problem(seed)
        inputs = [x.clone().requires_grad_() for x in (hidden_ND, head_VD)]
        expected = by_autograd(*inputs, labels_N, target, kind, tau, weight_N, v_N)
        wanted = torch.autograd.grad(expected, inputs)
        losses = aligned_divergence(*inputs, target=target, labels_N=labels_N, divergence=Divergence(kind), tau=tau,
                                    divergence_weight_N=weight_N, cross_entropy_weight_N=v_N, chunk=5)  # fmt: skip
        found = torch.autograd.grad(losses.total, inputs)
        torch.testing.assert_close(losses.total, expected.detach(), rtol=1e-9, atol=1e-10, check_dtype=False)
        for a, b in zip(found, wanted):
            assert float((a - b).norm() / b.norm()) < 1e-8
        assert losses.divergence_N is not None and losses.cross_entropy_N is not None
        parts = (
            losses.divergence_N
            * torch.stack([weight_N[target.chunk_N == c].mean() for c in target.chunk_N]).nan_to_num()
        )
        torch.testing.assert_close((parts.sum() + (v_N * losses.cross_entropy_N).sum()), losses.total)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn_even_where_it_is_certain(kind: Kind) -> None:
    logprob_C = torch.tensor([0.0, -1e-9, -1e-4, -0.5, -30.0, -3000.0], dtype=torch.float64)
    value_C, slope_C = coins(logprob_C, logprob_C.clone(), Divergence(kind), 100.0)
    assert float(value_C.abs().max()) < 1e-9 and float(slope_C.abs().max()) < 1e-9
    value_C, slope_C = coins(logprob_C.flip(0), logprob_C, Divergence(kind), 100.0)
    assert bool(value_C.isfinite().all() and slope_C.isfinite().all() and (value_C >= -1e-12).all())


def test_a_large_tau_compares_log_probabilities() -> None:
    theirs, ours = -torch.rand(2, 50, dtype=torch.float64) * 5 - 0.1
    value_C, slope_C = coins(theirs, ours.clone(), Divergence(), 1e6)
    limit = theirs * (ours / theirs).log() + theirs - ours  # a generalised KL between -log p
    torch.testing.assert_close(value_C, limit, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slope_C, (theirs - ours) / ours, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_long_chunk_moves_its_tokens_alike() -> None:
    hidden_ND, head_VD, labels_N, target, *_ = problem(5)
    target = Aligned(torch.where(target.chunk_N == 2, 0, -1), torch.tensor([-0.1], dtype=torch.float64))
    hidden_ND.requires_grad_()
    aligned_divergence(hidden_ND, head_VD, target=target, labels_N=labels_N).total.backward()
    assert hidden_ND.grad is not None
    assert torch.equal(hidden_ND.grad.abs().sum(1) > 0, target.chunk_N >= 0)


def test_what_chunks_cannot_have_is_refused(tmp_path: Path) -> None:
    hidden_ND, head_VD, labels_N, target, *_ = problem(0)
    with pytest.raises(ValueError, match="no temperature"):
        aligned_divergence(hidden_ND, head_VD, target=target, labels_N=labels_N, divergence=Divergence(temperature=2.0))
    with pytest.raises(ValueError, match="tau"):
        aligned_divergence(hidden_ND, head_VD, target=target, labels_N=labels_N, tau=0.0)
    inner = tokenizers.Tokenizer(models.WordLevel({TURN_START: 0, TURN_END: 1, "a": 2}, unk_token="a"))
    with pytest.raises(ConfigError, match="not a byte-level tokenizer"):
        AlignedTeacher(tmp_path, Tokenizer(inner, "words"), torch.device("cpu"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    data = write_set(tmp_path_factory.mktemp("data") / "kd.jsonl", 8, distributions=False)
    return Examples(Dataset.open(data), toy_tokenizer(), "train", max_length=256)


def teacher_folder(folder: Path, tokenizer: Tokenizer, *, longest: int = 1024) -> Path:
    """A random teacher with this tokenizer."""
    size = tokenizer.vocab_size + 5
    student = Student(ModelConfig(size, 32, 48, 2, 4, 2, max_position_embeddings=longest)).init_weights(3)
    pretrained.save_pretrained(student, folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_folder(tmp_path_factory.mktemp("teacher") / "t", bpe(TEXT, 330))


def test_chunk_log_probabilities_are_sums_of_the_teachers_own(other: Path) -> None:
    teacher, tokenizer = (
        AlignedTeacher(other, toy_tokenizer(), torch.device("cpu")),
        Tokenizer.from_file(other / "tokenizer.json"),
    )
    batch = own_batch([toy_tokenizer().encode("say: ")], [toy_tokenizer().encode(" ".join(TEXT))], [0])
    text = toy_tokenizer().decode(batch.ids_T.tolist())
    ids, spans = tokenizer.encode_spans(text)
    with torch.no_grad():
        logprobs = pretrained.from_pretrained(other).double()(torch.tensor([ids]))[0].log_softmax(1)
    own_ends = np.cumsum([len(toy_tokenizer().bytes_by_id[i]) for i in batch.ids_T.tolist()])
    borders = sorted({0, *own_ends.tolist()} & {end for _, end in spans} | {0})
    target, seen = teacher.target(batch), 0
    places = (batch.positions_N + 1).tolist()
    for start, end in pairwise(borders):
        mine = [i for i in range(batch.tokens) if start < own_ends[i] <= end]
        if not set(mine) <= set(places):
            assert all(target.chunk_N[places.index(i)] < 0 for i in mine if i in places)
            continue
        expected = sum(float(logprobs[j - 1, ids[j]]) for j, (_, e) in enumerate(spans) if start < e <= end)
        chunk = {int(target.chunk_N[places.index(i)]) for i in mine}
        assert chunk == {seen} and abs(float(target.logprob_C[seen]) - expected) < 1e-4
        seen += 1
    assert seen == len(target.logprob_C) > 10


def test_with_the_students_own_tokenizer_a_chunk_is_a_token(examples: Examples, tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "same", toy_tokenizer())
    student, batch = pretrained.from_pretrained(folder), examples.batch([0, 1, 2])
    target = AlignedTeacher(folder, toy_tokenizer(), torch.device("cpu")).target(batch)
    used = target.chunk_N[target.chunk_N >= 0]
    assert used.tolist() == list(range(len(target.logprob_C)))
    assert len(used) >= 0.95 * batch.targets  # but where the whole text is cut otherwise than its parts
    hidden_ND = student.hidden(batch.ids_T[None], lengths=batch.lengths)[0][batch.positions_N]
    losses = aligned_divergence(hidden_ND, student.lm_head.weight, target=target, labels_N=batch.labels_N)
    losses.total.backward()
    assert student.lm_head.weight.grad is not None
    assert abs(float(losses.total.detach())) < 1e-4 * batch.targets
    assert float(student.lm_head.weight.grad.norm()) < 1e-2


def test_the_targets_do_not_depend_on_how_the_text_is_cut_into_batches(examples: Examples, other: Path) -> None:
    teacher = AlignedTeacher(other, toy_tokenizer(), torch.device("cpu"))
    student = Student(ModelConfig(1088, 32, 48, 1, 2, 1)).init_weights(1)
    weight = student.lm_head.weight

    def gradient(batches: Sequence[Batch]) -> tuple[float, torch.Tensor]:
        student.zero_grad()
        total = 0.0
        for batch in batches:
            hidden_ND = student.hidden(batch.ids_T[None], lengths=batch.lengths)[0][batch.positions_N]
            loss = aligned_divergence(hidden_ND, weight, target=teacher.target(batch), labels_N=batch.labels_N).total
            loss.backward()
            total += float(loss.detach())
        assert weight.grad is not None
        return total, weight.grad.clone()

    one, one_grad = gradient([examples.batch([0, 1, 2, 3])])
    for cut in ([[0], [1], [2], [3]], [[3, 1], [0, 2]]):
        two, two_grad = gradient([examples.batch(part) for part in cut])
        assert abs(one - two) <= 1e-5 * abs(one)
        assert float((one_grad - two_grad).norm() / one_grad.norm()) < 1e-5


def test_an_answer_cut_within_a_character_is_aligned_up_to_there(other: Path) -> None:
    teacher = AlignedTeacher(other, toy_tokenizer(), torch.device("cpu"))
    prompt, whole = toy_tokenizer().encode("say: "), toy_tokenizer().encode("yes 🙂")
    assert len(toy_tokenizer().bytes_by_id[whole[-1]]) < 4  # the face takes several tokens
    target = teacher.target(own_batch([prompt, prompt], [whole[:-1], whole], [0, 1]))
    first, second = target.chunk_N.split([len(whole) - 1, len(whole)])
    faces = [i for i, token in enumerate(whole) if not toy_tokenizer().bytes_by_id[token].isascii()]
    assert (first[faces[:-1]] == -1).all() and (second[faces] == second[-1]).all() and second[-1] >= 0


def test_a_text_that_the_teacher_cannot_read_whole_is_refused(examples: Examples, tmp_path: Path) -> None:
    teacher = AlignedTeacher(
        teacher_folder(tmp_path / "short", bpe(TEXT, 300), longest=16), toy_tokenizer(), torch.device("cpu")
    )
    with pytest.raises(ConfigError, match=r"record 0: \d+ tokens, the teacher .* reads 16"):
        teacher.target(examples.batch([0]))


def test_a_student_comes_nearer_to_a_teacher_of_another_vocabulary(examples: Examples, other: Path) -> None:
    teacher = AlignedTeacher(other, toy_tokenizer(), torch.device("cpu"))
    student = Student(ModelConfig(1088, 32, 48, 1, 2, 1)).init_weights(1)
    batch = examples.batch([0, 1, 2, 3])
    target, optimiser = teacher.target(batch), torch.optim.Adam(student.parameters(), 3e-3)
    values = []
    for _ in range(200):
        hidden_ND = student.hidden(batch.ids_T[None], lengths=batch.lengths)[0][batch.positions_N]
        loss = aligned_divergence(hidden_ND, student.lm_head.weight, target=target, labels_N=batch.labels_N).total
        optimiser.zero_grad()
        (loss / batch.targets).backward()
        optimiser.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.5 * values[0]
