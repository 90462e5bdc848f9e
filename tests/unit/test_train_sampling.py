"""The student's own answers: what is drawn, that nothing beside it matters, and that learning on them helps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.batches import Examples
from distill.data.records import Dataset
from distill.model import ModelConfig, Student
from distill.tokenizer import toy_tokenizer
from distill.train.divergence import linear_divergence
from distill.train.divergences import Divergence
from distill.train.sampling import OnPolicy, own_answers, own_batch, sample
from distill.train.targets import Dense
from distill.train.toy import toy_model
from tests.unit.train_sets import tool_episode, write_records, write_set

STOP = 0


def tiny(seed: int, vocabulary: int = 5, **changes: int) -> Student:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 64} | changes  # fmt: skip
    return Student(ModelConfig(vocab_size=vocabulary, **sizes)).init_weights(seed)


def noise(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]


def one_by_one(
    student: Student, prompt: Sequence[int], seed: int, limit: int, vocabulary: int, temperature: float
) -> list[int]:
    """The same without a cache, alone."""
    ids, generator = list(prompt), torch.Generator().manual_seed(seed)
    while len(ids) < len(prompt) + limit:
        with torch.no_grad():
            logits = student(torch.tensor([ids]))[0, -1, :vocabulary].double() / temperature
        wait = torch.empty(vocabulary, dtype=torch.float64).exponential_(generator=generator)
        ids.append(int((wait / logits.softmax(0)).argmin()))  # a race: rates are probabilities
        if ids[-1] == STOP:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sample_does_not_depend_on_what_is_drawn_beside_it(window: int | None, temperature: float) -> None:
    student = Student(ModelConfig(40, 32, 48, 2, 4, 2, sliding_window=window)).init_weights(5)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(1, 40, n).tolist() for n in (3, 9, 9, 1, 14, 5, 2)]
    expected = [one_by_one(student, prompt, i, 12, 37, temperature) for i, prompt in enumerate(prompts)]
    assert len({len(answer) for answer in expected}) > 1
    for together, order in ((32, range(7)), (32, [4, 0, 6, 2, 5, 1, 3]), (3, range(7)), (1, range(7))):
        generators = noise(7)
        found = sample(student, [prompts[i] for i in order], [12] * 7, [generators[i] for i in order],
                       stop_ids={STOP}, vocabulary=37, temperature=temperature, together=together)  # fmt: skip
        assert found == [expected[i] for i in order]


def test_samples_have_the_students_distribution() -> None:
    student, n = tiny(1, hidden_size=8), 6000
    with torch.no_grad():
        p = student(torch.tensor([[1, 2]]))[0, -1].softmax(0)
        q = student(torch.tensor([[1, 2, 3]]))[0, -1].softmax(0)
    found = sample(student, [[1, 2]] * n, [2] * n, noise(n), stop_ids={STOP}, vocabulary=5)
    first = Counter(answer[0] for answer in found)
    second = Counter(answer[1] for answer in found if answer[0] == 3)
    for counted, wanted in ((first, p), (second, q)):
        size = sum(counted.values())
        assert size > 500
        for token in range(5):
            assert abs(counted[token] / size - float(wanted[token])) < 4 * (0.25 / size) ** 0.5


def test_top_p_draws_from_the_fewest_tokens_that_hold_so_much() -> None:
    student = tiny(2)
    with torch.no_grad():
        ranked, ids = student(torch.tensor([[1, 2]]))[0, -1].softmax(0).sort(descending=True)
    top_p = float(ranked[:2].sum() - ranked[1] / 2)
    found = sample(student, [[1, 2]] * 300, [1] * 300, noise(300), stop_ids={STOP}, vocabulary=5, top_p=top_p)
    assert {answer[0] for answer in found} == set(ids[:2].tolist())
    greedy = sample(student, [[1, 2]] * 3, [1] * 3, noise(3), stop_ids={STOP}, vocabulary=5, temperature=0.0)
    assert greedy == [[int(ids[0])]] * 3


def test_an_answer_ends_with_its_stop_or_at_its_limit_and_the_student_is_left_as_it_was() -> None:
    student = tiny(3).train()
    found = sample(student, [[1]] * 50, [1 + i % 6 for i in range(50)], noise(50),
                   stop_ids={STOP}, vocabulary=5)  # fmt: skip
    for i, answer in enumerate(found):
        assert STOP not in answer[:-1]
        assert answer[-1] == STOP or len(answer) == 1 + i % 6
    assert any(answer[-1] == STOP for answer in found) and student.training
    assert all(p.grad is None for p in student.parameters())
    for prompts, limit in (([[]], 2), ([[1]], 0)):
        with pytest.raises(ValueError, match="at least one token"):
            sample(student, prompts, [limit], noise(1), stop_ids={STOP}, vocabulary=5)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    data = write_set(tmp_path_factory.mktemp("data") / "kd.jsonl", 12, distributions=False)
    return Examples(Dataset.open(data), toy_tokenizer(), "train", max_length=128)


def test_a_batch_of_answers_is_where_and_what_was_drawn(examples: Examples) -> None:
    student, how = Student(toy_model(32, 1)).init_weights(0), OnPolicy(1.0, 9, seed=3)
    batch = own_answers(student, examples, [2, 0, 5], how, 7, toy_tokenizer())
    assert batch.records == tuple(examples[i].record for i in (2, 0, 5))
    for i, ids in zip((2, 0, 5), batch.ids_T.split(batch.lengths)):
        example = examples[i]
        prompt = example.ids[: example.places[0]].tolist()
        alone = own_answers(student, examples, [i], how, 7, toy_tokenizer())
        assert ids.tolist() == alone.ids_T.tolist()
        assert ids[: len(prompt)].tolist() == prompt and 1 <= len(ids) - len(prompt) <= 9
        assert int(ids.max()) < toy_tokenizer().vocab_size < student.config.vocab_size
    assert torch.equal(batch.labels_N, batch.ids_T[batch.positions_N + 1])
    ends = np.cumsum(batch.lengths)
    expected = [
        t for i, end, n in zip((2, 0, 5), ends, batch.lengths) for t in range(end - n + examples[i].places[0], end)
    ]
    assert (batch.positions_N + 1).tolist() == expected
    assert bool(batch.has_distribution_N.all()) and not bool((batch.teacher_N | batch.ground_truth_N).any())
    other = own_answers(student, examples, [2, 0, 5], how, 8, toy_tokenizer())
    assert other.ids_T.tolist() != batch.ids_T.tolist()


def test_each_sequence_is_chosen_by_itself_and_as_often_as_the_share_says() -> None:
    how = OnPolicy(0.3, 4, seed=1)
    chosen = np.array([[how.chosen(step, i) for i in range(40)] for step in range(50)])
    assert abs(chosen.mean() - 0.3) < 4 * (0.21 / 2000) ** 0.5
    assert len({tuple(row) for row in chosen.tolist()}) == 50
    assert not any(OnPolicy(0.0, 4).chosen(0, i) for i in range(99)) and all(
        OnPolicy(1.0, 4).chosen(0, i) for i in range(99)
    )
    assert [OnPolicy(0.3, 4, seed=2).chosen(0, i) for i in range(40)] != chosen[0].tolist()


def test_any_learned_turn_may_be_the_students_own(tmp_path: Path) -> None:
    data = write_records(tmp_path / "kd.jsonl", [tool_episode()], None)
    examples = Examples(Dataset.open(data), toy_tokenizer(), "train", max_length=512)
    how, text = OnPolicy(1.0, 4), toy_tokenizer()
    prompts = {text.decode(how.prompt(step, 0, examples[0])) for step in range(30)}
    assert len(prompts) == 2
    short, long = sorted(prompts, key=len)
    assert long.startswith(short) and all(p.endswith("<|im_start|>assistant\n") for p in prompts)
    assert "rain" in long and "I look." not in short


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"share": 1.5}, "share must lie"), ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
     ({"temperature": -1.0}, "temperature must be"), ({"top_p": 0.0}, "top_p must lie")],
)  # fmt: skip
def test_impossible_settings_are_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnPolicy(0.5, 4)._replace(**changes).require_valid()  # type: ignore[arg-type]


def test_an_answer_never_outgrows_the_context(examples: Examples) -> None:
    longest = max(len(p) for p in (OnPolicy(1.0, 99).prompt(0, i, examples[i]) for i in range(len(examples)))) + 3
    student = Student(ModelConfig(1088, 32, 48, 1, 1, 1, max_position_embeddings=longest)).init_weights(0)
    batch = own_answers(student, examples, range(len(examples)), OnPolicy(1.0, 99), 0, toy_tokenizer())
    assert max(batch.lengths) <= longest


LENGTH = 4
PROMPT = [1, 2]


def sequences() -> list[list[int]]:
    """All answers of at most LENGTH tokens that end with the stop, or there."""
    found: list[list[int]] = []
    for n in range(1, LENGTH + 1):
        for body in itertools.product(range(1, 5), repeat=n - 1):
            found += [[*body, STOP]] if n < LENGTH else [[*body, last] for last in range(5)]
    return found


@torch.no_grad()
def sequence_logprobs(model: Student, answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """fp64 log-probability of each whole answer."""
    longest = max(map(len, answers))
    ids = torch.tensor([[*PROMPT, *a, *[0] * (longest - len(a))] for a in answers])
    logprobs = (
        model(ids)[:, len(PROMPT) - 1 : -1].double().log_softmax(2).gather(2, ids[:, len(PROMPT) :, None])[..., 0]
    )
    kept = torch.arange(longest)[None] < torch.tensor([len(a) for a in answers])[:, None]
    return (logprobs * kept).sum(1)


def reverse_kl(student: Student, teacher: Student) -> float:
    """KL(student || teacher) over whole answers, by enumeration."""
    every = sequences()
    mine, theirs = sequence_logprobs(student, every), sequence_logprobs(teacher, every)
    assert abs(float(mine.exp().sum()) - 1) < 1e-6  # these are all there are
    return float((mine.exp() * (mine - theirs)).sum())


def train(student: Student, teacher: Student, answers: Sequence[Sequence[int]] | None, steps: int = 60) -> None:
    """Reverse KL by token on the student's own answers, or always on these."""
    optimiser = torch.optim.Adam(student.parameters(), 1e-2)
    for step in range(steps):
        drawn = answers or sample(student, [PROMPT] * 32, [LENGTH] * 32, noise(32, step), stop_ids={STOP}, vocabulary=5)
        batch = own_batch([PROMPT] * len(drawn), drawn, range(len(drawn)))
        hidden_ND = student.hidden(batch.ids_T[None], lengths=batch.lengths)[0][batch.positions_N]
        with torch.no_grad():
            target = Dense(
                teacher.hidden(batch.ids_T[None], lengths=batch.lengths)[0][batch.positions_N], teacher.lm_head.weight
            )
        weight_N = torch.full((batch.targets,), 1 / batch.targets)
        optimiser.zero_grad()
        linear_divergence(hidden_ND, student.lm_head.weight, target=target, divergence=Divergence("reverse_kl"),
                          divergence_weight_N=weight_N).total.backward()  # fmt: skip
        optimiser.step()


def test_on_policy_reverse_kl_brings_down_the_exact_reverse_kl_of_whole_answers() -> None:
    teacher = tiny(10)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4)  # a teacher that knows what it wants
    own, others = tiny(11), tiny(11)
    before = reverse_kl(own, teacher)
    train(own, teacher, None)
    train(others, teacher, [[1, STOP], [2, STOP]])  # answers of somebody else: most of the student's own are not seen
    after, elsewhere = reverse_kl(own, teacher), reverse_kl(others, teacher)
    print(f"reverse KL {before:.4f} -> {after:.4f} on policy, {elsewhere:.4f} off")
    assert after < 0.1 * before and after < 0.5 * elsewhere
