"""Every rule of a dataset fails on its own planted fault, and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill import artifacts
from distill.data import toy
from distill.data.distributions import TopK
from distill.data.validate import SECRETS, main, validate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    toy.write(tmp_path / "d.jsonl", "tools", 16)
    return tmp_path / "d.jsonl"


def _header(path: Path, change: Any) -> None:
    file = Path(f"{path}.d") / "header.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def _reseal(path: Path) -> None:
    """List the files' present sha256s and counts, so that only the planted fault is left to find."""

    def change(header: dict[str, Any]) -> None:
        for name in header["files"]:
            header["files"][name] = artifacts.sha256_file(path if name == "records" else Path(f"{path}.d") / name)
        splits = [json.loads(line).get("split", "train") for line in path.read_text().splitlines()]
        header["counts"] |= {"records": len(splits), "train": splits.count("train"), "val": splits.count("val")}

    _header(path, change)


def _lines(path: Path, change: Any) -> None:
    values = [json.loads(line) for line in path.read_text().splitlines()]
    change(values)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    _reseal(path)


def _store(path: Path, change: Any) -> None:
    file = Path(f"{path}.d") / "logprobs.safetensors"
    described = TopK(file).metadata
    tensors = load_file(file)
    change(tensors, described)
    save_file(tensors, file, described)
    _reseal(path)


def _call(values: list[dict[str, Any]]) -> dict[str, Any]:
    """A record that calls a tool."""
    return next(value for value in values if value["tools"] and "tool_calls" in value["messages"][-1])


def _say(record: dict[str, Any], name: str, arguments: dict[str, Any]) -> None:
    record["messages"][-1]["tool_calls"] = [{"name": name, "arguments": arguments}]
    record["teacher_text"] = f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def _twin(values: list[dict[str, Any]], **change: Any) -> None:
    values.append(json.loads(json.dumps(values[0])) | {"id": "twin"} | change)
    values[-1].pop("logprobs")


LINE_FAULTS: dict[str, tuple[str, Any]] = {
    "id used twice": ("unique_ids", lambda v: v[1].update(id=v[0]["id"])),
    "unknown field": ("schema", lambda v: v[1].update(extra=1)),
    "missing field": ("schema", lambda v: v[1].pop("stratum")),
    "role out of turn": ("roles", lambda v: v[1]["messages"].insert(0, {"role": "tool", "content": "x"})),
    "prompt of another": ("roles", lambda v: v[1].update(prompt="something else")),
    "other run": ("run_id", lambda v: v[1].update(run_id="x")),
    "call not offered": ("calls_offered", lambda v: _say(_call(v), "rm", {})),
    "argument not in the schema": ("calls_offered", lambda v: _say(_call(v), _call(v)["tools"][0]["name"], {"x": 1})),
    "span moved": ("targets", lambda v: v[1]["targets"][0]["char"].__setitem__(0, 3)),
    "target dropped": ("targets", lambda v: v[1].update(targets=[])),
    "row of another": ("rows_used_once", lambda v: v[1]["logprobs"].update(row=v[0]["logprobs"]["row"])),
    "row that is not there": ("distributions", lambda v: v[1]["logprobs"].update(row=999)),
    "wrong length": ("distributions", lambda v: v[1]["logprobs"].update(n=1)),
    "wrong k": ("distributions", lambda v: v[1]["logprobs"].update(k=2)),
    "conversation twice": ("no_duplicates", lambda v: _twin(v)),
    "question in both splits": ("no_split_leak", lambda v: _twin(v, split="val")),
    "secret": ("no_secrets", lambda v: v[1].update(ground_truth="sk-abcdefghijklmnopqrstuvwxyz")),
}  # fmt: skip


@pytest.mark.parametrize("fault", LINE_FAULTS)
def test_a_planted_fault_in_a_record_is_found_by_its_rule(path: Path, fault: str) -> None:
    rule, change = LINE_FAULTS[fault]
    _lines(path, change)
    gates, found, _ = validate(path)
    assert gates[rule].status == "fail", fault
    assert all("d.jsonl:" in finding.place for finding in found)


def _swap(tensors: dict[str, Any], _: Any) -> None:
    tensors["topk_logprobs"][0] = tensors["topk_logprobs"][0][::-1].copy()


STORE_FAULTS = {
    "unsorted": _swap,
    "NaN": lambda t, m: t["topk_logprobs"].__setitem__((0, 0), np.nan),
    "sum above 1": lambda t, m: t["topk_logprobs"].__setitem__(0, np.zeros_like(t["topk_logprobs"][0])),
    "tail of another": lambda t, m: t["tail_logprob"].__setitem__(0, -0.1),
    "other tokens": lambda t, m: t["token_ids"].__setitem__(0, (t["token_ids"][0] + 1) % 500),
    "id out of range": lambda t, m: t["topk_ids"].__setitem__((0, 0), 10**6),
    "other tokenizer": lambda t, m: m.update(tokenizer_sha256="x"),
    "other run": lambda t, m: m.update(run_id="x"),
    "offsets": lambda t, m: t["offsets"].__setitem__(1, 10**6),
}


@pytest.mark.parametrize("fault", STORE_FAULTS)
def test_a_planted_fault_in_the_distributions_is_found(path: Path, fault: str) -> None:
    _store(path, STORE_FAULTS[fault])
    gates, _, _ = validate(path)
    assert [name for name, gate in gates.items() if gate.status == "fail"] == ["distributions"]


def test_a_clean_dataset_passes_every_rule(path: Path, capsys) -> None:
    assert main(["--in", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "16 records (16 train, 0 val)" in printed and "14 pass" in printed
    report = json.loads((Path(f"{path}.d") / "validation.json").read_text())
    assert report["findings"] == [] and report["gates"]["distributions"]["status"] == "pass"


def test_findings_exit_1_and_broken_files_exit_2(path: Path, tmp_path: Path, capsys) -> None:
    _lines(path, lambda v: v[1].update(id=v[0]["id"]))
    assert main(["--in", str(path)]) == 1
    assert "d.jsonl:2" in capsys.readouterr().out
    path.write_bytes(path.read_bytes() + b'{"id": nonsense}\n')
    assert main(["--in", str(path)]) == 2
    assert "d.jsonl:17" in capsys.readouterr().err
    assert main(["--in", str(tmp_path / "none.jsonl")]) == 2
    (Path(f"{path}.d") / "header.json").write_text("{}")
    assert main(["--in", str(path)]) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(template_sha256="x"),
        lambda h: h["counts"].update(records=3),
        lambda h: h["files"].update(records="x"),
        lambda h: h["files"].update({"tokenizer.json": "x"}),
        lambda h: h["files"].update({"absent.bin": "x"}),
        lambda h: h["files"].pop("logprobs.safetensors"),
    ],
)
def test_a_header_that_does_not_fit_is_found(path: Path, change: Any) -> None:
    _header(path, change)
    assert validate(path)[0]["header"].status == "fail"


def test_a_reject_without_a_reason_is_found(path: Path) -> None:
    (Path(f"{path}.d") / "rejects.jsonl").write_text('{"id": "x"}\n')
    _reseal(path)
    assert validate(path)[0]["rejects"].status == "fail"


SAMPLES = {
    "API key": "sk-proj-abcdefghijklmnopqrstu",
    "AWS key id": "AKIAABCDEFGHIJKLMNOP",
    "GitHub token": "ghp_" + "a1" * 18,
    "Hugging Face token": "hf_" + "aB" * 17,
    "Slack token": "xoxb-123456789012",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "bearer token": "Bearer abcdefghijklmnopqrstuvwx",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_reported_by_kind_and_place_and_never_echoed(path: Path, kind: str, capsys) -> None:
    _lines(path, lambda v: v[2].update(ground_truth=f"it is {SAMPLES[kind]}."))
    assert main(["--in", str(path)]) == 1
    printed = "".join(capsys.readouterr()) + (Path(f"{path}.d") / "validation.json").read_text()
    assert kind in printed and "d.jsonl:3" in printed and SAMPLES[kind] not in printed


def test_a_key_of_this_environment_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "plain-looking-key")
    _lines(path, lambda v: v[2].update(ground_truth="plain-looking-key"))
    assert validate(path)[0]["no_secrets"].status == "fail"


def test_text_only_sets_skip_the_rule_of_distributions(tmp_path: Path) -> None:
    from distill.data import mix
    from tests.unit.stub_teacher import StubTeacher

    with StubTeacher() as stub:
        mix.make(tmp_path / "d.jsonl", stub.url, 5, mix.MixConfig(), quiet=True)
    gates, found, _ = validate(tmp_path / "d.jsonl")
    assert found == [] and gates["distributions"].status == "skipped"
    assert {gate.status for gate in gates.values()} == {"pass", "skipped"}
