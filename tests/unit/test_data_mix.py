"""Generation against a stub teacher: nothing received is lost, nothing is asked twice, the bytes are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from distill.config import load
from distill.data import mix
from distill.data.journal import Journal
from distill.data.prompts import STRATA, prompts
from distill.data.records import Dataset
from distill.data.teachers import Answer, parse_spec, reject_of, retry_after
from distill.errors import ConfigError, DatasetError, DistillError, InputError, Paused
from tests.unit.stub_teacher import StubTeacher

FAST = mix.MixConfig(attempts=3, timeout_s=5)


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEACHER_API_KEY", "MOONSHOT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def _bytes(path: Path) -> dict[str, bytes]:
    files = [path, *sorted(Path(f"{path}.d").iterdir())]
    return {file.name: file.read_bytes() for file in files if file.name != "journal.jsonl"}


def test_a_dataset_has_the_records_asked_for_and_typed_rejects(tmp_path: Path) -> None:
    with StubTeacher() as stub:
        header = mix.make(tmp_path / "kd.jsonl", stub.url, 40, FAST, quiet=True)
    dataset = Dataset.open(tmp_path / "kd.jsonl")
    assert header.counts["records"] == len(dataset) == 40
    assert header.teacher.model == "stub-1" and header.logprobs is None
    first = dataset[0]
    assert first.reasoning and first.usage and first.usage.completion == 5 and first.teacher_text.startswith("Answer")
    assert {record.stratum for record in dataset} == set(STRATA)
    assert all((record.ground_truth is not None) == (record.stratum == "arithmetic") for record in dataset)
    rejects = [json.loads(line) for line in (tmp_path / "kd.jsonl.d" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["reason"] for reject in rejects} == {"length", "empty"}
    assert len(rejects) + 40 == sum(stub.asked.values())


@pytest.mark.parametrize("concurrency", [1, 5, 32])
def test_any_concurrency_gives_the_same_bytes(tmp_path: Path, concurrency: int) -> None:
    outputs = []
    for n in (8, concurrency):
        with StubTeacher(delay=0.002) as stub:
            config = msgspec.structs.replace(FAST, concurrency=n)
            mix.make(tmp_path / str(n) / "kd.jsonl", stub.url, 30, config, quiet=True)
        outputs.append(_bytes(tmp_path / str(n) / "kd.jsonl"))
        assert max(stub.asked.values()) == 1
    assert outputs[0] == outputs[1]


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    with StubTeacher(delay=0.05) as stub:
        command = [sys.executable, "-m", "scripts.make_kd_mix_hardened", "--teacher", stub.url, "--total", "40"]
        subprocess.run([*command, "--out", str(tmp_path / "whole" / "kd.jsonl")], check=True, capture_output=True)
        stub.asked.clear()
        out = tmp_path / "killed" / "kd.jsonl"
        journal = Path(f"{out}.d") / "journal.jsonl"
        for wanted in (3, 17, 31):
            run = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and (
                not journal.exists() or len(journal.read_bytes().splitlines()) < wanted
            ):
                time.sleep(0.005)
            run.send_signal(signal.SIGKILL)
            run.wait()
            assert not out.exists()
        received = len(journal.read_bytes().splitlines())
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
        # what was in flight at a kill may be asked again; what was received may not
        assert sum(stub.asked.values()) <= 46 + 3 * FAST.concurrency and received >= 31
    assert _bytes(out) == _bytes(tmp_path / "whole" / "kd.jsonl")


def test_an_answer_cut_off_in_the_journal_is_asked_for_again(tmp_path: Path) -> None:
    with StubTeacher() as stub:
        mix.make(tmp_path / "kd.jsonl", stub.url, 10, FAST, quiet=True)
        before = _bytes(tmp_path / "kd.jsonl")
        journal = tmp_path / "kd.jsonl.d" / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-7])
        stub.asked.clear()
        mix.make(tmp_path / "kd.jsonl", stub.url, 10, FAST, quiet=True)
        assert sum(stub.asked.values()) == 1
    assert _bytes(tmp_path / "kd.jsonl") == before


def test_a_longer_run_keeps_the_answers_of_a_shorter_one(tmp_path: Path) -> None:
    with StubTeacher() as stub:
        mix.make(tmp_path / "kd.jsonl", stub.url, 10, FAST, quiet=True)
        mix.make(tmp_path / "kd.jsonl", stub.url, 25, FAST, quiet=True)
        assert max(stub.asked.values()) == 1 and len(Dataset.open(tmp_path / "kd.jsonl")) == 25


def test_a_broken_journal_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"key": "a", "answer": {"text": "x"}, "at": 1.0}\nnonsense\n')
    with pytest.raises(DatasetError, match=r"journal\.jsonl:2"):
        Journal(path)


def test_storms_and_faults_are_waited_out(tmp_path: Path) -> None:
    faults = [(429, {"Retry-After": "0.05"}), (503, {"Retry-After": "0"}), (500, {"Retry-After": "0"})]
    with StubTeacher(faults=faults) as stub:
        header = mix.make(tmp_path / "kd.jsonl", stub.url, 10, msgspec.structs.replace(FAST, attempts=6), quiet=True)
    assert header.counts["records"] == 10


def test_a_teacher_that_goes_away_pauses_the_run_and_keeps_what_came(tmp_path: Path) -> None:
    storm = [(503, {"Retry-After": "0"})] * 1000
    with StubTeacher() as stub:
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, FAST, quiet=True)
        stub.faults = storm
        assert (
            mix.main(["--out", str(tmp_path / "kd.jsonl"), "--teacher", stub.url, "--total", "30"]) == Paused.exit_code
        )
        assert len(Dataset.open(tmp_path / "kd.jsonl")) == 5
        stub.faults = []
        mix.make(tmp_path / "kd.jsonl", stub.url, 30, FAST, quiet=True)
        assert max(stub.asked.values()) == 1


@pytest.mark.parametrize(("status", "message"), [(401, "refuses"), (404, "refuses"), (400, "no usable answer")])
def test_a_teacher_that_refuses_is_an_input_error(tmp_path: Path, status: int, message: str) -> None:
    with StubTeacher(faults=[(status, {})] * 50) as stub, pytest.raises(InputError, match=message):
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, FAST, quiet=True)


@pytest.mark.parametrize(
    "value", [b"not json", {"choices": []}, {"choices": [{"message": {"content": ["a"]}}]}, {"error": {}}, [1]]
)
def test_answers_that_are_no_answers_are_refused(tmp_path: Path, value) -> None:
    with StubTeacher(answer=lambda body: value) as stub, pytest.raises(InputError, match="no usable answer"):
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, FAST, quiet=True)


def test_if_everything_is_rejected_no_dataset_appears(tmp_path: Path) -> None:
    value = {"choices": [{"message": {"content": "x<|im_end|>"}, "finish_reason": "stop"}]}
    with StubTeacher(answer=lambda body: value) as stub, pytest.raises(DistillError, match="control_token"):
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, FAST, quiet=True)
    assert not (tmp_path / "kd.jsonl").exists()


def test_a_key_travels_in_the_header_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "tk-very-secret-1234")
    with StubTeacher() as stub:
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, FAST)
        assert stub.headers[0]["Authorization"] == "Bearer tk-very-secret-1234"
        stub.faults = [(400, {})] * 50
        assert mix.main(["--out", str(tmp_path / "x.jsonl"), "--teacher", stub.url, "--total", "3"]) == 2
    printed = "".join(capfd.readouterr())
    assert "***" in printed and "secret" not in printed
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes()


def test_a_key_never_travels_unencrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "tk-very-secret-1234")
    with pytest.raises(InputError, match="unencrypted"):
        mix.make(tmp_path / "kd.jsonl", "http://teacher.example", 5, FAST, quiet=True)


@pytest.mark.parametrize("prefix", ["", "/v1", "/openai/v1"])
def test_v1_is_added_where_the_bare_url_does_not_answer(tmp_path: Path, prefix: str) -> None:
    with StubTeacher(prefix=prefix) as stub:
        url = stub.url + prefix.removesuffix("/v1")
        assert mix.make(tmp_path / "kd.jsonl", url, 3, FAST, quiet=True).counts["records"] == 3


def test_several_models_need_a_name(tmp_path: Path) -> None:
    with StubTeacher(models=("a", "b")) as stub:
        with pytest.raises(InputError, match="--model; it lists a, b"):
            mix.make(tmp_path / "kd.jsonl", stub.url, 3, FAST, quiet=True)
        named = msgspec.structs.replace(FAST, model="b")
        assert mix.make(tmp_path / "kd.jsonl", stub.url, 3, named, quiet=True).teacher.model == "b"
        assert {body["model"] for body in stub.bodies} == {"b"}


@pytest.mark.parametrize(
    "spec", ["ftp://x", "gguf:", "nothing-here", "http://", "https://user:pw@host/v1", "gguf:no_such_package"]
)
def test_a_teacher_that_cannot_be_is_exit_2(tmp_path: Path, spec: str, capsys) -> None:
    assert mix.main(["--out", str(tmp_path / "kd.jsonl"), "--teacher", spec, "--total", "3"]) == 2
    assert "--teacher" in capsys.readouterr().err and not (tmp_path / "kd.jsonl").exists()


def test_nobody_at_the_door_is_exit_2(tmp_path: Path, capsys) -> None:
    with StubTeacher() as stub:
        url = stub.url
    assert mix.main(["--out", str(tmp_path / "kd.jsonl"), "--teacher", url, "--total", "3"]) == 2
    assert f"cannot reach a teacher at {url} or {url}/v1" in capsys.readouterr().err


def test_the_shipped_mix_is_the_default_one() -> None:
    assert load("configs/kd_mix.yaml", mix.MixConfig) == mix.MixConfig()


def test_an_unknown_key_or_stratum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("max_token: 3\n")
    with pytest.raises(ConfigError, match="max_tokens"):
        load(tmp_path / "mix.yaml", mix.MixConfig)
    with pytest.raises(ConfigError, match="poetry"):
        list(prompts({"poetry": 1.0}, 0))


def test_ten_thousand_prompts_are_different_and_longer_runs_begin_alike() -> None:
    weights = dict.fromkeys(STRATA, 1.0)
    stream = prompts(weights, 0)
    first = [next(stream) for _ in range(10_000)]
    assert len({p.text for p in first}) == len({p.id for p in first}) == 10_000
    assert [p.id for _, p in zip(range(50), prompts(weights, 0))] == [p.id for p in first[:50]]
    assert {p.id for _, p in zip(range(50), prompts(weights, 1))} != {p.id for p in first[:50]}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-4", 0.0), ("1e9", 600.0), ("Thu, 01 Jan 1970 00:00:30 GMT", 20.0), ("soon", None),
     (None, None), ("nan", None)],
)  # fmt: skip
def test_retry_after_is_understood_in_its_forms(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, now=10.0) == seconds


def test_rejects_are_typed() -> None:
    assert reject_of(Answer("fine", finish="stop")) is None
    assert reject_of(Answer("cut", finish="length")) == "length"
    assert reject_of(Answer("x", finish="content_filter")) == "filtered"
    assert reject_of(Answer("<tool_call>{}</tool_call>", finish="stop")) == "tool_leak"
    assert reject_of(Answer(" \n", finish="stop")) == "empty"


def test_specs_are_read(tmp_path: Path) -> None:
    assert parse_spec("https://api.example/v1/") == ("endpoint", "https://api.example/v1")
    assert parse_spec("hf:org/model") == ("hf", "org/model")
    assert parse_spec(str(tmp_path)) == ("hf", str(tmp_path))
    assert os.path.isabs(parse_spec(str(tmp_path)).target)
