"""A dataset is written whole or not at all, and read only where it is what its header says."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from distill import artifacts
from distill.data import records as kd
from distill.data import toy
from distill.data.schema import completion_ids
from distill.data.validate import validate
from distill.errors import DatasetError, InputError
from distill.tokenizer import toy_tokenizer
from tests.unit import kd_sets


@pytest.fixture
def path(tmp_path: Path) -> Path:
    toy.write(tmp_path / "d.jsonl", "tools", 12)
    return tmp_path / "d.jsonl"


def _reseal(path: Path) -> None:
    """Make the header agree with an edited file, so that what is wrong in it must be found by reading it."""
    header = path.with_name("d.jsonl.d") / "header.json"
    value = json.loads(header.read_text())
    value["files"]["records"] = artifacts.sha256_file(path)
    header.write_text(json.dumps(value))


def test_records_come_back_in_order_by_index_and_by_iteration(path: Path) -> None:
    made = toy.build("tools", 12)
    dataset = kd.Dataset.open(path)
    assert len(dataset) == 12 and dataset.header.counts["records"] == 12
    assert [r.id for r in dataset] == [r.id for r in made.records] == [dataset[i].id for i in range(12)]
    for record, expected in zip(dataset, made.distributions, strict=True):
        found = dataset.distribution(record)
        assert found is not None and (found.topk_logprobs == expected.topk_logprobs).all()
    assert dataset.tokenizer().sha256 == toy_tokenizer().sha256


def test_a_line_is_plain_json_with_prompt_and_teacher_text(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) == 12
    for line in lines:
        value = json.loads(line)
        assert isinstance(value["prompt"], str) and len(value["teacher_text"]) > 0 and value["run_id"]


def test_whole_episodes_come_back_as_they_were(tmp_path: Path) -> None:
    """Tools, reasoning, call ids, targets with sources, costs and hashes: nothing is lost on the way."""
    header = kd_sets.write_set(tmp_path / "e.jsonl", 6)
    for index, record in enumerate(kd.Dataset.open(tmp_path / "e.jsonl")):
        expected = kd_sets.episode(index, tokenizer=toy_tokenizer())
        ref = kd.LogprobRef(index, len(completion_ids(expected, toy_tokenizer())), kd_sets.K)
        assert record == msgspec.structs.replace(expected, run_id=header.run_id, logprobs=ref)
        assert record.learned == (2, 5) and record.cost_usd == kd_sets.cost_of(index)


def test_writing_twice_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    toy.write(tmp_path / "again" / "d.jsonl", "tools", 12)
    for file in [path, *sorted(path.with_name("d.jsonl.d").iterdir())]:
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path)).read_bytes(), file.name


def test_a_text_only_dataset_has_no_distributions(tmp_path: Path) -> None:
    made = toy.build("8-ball", 5)
    header = msgspec.structs.replace(made.header, logprobs=None)
    kd.write_dataset(tmp_path / "t.jsonl", made.records, header)
    dataset = kd.Dataset.open(tmp_path / "t.jsonl")
    assert dataset.distributions is None and dataset.distribution(dataset[0]) is None and dataset[0].logprobs is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.pop("prompt"), "prompt"),
        (lambda r: r.update(promt="x"), "promt"),
        (lambda r: r.update(teacher_text="other"), "teacher_text"),
        (lambda r: r.update(split="test"), "split"),
        (lambda r: r["messages"][0].update(role="robot"), "robot"),
        (lambda r: r["messages"].pop(), "messages"),
        (lambda r: r["messages"][-1].pop("origin"), "the teacher's"),
        (lambda r: r["messages"][-1].update(origin="student"), "origin"),
        (lambda r: r["messages"][0].update(reasoning="hm"), "reason"),
        (lambda r: r["targets"][0].update(kind="loss"), "targets"),
        (lambda r: r["targets"][0].update(char=[1]), "targets"),
        (lambda r: r.update(cost_usd="much"), "cost_usd"),
        (lambda r: r["logprobs"].update(row="x"), "logprobs.row"),
        (lambda r: r.update(run_id="other"), "run_id"),
    ],
)
def test_a_broken_record_is_named_by_file_line_and_field(path: Path, change, field: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    value = json.loads(lines[4])
    change(value)
    lines[4] = json.dumps(value) + "\n"
    path.write_text("".join(lines))
    _reseal(path)
    with pytest.raises(DatasetError, match=rf"d\.jsonl:5:.*{field}"):
        list(kd.Dataset.open(path))


@pytest.mark.parametrize("cut", [b"", b"\n", b"{nope}\n"])
def test_a_file_that_ends_wrongly_is_refused(path: Path, cut: bytes) -> None:
    path.write_bytes(path.read_bytes()[:-20] if not cut else path.read_bytes() + cut)
    with pytest.raises(DatasetError, match=r"d\.jsonl"):
        list(kd.Dataset.open(path))


def test_an_edited_file_is_not_the_headers(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DatasetError, match="edited or incomplete"):
        kd.Dataset.open(path)


def test_a_store_of_another_run_is_refused(path: Path, tmp_path: Path) -> None:
    toy.write(tmp_path / "o.jsonl", "tools", 12, seed=1)
    (tmp_path / "o.jsonl.d" / "logprobs.safetensors").rename(path.with_name("d.jsonl.d") / "logprobs.safetensors")
    with pytest.raises(DatasetError, match="run_id"):
        kd.Dataset.open(path)


def test_a_missing_dataset_or_header_is_one_clear_error(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.jsonl"):
        kd.Dataset.open(tmp_path / "none.jsonl")
    (tmp_path / "begun.jsonl.d").mkdir()
    (tmp_path / "begun.jsonl.d" / "journal.sqlite").touch()
    for opened in (kd.Dataset.open, validate):
        with pytest.raises(DatasetError, match=r"begun\.jsonl: no dataset yet, but the journal of a run"):
            opened(tmp_path / "begun.jsonl")
    (path.with_name("d.jsonl.d") / "header.json").unlink()
    with pytest.raises(DatasetError, match=r"not a kd/1 dataset.*header\.json"):
        kd.Dataset.open(path)


def test_a_failure_while_writing_leaves_the_old_dataset(path: Path) -> None:
    made = toy.build("tools", 12)
    before = {file: file.read_bytes() for file in [path, *path.with_name("d.jsonl.d").iterdir()]}
    twice = [*made.records, made.records[0]]
    with pytest.raises(DatasetError, match="given twice"):
        kd.write_dataset(path, twice, made.header, distributions=[*made.distributions, made.distributions[0]],
                         tokenizer=toy_tokenizer())  # fmt: skip
    assert {file: file.read_bytes() for file in [path, *path.with_name("d.jsonl.d").iterdir()]} == before


def test_a_folder_that_cannot_be_made_is_named(path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        toy.write(path / "below" / "x.jsonl")


def test_the_split_is_stable_and_about_a_tenth() -> None:
    splits = [kd.split_of(f"record-{i}") for i in range(5000)]
    assert splits == [kd.split_of(f"record-{i}") for i in range(5000)]
    assert 400 < splits.count("val") < 600
