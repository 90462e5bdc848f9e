"""`distill harness`: tasks of lm-evaluation-harness give on our runners what the harness's own model gives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is absent: pip install 'distill[benchmarks]'")
pytest.importorskip("transformers", reason="the extra `teacher` is absent")

from distill.errors import InputError
from distill.evaluate import harness
from distill.evaluate.harness_model import HarnessModel
from distill.evaluate.harness_scorers import Scorer, open_scorer
from distill.evaluate.runners import Settings
from distill.export import port
from tests.conftest import Toy

QUESTIONS = [
    {"question": "What is 2+2? ", "choices": ["4", "five", "a cat", "4 "], "answer": 0, "text": "4"},
    {"question": "Is it sunny in Oslo?", "choices": ["yes", "no"], "answer": 1, "text": "It is"},
    {"question": "A colour:", "choices": ["blue", "blue whale", "  red"], "answer": 0, "text": "blue"},
    {"question": "", "choices": ["one", "<|im_start|>two"], "answer": 0, "text": "one"},
]
CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWER = """\
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: text
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
TEXT = """\
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{long}{{{{question}}}} {{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
TASKS = ("tiny_choice", "tiny_answer", "tiny_text")
Answers = dict[tuple[str, int], Any]
"""By task and document: what the model answered."""


class Ran(NamedTuple):
    tasks: Path
    folder: Path
    checkpoint: Answers
    report: dict[str, Any]


@pytest.fixture(scope="module")
def ran(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    work = tmp_path_factory.mktemp("harness")
    os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
    tasks = written_tasks(work / "tasks")
    folder = port.run(port.PortConfig(toy.checkpoint, work / "hf", "huggingface", "float32")).out
    report, found = evaluated(str(toy.checkpoint), tasks, work / "checkpoint.json")
    return Ran(tasks, folder, found, report)


def written_tasks(folder: Path, long: str = "") -> Path:
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in zip(TASKS, (CHOICE, ANSWER, TEXT)):
        (folder / f"{name}.yaml").write_text(text.format(data=data, long=long))
    return folder


def evaluated(
    model: str, tasks: Path, report: Path, names: tuple[str, ...] = TASKS, **options: Any
) -> tuple[dict[str, Any], Answers]:
    made = harness.run(harness.HarnessConfig(model, names, report, tasks, **options))
    rows = [json.loads(line) for line in report.with_suffix(".jsonl").read_text().splitlines()]
    return made, {(row["task"], row["doc_id"]): row["resps"] for row in rows}


def by_the_harness_itself(folder: Path, tasks: Path) -> tuple[dict[str, Any], Answers]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf", {"pretrained": str(folder), "dtype": "float32"}, tasks=list(TASKS), device="cpu", batch_size=1,
        task_manager=TaskManager(include_path=str(tasks)), log_samples=True,
    )  # fmt: skip
    assert found is not None
    return found["results"], {(t, row["doc_id"]): row["resps"] for t, rows in found["samples"].items() for row in rows}


def scores(answer: Any) -> list[float]:
    """Log-likelihoods of an answer; a choice also has whether it is greedy."""
    return [float(one[0] if isinstance(one, (list, tuple)) else one) for (one,) in answer]


def require_equal(ours: Answers, theirs: Answers) -> int:
    """Log-likelihoods to 1e-5, and fp32's rounding of the harness's sums; generations exactly. Returns their number."""
    assert ours.keys() == theirs.keys()
    count = 0
    for key, answer in ours.items():
        if key[0] == "tiny_answer":
            assert answer == theirs[key], key
        else:
            np.testing.assert_allclose(scores(answer), scores(theirs[key]), rtol=2**-23, atol=1e-5, err_msg=str(key))
        if key[0] == "tiny_choice":
            assert [one[0][1] for one in answer] == [bool(one[0][1]) for one in theirs[key]], key
        count += len(answer)
    return count


def test_a_checkpoint_and_its_folder_answer_as_the_harness_s_own_model_of_the_folder(ran: Ran, tmp_path: Path) -> None:
    results, theirs = by_the_harness_itself(ran.folder, ran.tasks)
    assert require_equal(ran.checkpoint, theirs) == 11 + 4 + 4
    _, folder = evaluated(str(ran.folder), ran.tasks, tmp_path / "r.json")
    require_equal(folder, theirs)
    for task, metric in (("tiny_choice", "acc,none"), ("tiny_answer", "exact_match,none")):
        assert ran.report["results"][task][metric] == results[task][metric]
    assert ran.report["results"]["tiny_text"]["word_perplexity,none"] == pytest.approx(
        results["tiny_text"]["word_perplexity,none"], rel=1e-5
    )
    assert any(answer[0][0] for (task, _), answer in ran.checkpoint.items() if task == "tiny_answer"), "all are empty"


@pytest.mark.slow
def test_packages_answer_within_the_derived_fp16_error_of_their_checkpoint(toy: Toy, ran: Ran, tmp_path: Path) -> None:
    """Of a token, at most that of its own logit and that of the largest."""
    scorer, _ = open_scorer(str(toy.checkpoint), Settings())
    for package in (toy.prefill, toy.decode):
        _, found = evaluated(str(package), ran.tasks, tmp_path / "r.json", TASKS[:1])
        worst = 0.0
        for key, answer in found.items():
            row = QUESTIONS[key[1]]
            for choice, ours, exact in zip(row["choices"], scores(answer), scores(ran.checkpoint[key])):
                allowed = derived_error(toy.checkpoint, package, scorer, f"{row['question']} {choice}")
                worst = max(worst, abs(ours - exact) / allowed)
        assert 0 < worst <= 1, (package, worst)


def derived_error(checkpoint: Path, package: Path, scorer: Scorer, text: str) -> float:
    """Sum over all tokens, which is more than that over those of the continuation."""
    import torch

    from distill import checkpoint as checkpoints
    from distill.export.tolerance import fp16_sigma, tolerance_factor
    from distill.verify.runner import PackageRunner

    student = checkpoints.load(checkpoint).student.float().eval()
    ids = torch.tensor([[scorer.first, *scorer.tokenizer.encode(text)]])
    with torch.no_grad():
        sigma = fp16_sigma(student, student.hidden(ids)[0], PackageRunner(package).contract.fp16_gain)
    return 2 * tolerance_factor(student.config.vocab_size) * float(sigma.sum())


def test_a_wrong_weight_is_seen_in_the_log_likelihoods(toy: Toy, ran: Ran) -> None:
    scorer, _ = open_scorer(str(toy.checkpoint), Settings())
    exact = scorer.log_probabilities([5, 6, 7])
    scorer.model._student.model.norm.weight.data[0] += 0.05  # type: ignore[attr-defined]
    assert np.abs(scorer.log_probabilities([5, 6, 7]) - exact).max() > 1e-5


def test_texts_longer_than_the_context_are_read_in_windows_as_the_harness_reads_them(toy: Toy, ran: Ran) -> None:
    """By hand: each window after the first is one token of context and what the context holds."""
    scorer, _ = open_scorer(str(toy.prefill), Settings())
    model, text = HarnessModel(scorer), "a b c d e f g h " * 12
    ids = scorer.tokenizer.encode(text)
    size = model.max_length
    assert size < len(ids)
    expected, read = 0.0, [scorer.first, *ids]
    for start in range(0, len(ids), size):
        window = read[max(0, min(start + size, len(ids)) - size) : min(start + size, len(ids))]
        targets = ids[start : start + size]
        table = scorer.log_probabilities(window)[-len(targets) :]
        expected += sum(float(row[token]) for row, token in zip(table, targets))
    (found,) = model.loglikelihood_rolling([Asked((text,))])
    assert found == pytest.approx(expected, abs=1e-9)


class Asked(NamedTuple):
    args: tuple[Any, ...]


def test_a_prompt_of_spaces_is_as_none_and_the_spaces_belong_to_the_continuation(toy: Toy) -> None:
    model = HarnessModel(open_scorer(str(toy.checkpoint), Settings())[0])
    spaces, none = model.loglikelihood([Asked(("  ", "one")), Asked(("", "  one"))])
    assert spaces == none


def test_generation_ends_before_a_stop_sequence_that_two_tokens_make_up(toy: Toy) -> None:
    scorer, _ = open_scorer(str(toy.checkpoint), Settings())
    model = HarnessModel(scorer)
    (free,) = model.generate_until([Asked(("What", {"until": [], "max_gen_toks": 16}))])
    assert len(free) > 3
    for cut in range(1, len(free) - 2):
        stop = free[cut : cut + 3]
        (text,) = model.generate_until([Asked(("What", {"until": [stop], "max_gen_toks": 16}))])
        assert text == free.split(stop)[0]


@pytest.mark.parametrize(("asked", "said"), [
    ({"do_sample": True, "temperature": 0.7}, "greedy"), ({"num_beams": 4}, "greedy"),
    ({"max_gen_toks": 10**6}, "reads"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(toy: Toy, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        HarnessModel(open_scorer(str(toy.checkpoint), Settings())[0]).generate_until([Asked(("What", asked))])


def test_an_unknown_model_is_named_and_nothing_is_written(ran: Ran, tmp_path: Path) -> None:
    assert refused(tmp_path / "absent.pt", "tiny_choice", ran, tmp_path) == []


@pytest.mark.slow  # the harness reads 14,000 YAML files each time
def test_an_unknown_task_is_named_and_nothing_is_written(toy: Toy, ran: Ran, tmp_path: Path) -> None:
    assert refused(toy.checkpoint, "no_such_task", ran, tmp_path) == []


def refused(model: Path, task: str, ran: Ran, work: Path) -> list[Path]:
    report = ["--include-path", str(ran.tasks), "--report", str(work / "r.json")]
    assert harness.main(["--model", str(model), "--tasks", task, *report]) == 2
    return list(work.iterdir())


@pytest.mark.slow  # the same
def test_with_chat_a_prompt_is_a_turn_of_the_template(toy: Toy, ran: Ran, tmp_path: Path) -> None:
    from distill.chat import Message, render

    evaluated(str(toy.checkpoint), ran.tasks, tmp_path / "r.json", ("tiny_answer",), chat=True, limit=1)
    row = json.loads((tmp_path / "r.jsonl").read_text())
    prompt = Message("user", "Question: What is 2+2? \nAnswer:")
    assert render([prompt], add_generation_prompt=True) in str(row["arguments"]).replace("\\n", "\n")
