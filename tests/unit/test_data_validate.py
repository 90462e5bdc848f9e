"""Every rule of a dataset fails on its own planted fault, and on nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill.artifacts import sha256_file
from distill.broker import fixture_sha256
from distill.chat import ToolCall
from distill.data import records as kd
from distill.data import toy
from distill.data.rules import header as header_rules
from distill.data.rules.block import Options
from distill.data.rules.record import RULES
from distill.data.rules.secrets import PERSONAL, SECRETS, personal_in, secret_in
from distill.data.store import store
from distill.data.validate import TABLE, main, validate
from tests.unit.kd_sets import edit_header, edit_lines, episode, reseal, retell, write_set

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kd") / "d.jsonl"
    write_set(path)
    return path


@pytest.fixture(autouse=True)
def invented(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The sets here are of no teacher; what a toy set must be is a test of its own."""
    if "toy" not in request.node.name:
        monkeypatch.setattr(header_rules, "toy_problems", lambda header: ())


@pytest.fixture
def path(clean: Path, tmp_path: Path) -> Path:
    """A sound dataset of one's own."""
    shutil.copy(clean, tmp_path / "d.jsonl")
    shutil.copytree(kd.sidecar(clean), tmp_path / "d.jsonl.d")
    return tmp_path / "d.jsonl"


def failing(path: Path, options: Options | None = None) -> list[str]:
    return [name for name, gate in validate(path, options).gates.items() if gate.status == "fail"]


def _twin(lines: Lines, split: str, **change: Any) -> dict[str, Any]:
    """The first record of the other or the same split again, under another id."""
    twin = json.loads(json.dumps(lines[0], default=str))
    identity = next(f"twin-{i}" for i in range(99) if kd.split_of(f"twin-{i}", 0.25) == split)
    twin |= {"id": identity, "split": split, "cost_usd": None} | change
    twin["logprobs"] = None
    lines.append(twin)
    return twin


def _other(split: str) -> str:
    return {"train": "val", "val": "train"}[split]


def _near(lines: Lines) -> None:
    """Nearly the same question in the other split."""
    twin = _twin(lines, _other(lines[0]["split"]))
    twin["messages"][1]["content"] += " Please"
    retell(twin)


def _turn(lines: Lines, index: int, **change: Any) -> None:
    lines[1]["messages"][index] |= change
    retell(lines[1])


def _schema(lines: Lines, **change: Any) -> None:
    """Another schema for the arguments of the weather tool."""
    lines[1]["tools"][0]["function"]["parameters"]["properties"] |= change
    retell(lines[1])


def _rename(lines: Lines) -> None:
    """A call of a tool that is not offered, its fixture right."""
    call = lines[1]["messages"][2]["tool_calls"][0]
    call["name"] = "rm"
    result = lines[1]["messages"][3]["content"]
    lines[1]["provenance"]["fixture_sha256"][0] = fixture_sha256(ToolCall("rm", call["arguments"]), result)
    retell(lines[1])


def _forget(lines: Lines) -> None:
    lines[1]["provenance"]["response_sha256"][-1] = "1" * 64


def _swap_ids(lines: Lines) -> None:
    for index, name in ((3, "call_1"), (4, "call_0")):
        lines[1]["messages"][index]["tool_call_id"] = name


def _query(lines: Lines, value: str) -> None:
    """Another argument of the second call, its fixture right."""
    call = lines[1]["messages"][2]["tool_calls"][1]
    call["arguments"]["query"] = value
    result = lines[1]["messages"][4]["content"]
    lines[1]["provenance"]["fixture_sha256"][1] = fixture_sha256(ToolCall("search", call["arguments"]), result)
    retell(lines[1])


def _empty_result(lines: Lines) -> None:
    call = lines[1]["messages"][2]["tool_calls"][1]
    lines[1]["messages"][4]["content"] = ""
    lines[1]["provenance"]["fixture_sha256"][1] = fixture_sha256(ToolCall("search", call["arguments"]), "")
    retell(lines[1])


def _secret_id(split: str) -> str:
    names = (f"sk-abcdefghijklmnopqrstuvwxy{n}" for n in range(99))
    return next(name for name in names if kd.split_of(name, 0.25) == split)


LINE_FAULTS: dict[str, tuple[str, Any]] = {
    "other run": ("run_id", lambda v: v[1].update(run_id="x")),
    "id used twice": ("ids", lambda v: v[3].update(id=v[1]["id"], split=v[1]["split"])),
    "wrong split": ("split", lambda v: v[1].update(split=_other(v[1]["split"]))),
    "unknown field": ("schema", lambda v: v[1].update(extra=1)),
    "missing field": ("schema", lambda v: v[1].pop("stratum")),
    "wrong type": ("schema", lambda v: v[1]["usage"].update(prompt="many")),
    "text of another turn": ("schema", lambda v: v[1].update(teacher_text="something else")),
    "unknown role": ("schema", lambda v: v[1]["messages"][0].update(role="robot")),
    "role out of turn": ("roles", lambda v: _turn(v, 0, role="assistant")),
    "prompt of another": ("roles", lambda v: v[1].update(prompt="something else")),
    "result of no call": ("roles", lambda v: v[1]["messages"][3].update(tool_call_id="call_7")),
    "results in the wrong order": ("roles", _swap_ids),
    "ids that are a server's": ("roles", lambda v: v[1]["messages"][2]["tool_calls"][0].update(id="chatcmpl-1")),
    "empty tool result": ("roles", lambda v: _empty_result(v)),
    "lost bytes in a call": ("bytes", lambda v: _query(v, "a\ufffdb")),
    "NUL in a call": ("bytes", lambda v: _query(v, "a\x00b")),
    "markup in a call": ("leak", lambda v: _query(v, "<|tool_calls_section_begin|>")),
    "tool response in a text": ("leak", lambda v: _turn(v, 5, content="It is <tool_response> cold.")),
    "span reversed": ("spans", lambda v: v[1]["targets"][0]["char"].reverse()),
    "flag that nothing sets": ("bytes", lambda v: v[1].update(flags=["odd"])),
    "hash that is none": ("provenance", lambda v: v[1]["provenance"]["request_sha256"].__setitem__(0, "A" * 64)),
    "row that nobody uses": ("distributions", lambda v: v[1].pop("logprobs")),
    "secret as id": ("secrets", lambda v: v[1].update(id=_secret_id(v[1]["split"]))),
    "user turn by the teacher": ("roles", lambda v: v[1]["messages"][0].update(origin="broker")),
    "call written in a text": ("calls", lambda v: _turn(v, 2, content='<tool_call>{"name": "x"}</tool_call>')),
    "call not offered": ("offered", _rename),
    "argument of another type": ("offered", lambda v: _schema(v, place={"type": "integer"})),
    "argument outside its enum": ("offered", lambda v: _schema(v, unit={"enum": ["K"]})),
    "argument that breaks a pattern": ("offered", lambda v: _schema(v, place={"pattern": "^[0-9]+$"})),
    "schema that is none": ("offered", lambda v: _schema(v, place={"type": "strin"})),
    "schema from the network": ("offered", lambda v: _schema(v, place={"$ref": "http://127.0.0.1:9/x.json"})),
    "tool offered twice": ("offered", lambda v: (v[1]["tools"].append(v[1]["tools"][0]), retell(v[1]))),
    "span moved": ("spans", lambda v: v[1]["targets"][1]["char"].__setitem__(0, 3)),
    "byte span moved": ("spans", lambda v: v[1]["targets"][1]["byte"].__setitem__(1, 9)),
    "token span moved": ("spans", lambda v: v[1]["targets"][1]["tok"].__setitem__(1, 9)),
    "token span missing": ("spans", lambda v: v[1]["targets"][1].pop("tok")),
    "target dropped": ("spans", lambda v: v[1]["targets"].pop()),
    "target of another kind": ("spans", lambda v: v[1]["targets"][1].update(kind="final")),
    "source of another leaf": ("spans", lambda v: _integration(v[1])["source"].update(pointer="/elsewhere")),
    "loss on a tool's result": ("loss", lambda v: v[1]["targets"][0].update(msg=3)),
    "span beyond the text": ("spans", lambda v: v[1]["targets"][0].update(char=[0, 10**6])),
    "source that comes later": ("loss", lambda v: _integration(v[1])["source"].update(msg=5)),
    "row of another": ("distributions", lambda v: v[1]["logprobs"].update(row=v[0]["logprobs"]["row"])),
    "row that is not there": ("distributions", lambda v: v[1]["logprobs"].update(row=999)),
    "wrong length": ("distributions", lambda v: v[1]["logprobs"].update(n=1)),
    "wrong k": ("distributions", lambda v: v[1]["logprobs"].update(k=2)),
    "lost bytes": ("bytes", lambda v: _turn(v, 5, content="It is 3 \ufffdC.")),
    "a NUL": ("bytes", lambda v: _turn(v, 5, content="It is\x00.")),
    "carriage returns unsaid": ("bytes", lambda v: _turn(v, 5, content="One.\r\nTwo.")),
    "carriage returns said of none": ("bytes", lambda v: v[1].update(flags=["crlf"])),
    "secret": ("secrets", lambda v: v[1].update(ground_truth="sk-abcdefghijklmnopqrstuvwxy1")),
    "secret in a tool's schema": ("secrets", lambda v: _schema(v, place={"default": "AKIAABCDEFGHIJKLMNOP"})),
    "conversation twice": ("duplicates", lambda v: _twin(v, v[0]["split"])),
    "question in both splits": ("near_duplicates", _near),
    "hash of another result": ("provenance", lambda v: v[1]["provenance"]["fixture_sha256"].__setitem__(0, "0" * 64)),
    "result edited": ("provenance", lambda v: _turn(v, 3, content='{"temperature": 99.5}')),
    "hash missing": ("provenance", lambda v: v[1]["provenance"]["fixture_sha256"].pop()),
    "answer edited": ("provenance", lambda v: (_turn(v, 5, content="Something else."), _forget(v))),
    "request missing": ("provenance", lambda v: v[1]["provenance"]["request_sha256"].pop()),
    "no provenance": ("provenance", lambda v: v[1].pop("provenance")),
    "call where none is expected": ("calls", lambda v: v[1].update(expect="no_call")),
    "cost of one changed": ("costs", lambda v: v[1].update(cost_usd=Decimal("0.5"))),
    "cost without end": ("costs", lambda v: v[1].update(cost_usd="1e999999999")),
    "cost that is none": ("costs", lambda v: v[1].update(cost_usd="sNaN")),
    "cost below nothing": ("costs", lambda v: v[1].update(cost_usd=Decimal("-0.1"))),
    "more reasoning than text": ("costs", lambda v: v[1]["usage"].update(reasoning=101)),
    "cut off": ("finish", lambda v: _turn(v, 5, finish_reason="length")),
    "no finish reason": ("finish", lambda v: _turn(v, 5, finish_reason=None)),
    "finish of a call without one": ("finish", lambda v: _turn(v, 5, finish_reason="tool_calls")),
    "hash of another text": ("render", lambda v: v[1]["render"].update(text_sha256="0" * 64)),
    "size of another text": ("render", lambda v: v[1]["render"].update(n_bytes=7)),
    "not rendered": ("render", lambda v: v[1].pop("render")),
    "reasoning of another": ("licence", lambda v: (v[1].update(reasoning="Something else."), retell(v[1]))),
    "markup of Mistral": ("leak", lambda v: _turn(v, 5, content='[TOOL_CALLS][{"name": "x"}]')),
    "markup of Kimi": ("leak", lambda v: _turn(v, 5, content="<|tool_calls_section_begin|>")),
}  # fmt: skip


def _integration(line: dict[str, Any]) -> dict[str, Any]:
    return next(target for target in line["targets"] if target["kind"] == "integration")


@pytest.mark.parametrize("fault", LINE_FAULTS)
def test_a_planted_fault_in_a_record_is_found_by_its_rule_alone(path: Path, fault: str) -> None:
    rule, change = LINE_FAULTS[fault]
    edit_lines(path, change)
    report = validate(path)
    assert [name for name, gate in report.gates.items() if gate.status == "fail"] == [rule]
    assert all(
        finding.place.startswith(("d.jsonl:", "report.html"))
        for finding in report.findings
        if finding.rule not in ("costs", "distributions")
    )


STORE_FAULTS = {
    "damaged row": lambda t, m: t["rows"].__setitem__(3, t["rows"][3] ^ 1),
    "other tokenizer": lambda t, m: m.update(tokenizer_sha256="x"),
    "other run": lambda t, m: m.update(run_id="x"),
    "offsets": lambda t, m: t["offsets"].__setitem__(1, 10**6),
}


@pytest.mark.parametrize("fault", STORE_FAULTS)
def test_a_planted_fault_in_the_store_is_found(path: Path, fault: str) -> None:
    file = kd.sidecar(path) / "logprobs.safetensors"
    described, tensors = store.TopK(file).metadata, load_file(file)
    STORE_FAULTS[fault](tensors, described)
    save_file(tensors, file, described)
    reseal(path)
    assert failing(path) == ["distributions"]


@pytest.mark.parametrize("fault", ["unsorted", "above 1", "other tokens"])
def test_distributions_that_are_none_are_found(path: Path, fault: str) -> None:
    """A store whose checksums are right and whose numbers are not."""
    file = kd.sidecar(path) / "logprobs.safetensors"
    old = store.TopK(file)
    item = old[0]
    if fault == "unsorted":
        item.topk_logprobs[0] = item.topk_logprobs[0][::-1].copy()
    elif fault == "above 1":
        item.topk_logprobs[0] = 0
    else:
        item.token_ids[0] = (item.token_ids[0] + 1) % 500
    writer = store.Writer(path.parent, old.k, vocab_size=old.vocab_size, codec=store.EXACT)
    for row in range(len(old)):
        data = store.pack_exact(item if row == 0 else old[row], old.vocab_size)
        writer._spool.write(data)
        writer._sizes.append(len(data))
        writer._counts.append(len(item.token_ids if row == 0 else old[row].token_ids))
    described = {k: v for k, v in old.metadata.items() if not k.endswith("_crc32")}
    writer.tokens = old.tokens
    writer.finish(file, described)
    writer.close()
    reseal(path)
    assert failing(path) == ["distributions"]


HEADER_FAULTS: dict[str, tuple[str, Any]] = {
    "another template": ("header", lambda h: h.update(template_sha256="0" * 64)),
    "another tokenizer": ("header", lambda h: h.update(tokenizer_sha256="0" * 64)),
    "a hash that is none": ("header", lambda h: h.update(tools_sha256="x")),
    "counts of another": ("header", lambda h: h["counts"].update(records=3)),
    "prompts of another": ("header", lambda h: h.update(prompts_sha256="0" * 64)),
    "no code version": ("header", lambda h: h["created_by"].pop("code")),
    "weights unknown": ("header", lambda h: h["teacher"].update(kind="gguf")),
    "host unknown": ("header", lambda h: h["teacher"].update(kind="endpoint")),
    "text only with distributions": ("header", lambda h: h.update(text_only=True)),
    "records changed": ("files", lambda h: h["files"].update(records="0" * 64)),
    "tokenizer changed": ("files", lambda h: h["files"].update({"tokenizer.json": "0" * 64})),
    "file missing": ("files", lambda h: h["files"].update({"absent.bin": "0" * 64})),
    "rejects unlisted": ("files", lambda h: h["files"].pop("rejects.jsonl")),
    "quota not reached": ("quotas", lambda h: h["quotas"].update(tools=13)),
    "quota exceeded": ("quotas", lambda h: h["quotas"].update(tools=11)),
    "stratum without quota": ("quotas", lambda h: h["quotas"].pop("tools")),
    "cost changed": ("costs", lambda h: h.update(cost_usd=Decimal("0.1"))),
    "cost that is none": ("costs", lambda h: h.update(cost_usd="Infinity")),
    "cost unsaid": ("costs", lambda h: h.update(cost_usd=None)),
    "reasoning not allowed": ("licence", lambda h: h["licence"].update(reasoning_allowed=False)),
    "distributions of another temperature": ("distributions", lambda h: h["logprobs"].update(temperature=2.0)),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_planted_fault_in_the_header_is_found_by_its_rule_alone(path: Path, fault: str) -> None:
    rule, change = HEADER_FAULTS[fault]
    edit_header(path, change)
    found = failing(path)
    also = "distributions" if "another t" in fault else "costs" if "unknown" in fault else rule
    assert rule in found and set(found) <= {rule, also}


def test_a_quota_may_be_missed_within_the_tolerance(path: Path) -> None:
    edit_header(path, lambda h: h.update(quotas=h["quotas"] | {"tools": 13}, quota_tolerance=0.1))
    assert failing(path) == []


def test_the_ledger_has_paid_at_least_what_the_header_says(path: Path) -> None:
    from distill.data.journal import Journal

    with Journal(kd.sidecar(path) / "journal.sqlite"):
        pass
    gates = validate(path).gates
    assert gates["costs"].status == "fail" and "ledger" in str(gates["costs"].reason)


@pytest.mark.parametrize("line", ['{"id": "x"}', '{"reason": "length"}', '{"id": "x", "reason": "bad mood"}', "[]"])
def test_a_reject_needs_an_id_and_a_known_reason(path: Path, line: str) -> None:
    with open(kd.sidecar(path) / "rejects.jsonl", "a") as file:
        file.write(line + "\n")
    reseal(path)
    assert failing(path) == ["rejects"]


def test_words_of_an_evaluation_set_are_found_with_their_evidence(path: Path, tmp_path: Path) -> None:
    asked = kd.Dataset.open(path)[4].prompt
    own = tmp_path / "eval.jsonl"
    own.write_text(json.dumps({"id": "q7", "prompt": f"Tell me: {asked}"}) + "\n")
    options = Options(eval_sets=(own,))
    report = validate(path, options)
    assert failing(path, options) == ["contamination"]
    assert [(f.place, "q7 of eval.jsonl" in f.what) for f in report.findings] == [("d.jsonl:5", True)]
    own.write_text(
        json.dumps({"id": "q7", "prompt": "Something that nobody has asked in any of these conversations"}) + "\n"
    )
    assert validate(path, options).gates["contamination"].status == "pass"
    edit_header(path, lambda h: h.update(decontamination={"eval.jsonl": "0" * 64}))
    assert failing(path, options) == ["contamination"]  # another file of that name
    assert validate(path).gates["contamination"].status == "skipped"


def test_an_item_of_few_words_is_found_though_the_other_texts_are_long(path: Path, tmp_path: Path) -> None:
    own = tmp_path / "eval.txt"
    own.write_text("Answer me this\n")

    def plant(rows: list[dict[str, Any]]) -> None:
        rows[2]["ground_truth"] = "answer ME this!"

    edit_lines(path, plant)
    assert failing(path, Options(eval_sets=(own,))) == ["contamination"]


def test_usage_that_costs_something_else_by_the_prices_is_found(path: Path) -> None:
    edit_header(path, lambda h: h["config"].update(prices={"input": 1.0, "output": 2.0}))
    assert "costs" in failing(path)


def test_evaluation_sets_that_the_header_names_are_found_where_they_were(path: Path, tmp_path: Path) -> None:
    own = tmp_path / "eval.jsonl"
    own.write_text(json.dumps({"prompt": kd.Dataset.open(path)[4].prompt}) + "\n")
    named = {"decontamination": {"eval.jsonl": sha256_file(own)}}
    edit_header(path, lambda h: h.update(named | {"config": h["config"] | {"decontaminate": [str(own), "/dev/zero"]}}))
    assert "contamination" in failing(path)
    own.write_text("another\n")
    assert "other bytes" in str(validate(path).gates["contamination"].reason)
    own.unlink()
    assert validate(path).gates["contamination"].reason == "give --eval-set eval.jsonl"


def test_unusual_answers_are_reported_and_never_fail(path: Path) -> None:
    edit_lines(path, lambda v: _turn(v, 5, content="Да, сегодня идёт дождь, возьмите зонт. " * 400))
    report = validate(path)
    assert report.gates["outliers"].status == "pass" and report.gates["outliers"].observed == 2
    assert {f.what.split(" ")[0] for f in report.findings} == {"an", "answers"} and failing(path) == []


PII = {
    "e-mail address": "ann.lee@firm.org", "phone number": "+49 30 901820", "IBAN": "GB82 WEST 1234 5698 7654 32",
    "card number": "4111 1111 1111 1111", "social security number": "123-45-6789", "public IP address": "8.8.8.8",
}  # fmt: skip


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_is_reported_by_kind_and_place_and_never_echoed(path: Path, kind: str, capsys) -> None:
    edit_lines(path, lambda v: v[2].update(ground_truth=f"Write to {PII[kind]}, please."))
    assert main(["--in", str(path)]) == 0 and main(["--in", str(path), "--pii", "refuse"]) == 1
    printed = "".join(capsys.readouterr()) + (kd.sidecar(path) / "validation.json").read_text()
    assert kind in printed and "d.jsonl:3" in printed and PII[kind] not in printed
    assert validate(path, Options(pii="allow")).gates["personal_data"].status == "skipped"


@pytest.mark.parametrize(
    "text",
    ["ann@example.com", "x@host.test", "(212) 555-0123", "GB82 WEST 1234 5698 7654 33", "4111 1111 1111 1112",
     "666-45-6789", "10.1.2.3 and 127.0.0.1", "2024-01-15 12:30:45", "1.2.3.4.5", "7 + 12 = 19",
     "1234567890123456789012"],
)  # fmt: skip
def test_numbers_that_only_look_personal_are_not(text: str) -> None:
    assert personal_in(text) == {}


SAMPLES = {
    "API key": "sk-proj-abcdefghijklmn0pqrstu", "Stripe key": "sk_live_abcdefghijklmnop",
    "AWS key id": "AKIAABCDEFGHIJKLMNOP", "GitHub token": "ghp_" + "a1" * 18, "GitLab token": "glpat-" + "a1" * 10,
    "Hugging Face token": "hf_" + "aB" * 17, "Slack token": "xoxb-123456789012", "Google API key": "AIza" + "a" * 35,
    "npm token": "npm_" + "a1" * 18, "PyPI token": "pypi-" + "Ag" * 30, "SendGrid key": f"SG.{'a' * 22}.{'b' * 43}",
    "Telegram token": "123456789:AA" + "b" * 33, "JSON web token": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeK",
    "private key": "-----BEGIN RSA PRIVATE KEY-----", "bearer token": "Bearer abcdefghijklmnopqrstuvwx1",
    "password in a URL": "postgres://ann:hunter2@db.local/x",
    "AWS secret key": "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzKLMNOPQR",
    "password": "password: hunter2xyz", "assigned key": "client_secret='a8f5f167f44f4964e6c998de'",
}  # fmt: skip


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_reported_by_kind_and_place_and_never_echoed(path: Path, kind: str, capsys) -> None:
    edit_lines(path, lambda v: v[2].update(ground_truth=f"it is {SAMPLES[kind]}."))
    assert main(["--in", str(path)]) == 1
    printed = "".join(capsys.readouterr()) + (kd.sidecar(path) / "validation.json").read_text()
    assert kind in printed and "d.jsonl:3" in printed and SAMPLES[kind] not in printed


@pytest.mark.parametrize(
    "hidden", ['{{"note": "line\\n{}"}}', '{{"token": "{}"}}', "see\t{}", "<a href='{}'>", "key={}", "«{}»"]
)  # fmt: skip
def test_a_secret_is_found_wherever_it_stands(hidden: str) -> None:
    assert secret_in(hidden.format(SAMPLES["API key"])) == "API key"


@pytest.mark.parametrize(
    "text",
    ['{"password": "hunter2xyz"}', '{\\"password\\": \\"hunter2xyz\\"}', "PASSWORD = 'S3cure!pass'",
     "**Password:** hunter2xyz",
     "my password is: hunter2xyz", "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "pwd=Zx9kLm2q",
     "api_key = 9f8e7d6c5b4a39281706f5e4"],
)  # fmt: skip
def test_what_is_assigned_to_a_password_is_a_secret(text: str) -> None:
    assert secret_in(text) is not None


@pytest.mark.parametrize(
    "text",
    ["password: str", "password=None", "the password: it must be long", "password=password1", "password: bcrypt12",
     "password = get_password_v2()", "def login(user: str, password: str = 'changeme') -> None", "token: int64",
     "password=user.password1", "password: your_password123", "password: ${DB_PASS1}", "if password1 != password2:",
     "password=<your-password-1>", "api_key=YOUR_API_KEY_HERE_1", "api_key = os.getenv('API_KEY_1234567890')",
     "secret_key = settings.SECRET_KEY_1234567", "Password: 8-16 characters", "PWD=/home/user1/project",
     "password_hash = hash_password2(pw)", "secret: sha256"],
)  # fmt: skip
def test_prose_and_code_about_passwords_hold_none(text: str) -> None:
    assert secret_in(text) is None


@pytest.mark.parametrize(
    "text", ["risk-averse-people-are-everywhere-1", "https://a.org:80/x@b", "Bearer of the good news today"]
)
def test_what_only_looks_like_a_secret_is_none(text: str) -> None:
    assert secret_in(text) is None


def test_a_secret_in_a_field_that_breaks_the_schema_is_not_echoed(path: Path, capsys) -> None:
    edit_lines(path, lambda v: v[2]["messages"][0].update(role=SAMPLES["API key"]))
    assert main(["--in", str(path)]) == 1
    printed = "".join(capsys.readouterr()) + (kd.sidecar(path) / "validation.json").read_text()
    assert "d.jsonl:3" in printed and SAMPLES["API key"] not in printed


def test_a_key_of_this_environment_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "plain-looking-key")
    edit_lines(path, lambda v: v[2].update(ground_truth="plain-looking-key"))
    assert failing(path) == ["secrets"]


@pytest.mark.parametrize("number", ["9" * 30, "9" * 400, "[" * 900 + "]" * 900, "[" * 300 + "]" * 300, "1e400"])
def test_values_that_cannot_be_written_again_are_named_by_line_and_no_crash(path: Path, number: str, capsys) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"limit":2', b'"limit":' + number.encode(), 1)
    path.write_bytes(b"".join(lines))
    assert main(["--in", str(path)]) in (1, 2)
    assert "d.jsonl:2" in "".join(capsys.readouterr())


def test_a_clean_dataset_passes_every_rule(path: Path, capsys) -> None:
    assert main(["--in", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "24 records (19 train, 5 val)" in printed and "MB/s" in printed
    report = json.loads((kd.sidecar(path) / "validation.json").read_text())
    skipped = {name for name, gate in report["gates"].items() if gate["status"] != "pass"}
    assert report["findings"] == [] and skipped == {"contamination", "costs", "journal", "order"}


@pytest.mark.parametrize(
    "broken",
    [b'{"id": nonsense}\n', b"\n", b'{"id": "x"', b"\xff\xfe\n", b'{"id": "\\ud800"}\n',
     b'{"id": %s}\n' % (b"9" * 10**6),
     b"[" * 10**5 + b"\n", b'"' + b"a" * 5000 + b'"\n'],
)  # fmt: skip
def test_a_broken_line_is_a_finding_of_its_own_and_the_check_goes_on(path: Path, broken: bytes, monkeypatch) -> None:
    monkeypatch.setattr("distill.data.rules.block.BLOCK", 3000)  # a line is longer than what is read at once
    monkeypatch.setattr(kd, "MAX_LINE", 100_000)
    edit_lines(path, lambda v: v[5].update(run_id="x"))
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + broken + (rest if broken.endswith(b"\n") else b"\n" + rest))
    report = validate(path)
    places = {(finding.rule, finding.place) for finding in report.findings}
    assert ("schema", "d.jsonl:2") in places and ("run_id", "d.jsonl:7") in places
    assert report.counts["records"] == 24 and main(["--in", str(path)]) == 1


def test_a_line_that_is_cut_off_at_the_end_is_a_finding(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])
    report = validate(path)
    assert ("schema", "d.jsonl:24", "the line is cut off") in report.findings and report.counts["records"] == 23


def test_findings_exit_1_and_where_nothing_can_be_checked_exit_2(path: Path, tmp_path: Path, capsys) -> None:
    edit_lines(path, lambda v: v[1].update(id=v[0]["id"]))
    assert main(["--in", str(path)]) == 1
    assert "d.jsonl:2" in capsys.readouterr().out
    assert main(["--in", str(tmp_path / "none.jsonl")]) == 2
    (kd.sidecar(path) / "header.json").write_text("{}")
    assert main(["--in", str(path)]) == 2


def test_structural_rules_skip_the_others_by_name(path: Path, capsys) -> None:
    assert main(["--in", str(path), "--rules", "structural"]) == 0
    gates = validate(path, Options("structural")).gates
    skipped = {name for name, gate in gates.items() if gate.reason == "--rules structural"}
    assert skipped | {"journal"} == {name for name, rule in RULES.items() if not rule.structural} | {"order"}


def test_several_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over blocks that end within a record, with findings in each."""
    path = tmp_path / "d.jsonl"
    write_set(path, 40, logprobs=False)
    monkeypatch.setattr("distill.data.rules.block.BLOCK", 7000)
    assert path.stat().st_size > 20 * 7000

    def spoil(lines: Lines) -> None:
        lines[3].update(id=lines[35]["id"], split=lines[35]["split"])
        for index in (5, 38):
            lines[index]["render"]["n_bytes"] += 1

    edit_lines(path, spoil)
    one, two = validate(path), validate(path, Options(jobs=2))
    assert one == two and {f.place for f in one.findings} >= {"d.jsonl:6", "d.jsonl:39", "d.jsonl:36"}


@pytest.mark.parametrize("kind", toy.KINDS)
def test_toy_sets_keep_every_rule(tmp_path: Path, kind: str) -> None:
    toy.write(tmp_path / "d.jsonl", kind, 16)
    report = validate(tmp_path / "d.jsonl")
    assert report.findings == [] and {gate.status for gate in report.gates.values()} == {"pass", "skipped"}


def test_text_only_sets_skip_the_rule_of_distributions(tmp_path: Path) -> None:
    write_set(tmp_path / "d.jsonl", logprobs=False)
    report = validate(tmp_path / "d.jsonl")
    assert report.findings == [] and report.gates["distributions"].reason == "a text-only dataset"


def test_wc_and_jq_read_the_file(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) == path.read_bytes().count(b"\n") == 24
    values = [json.loads(line) for line in lines]
    expected = [length for value in values for length in (len(value["prompt"]), len(value["teacher_text"]))]
    if jq := shutil.which("jq"):
        out = subprocess.run(
            [jq, ".prompt, .teacher_text | length", str(path)], capture_output=True, text=True, check=True
        )
        assert list(map(int, out.stdout.split())) == expected
    assert min(expected) > 0


def test_the_table_holds_every_rule_of_a_record() -> None:
    assert set(RULES) <= set(TABLE)


def test_validating_loads_no_torch(path: Path) -> None:
    code = f"import sys, distill.data.validate as v; v.validate({str(path)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_episode_is_what_the_rules_are_about() -> None:
    """That the sets above have what the faults are planted in."""
    record = episode(1)
    assert {target.kind for target in record.targets} == {"reasoning", "content", "tool_call", "tool_name", "tool_args",
                                                          "integration", "final"}  # fmt: skip
    assert np.all([turn.finish_reason for turn in record.messages if turn.origin == "teacher"])
