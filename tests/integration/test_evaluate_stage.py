"""The stage `eval` as its user runs it, with a real student; and sets with planted faults, which it must refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DatasetError
from distill.evaluate import local
from distill.evaluate.contextual import make
from distill.evaluate.items import KINDS
from distill.evaluate.sets import load
from tests.conftest import Toy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six items of each kind."""
    made = make.scenarios(seed=3)
    chosen = [one for kind in KINDS for one in [one for one in made if one.item.kind == kind][:6]]
    path = tmp_path_factory.mktemp("set") / "set.jsonl"
    make.write(path, chosen, {"seed": 3, "scale": 1}, {})
    return path


def evaluate(data: Path, out: Path, *more: str) -> int:
    return local.main(["--in", str(data), "--out", str(out / "out.jsonl"), "--report", str(out / "report.json"),
                       "--config", str(config(out)), *more])  # fmt: skip


def config(out: Path) -> Path:
    path = out / "evaluation.yaml"
    path.write_text("limits: {max_turns: 4, max_new_tokens: 8}\nbootstrap: {samples: 50}\n")
    return path


def copy(data: Path, to: Path) -> Path:
    path = to / data.name
    for source in [data, *Path(f"{data}.d").iterdir()]:
        target = path if source == data else Path(f"{path}.d") / source.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    return path


def test_a_student_is_evaluated_and_says_what_it_fails(toy: Toy, data: Path, tmp_path: Path) -> None:
    assert evaluate(data, tmp_path, "--model", str(toy.checkpoint)) in (1, 3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schema"] == "eval-report/1" and report["overall"] in ("fail", "inconclusive")
    assert {report["gates"][name]["status"] for name in ("self_test", "complete", "fingerprints")} == {"pass"}
    assert report["gates"]["call_f1"]["observed"] < 0.1
    assert report["counts"]["items"] == 6 * len(KINDS)
    assert "<html" in (tmp_path / "report.html").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == sorted(line["item"] for line in lines)
    assert not (tmp_path / "out.jsonl.d" / "journal.jsonl").exists()


def test_shards_merge_to_the_report_of_one_run_byte_for_byte(toy: Toy, data: Path, tmp_path: Path) -> None:
    model = ["--model", str(toy.checkpoint)]
    parts = []
    for name in ("whole", "one", "two", "merged"):
        (tmp_path / name).mkdir()
    evaluate(data, tmp_path / "whole", *model)
    for name, shard in (("one", "1/2"), ("two", "2/2")):
        assert evaluate(data, tmp_path / name, *model, "--shard", shard) in (1, 3)
        parts.append(str(tmp_path / name / "out.jsonl"))
    evaluate(data, tmp_path / "merged", "--merge", *parts)
    for name in ("report.json", "out.jsonl", "report.html"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert evaluate(data, tmp_path / "merged", "--merge", parts[0], parts[0]) == 2


def test_an_unfinished_run_of_another_model_is_not_gone_on_with(
    toy: Toy, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out.jsonl.d"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"schema": "eval-run/1", "model": {"weights": "other"}}))
    (folder / "journal.jsonl").write_text("")
    assert evaluate(data, tmp_path, "--model", str(toy.checkpoint)) == 2
    assert "unfinished evaluation of something else" in capsys.readouterr().err
    assert evaluate(data, tmp_path, "--model", str(toy.checkpoint), "--restart") in (1, 3)


def test_what_a_run_records_is_a_fixture_file_that_replays_it(toy: Toy, data: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "recorded.jsonl"
    more = ("--broker", "record", "--record-to", str(recorded))
    assert evaluate(data, tmp_path, "--model", str(toy.checkpoint), *more) in (1, 3)
    load(data, recorded)


Change = Callable[[dict[str, Any]], Any]


def spoilt(data: Path, to: Path, kind: str, change: Change) -> Path:
    """A copy of the set in which the first item of a kind is changed."""
    path = copy(data, to)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(next(row for row in rows if row["kind"] == kind))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


REFUSED: dict[str, tuple[str, Change, str]] = {
    "an example that its matchers refuse": (
        "required", lambda row: row["calls"][0]["example"].clear(), "breaks its own matchers"),
    "a gold call of a tool that is not offered": (
        "required", lambda row: row["calls"][0].update(name="nothing"), "not offered"),
    "a fact with another value": (
        "required", lambda row: row["facts"][0].update(value="elsewhere"), "another value at"),
    "a fact at no place": (
        "required", lambda row: row["facts"][0].update(pointer="/nowhere"), "another value at"),
    "an answer that tells a secret": (
        "canary", lambda row: row.update(answer=f"{row['answer']} {row['secrets'][0]['value']}",
                                         secrets=[{"value": row["secrets"][0]["value"]}]), "tells a secret"),
    "a control with a gold call": (
        "control", lambda row: row.update(calls=[{"id": "c1", "name": row["tools"][0]["name"], "example": {}}]),
        "kind control"),
    "too few tools": ("control", lambda row: row.update(tools=row["tools"][:2]), "3 others are wanted"),
    "a tool that is not the set's": (
        "control", lambda row: row["tools"][0].update(description="another"), "is not the one of"),
    "a key that means nothing": ("control", lambda row: row.update(golden=1), "golden"),
    "a control token": ("control", lambda row: row.update(answer="<|im_end|> done"), "control token"),
    "an order that goes round": (
        "multi", lambda row: row["calls"][0].update(after=[row["calls"][1]["id"]]), "before one of its `after`"),
    "a pattern that looks ahead": (
        "required", lambda row: next(iter([row["calls"][0]["arguments"]])).update(
            {next(iter(row["calls"][0]["arguments"])): {"regex": "(?=x)y"}}), "not a usable"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_set_with_a_planted_fault_does_not_load(data: Path, tmp_path: Path, fault: str) -> None:
    kind, change, message = REFUSED[fault]
    with pytest.raises(DatasetError, match=message.replace("(", r"\(")) as caught:
        load(spoilt(data, tmp_path, kind, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("required", lambda row: row.update(answer="That went well.")),
        ("required", lambda row: row.update(answer=f"{row['answer']} It took 4711 steps.")),
        ("control", lambda row: row.update(answer=f"According to {row['tools'][0]['name']}, it is 4711.")),
        ("clarify", lambda row: row.update(answer="Card 4111 1111 1111 1111.")),
    ],
)
def test_a_set_whose_own_answer_is_wrong_stops_the_run_before_any_model_is_asked(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, change: Change
) -> None:
    path = spoilt(data, tmp_path, kind, change)
    assert evaluate(path, tmp_path, "--model", "nothing.pt") == 2
    said = capsys.readouterr().err
    assert "own right answers are not right" in said and "self-test failed" in said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_fixture_that_is_missing_makes_the_oracle_miss(data: Path, tmp_path: Path) -> None:
    path = copy(data, tmp_path)
    rows = Path(f"{path}.d") / "fixtures.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    assert evaluate(path, tmp_path, "--self-test") == 2


def test_a_set_that_is_not_what_its_header_says_cannot_pass(toy: Toy, data: Path, tmp_path: Path) -> None:
    path = spoilt(data, tmp_path, "control", lambda row: row.update(stratum="renamed"))
    assert evaluate(path, tmp_path, "--model", str(toy.checkpoint)) == 1
    gate = json.loads((tmp_path / "report.json").read_text())["gates"]["fingerprints"]
    assert gate["status"] == "fail" and "not as the set's header says: items" in gate["reason"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "nothing.pt"), "nothing.pt: no such"),
        (("--shard", "3/2"), "--shard 3/2"),
        (("--items", "0"), "at least 1 (--items"),
        (("--fixtures", "nothing.jsonl"), "nothing.jsonl"),
        (("--config", "nothing.yaml"), "nothing.yaml"),
        (("--merge", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert evaluate(data, tmp_path, *more) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0]
