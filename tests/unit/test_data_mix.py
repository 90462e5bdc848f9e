"""Generation end to end against a teacher on loopback: quotas, typed rejects, costs, clear refusals."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distill.config import load
from distill.data import mix
from distill.data.budget import Limits, Prices
from distill.data.mix_config import MixConfig
from distill.data.prompts.stream import STRATA
from distill.data.records import Dataset
from distill.data.teacher.spec import parse_spec
from distill.data.validate import main as validate_main
from distill.errors import ConfigError, DistillError, InputError, Paused
from tests.unit.stub_teacher import StubTeacher

FAST = MixConfig(attempts=3, timeout_s=5, concurrency=8, strata={"explain": 1.0, "arithmetic": 1.0, "list": 2.0})


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEACHER_API_KEY", "MOONSHOT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def _bytes(path: Path) -> dict[str, bytes]:
    files = [path, *sorted(Path(f"{path}.d").iterdir())]
    return {file.name: file.read_bytes() for file in files if not file.name.startswith("journal.sqlite")}


def test_a_dataset_has_its_quotas_typed_rejects_and_passes_validation(tmp_path: Path, capsys) -> None:
    priced = msgspec.structs.replace(FAST, prices=Prices(0.5, 1.5))
    with StubTeacher() as stub:
        made = mix.make(tmp_path / "kd.jsonl", stub.url, 40, priced, quiet=True)
    dataset = Dataset.open(tmp_path / "kd.jsonl")
    header = dataset.header
    assert made.short == {} and header.quotas == {"arithmetic": 10, "explain": 10, "list": 20}
    assert header.counts["records"] == len(dataset) == 40
    assert header.teacher.model == "stub-1" and header.logprobs is None and header.text_only
    first = dataset[0]
    assert first.reasoning and first.usage and first.usage.completion == 5 and first.teacher_text.startswith("Answer")
    assert all((record.ground_truth is not None) == (record.stratum == "arithmetic") for record in dataset)
    rejects = [json.loads(line) for line in (tmp_path / "kd.jsonl.d" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["reason"] for reject in rejects} == {"length", "empty"}
    report = json.loads((tmp_path / "kd.jsonl.d" / "report.json").read_text())
    assert report["cost_usd_per_record"] == pytest.approx(float(header.cost_usd or 0) / 40)
    page = (tmp_path / "kd.jsonl.d" / "report.html").read_text()
    assert all(f"<td>{reason}</td>" in page for reason in report["rejected"]) and header.files["report.html"]
    answers = 40 + len(rejects)
    assert header.cost_usd is not None and float(header.cost_usd) == pytest.approx(answers * (9 * 0.5 + 5 * 1.5) / 1e6)
    assert validate_main(["--in", str(tmp_path / "kd.jsonl")]) == 0, capsys.readouterr().out


def test_nothing_is_asked_twice_and_a_longer_run_keeps_the_answers_of_a_shorter_one(tmp_path: Path) -> None:
    with StubTeacher() as stub:
        mix.make(tmp_path / "kd.jsonl", stub.url, 10, FAST, quiet=True)
        before, asked = _bytes(tmp_path / "kd.jsonl"), sum(stub.asked.values())
        mix.make(tmp_path / "kd.jsonl", stub.url, 10, FAST, quiet=True)
        assert _bytes(tmp_path / "kd.jsonl") == before and sum(stub.asked.values()) == asked
        mix.make(tmp_path / "kd.jsonl", stub.url, 25, FAST, quiet=True)
        probed = [n for text, n in stub.asked.items() if "get_weather" in text]
        assert len(probed) == 1 and sum(stub.asked.values()) - probed[0] == len(stub.asked) - 1
        assert len(Dataset.open(tmp_path / "kd.jsonl")) == 25


def test_if_everything_is_rejected_no_dataset_appears(tmp_path: Path) -> None:
    value = {"choices": [{"message": {"content": "x<|im_end|>"}, "finish_reason": "stop"}]}
    with StubTeacher(answer=lambda body: value) as stub, pytest.raises(DistillError, match="tool_leak"):
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, FAST, quiet=True)
    assert not (tmp_path / "kd.jsonl").exists()


def test_a_stratum_that_is_short_says_why_and_what_helps(tmp_path: Path, capsys) -> None:
    def rambling(body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        said = {"message": {"role": "assistant", "content": "A word."}, "finish_reason": "stop"}
        return {"choices": [said | ({"finish_reason": "length"} if "long" in text else {})]}

    (tmp_path / "few.jsonl").write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    lines = [json.dumps({"prompt": f"A long question, number {n}, about {'abcdefgh'[n % 8]}?"}) for n in range(60)]
    (tmp_path / "rambling.jsonl").write_text("\n".join(lines) + "\n")
    mixed = tmp_path / "mix.yaml"
    files = [tmp_path / "few.jsonl", tmp_path / "rambling.jsonl"]
    mixed.write_text(json.dumps({"strata": {"list": 1.0}, "near_duplicates": 1.0, "timeout_s": 5,
                                 "sources": [{"path": str(path)} for path in files]}))  # fmt: skip
    args = ["--out", str(tmp_path / "kd.jsonl"), "--total", "15", "--config", str(mixed), "--teacher"]
    with StubTeacher(answer=rambling) as stub:
        assert mix.main([*args, stub.url]) == 1
    said = capsys.readouterr().out
    assert "stratum few is 0" not in said and "stratum list" not in said
    quota = Dataset.open(tmp_path / "kd.jsonl").header.quotas["rambling"]
    most = 2 * quota + 20
    assert (f"stratum rambling is {quota} short of its {quota}: too many answers were rejected, {most} of {most} "
            f"(length {most}); raise `max_tokens`") in said  # fmt: skip
    strata = json.loads((tmp_path / "kd.jsonl.d" / "report.json").read_text())["strata"]
    assert strata["rambling"]["short"] in said and strata["rambling"]["rejected"] == most
    assert "short" not in strata["list"]


def test_prompts_that_are_used_up_are_told_from_rejected_answers(tmp_path: Path, capsys) -> None:
    (tmp_path / "few.jsonl").write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    (tmp_path / "mix.yaml").write_text(
        json.dumps({"strata": {}, "timeout_s": 5, "sources": [{"path": str(tmp_path / "few.jsonl")}]})
    )
    args = ["--out", str(tmp_path / "kd.jsonl"), "--total", "5", "--config", str(tmp_path / "mix.yaml"), "--teacher"]
    answer = {"choices": [{"message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}]}
    with StubTeacher(answer=lambda body: answer) as stub:
        assert mix.main([*args, stub.url]) == 1
    assert "stratum few is 3 short of its 5: its 2 prompts are used up; give it less weight" in capsys.readouterr().out


@pytest.mark.parametrize(("share", "told"), [(0.0001, True), (0.0, False), (0.9, False)])
def test_a_set_without_anything_held_out_says_so_once(tmp_path: Path, capsys, share: float, told: bool) -> None:
    (tmp_path / "mix.yaml").write_text(json.dumps({"strata": {"arithmetic": 1.0}, "val_share": share, "timeout_s": 5}))
    args = ["--out", str(tmp_path / "kd.jsonl"), "--total", "6", "--config", str(tmp_path / "mix.yaml"), "--teacher"]
    with StubTeacher() as stub:
        assert mix.main([*args, stub.url]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("nothing is held out for validation") == told
    assert ("val_share 0.0001 of 6 records" in said) == told


@pytest.mark.parametrize(("status", "message"), [(401, "refuses"), (404, "refuses|no usable answer|plain answer")])
def test_a_teacher_that_refuses_is_an_input_error(tmp_path: Path, status: int, message: str) -> None:
    with StubTeacher(faults=[(status, {})] * 50) as stub, pytest.raises(InputError, match=message):
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, FAST, quiet=True)
    assert not (tmp_path / "kd.jsonl").exists()


def test_a_key_travels_in_the_header_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "tk-very-secret-1234")
    with StubTeacher() as stub:
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, FAST)
        assert {headers["Authorization"] for headers in stub.headers} == {"Bearer tk-very-secret-1234"}
        stub.faults = [(400, {})] * 50
        assert mix.main(["--out", str(tmp_path / "x.jsonl"), "--teacher", stub.url, "--total", "3"]) != 0
    assert "secret" not in "".join(capfd.readouterr())
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes(), file


def test_a_key_never_travels_unencrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "tk-very-secret-1234")
    with pytest.raises(InputError, match="unencrypted"):
        mix.make(tmp_path / "kd.jsonl", "http://teacher.example", 5, FAST, quiet=True)


@pytest.mark.parametrize("prefix", ["", "/v1", "/openai/v1"])
def test_v1_is_added_where_the_bare_url_does_not_answer(tmp_path: Path, prefix: str) -> None:
    with StubTeacher(prefix=prefix) as stub:
        url = stub.url + prefix.removesuffix("/v1")
        assert mix.make(tmp_path / "kd.jsonl", url, 3, FAST, quiet=True).header.counts["records"] == 3


def test_several_models_need_a_name(tmp_path: Path) -> None:
    with StubTeacher(models=("a", "b")) as stub:
        with pytest.raises(InputError, match="--model; it lists a, b"):
            mix.make(tmp_path / "kd.jsonl", stub.url, 3, FAST, quiet=True)
        named = msgspec.structs.replace(FAST, model="b")
        assert mix.make(tmp_path / "kd.jsonl", stub.url, 3, named, quiet=True).header.teacher.model == "b"
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


def test_a_server_that_counts_no_tokens_costs_what_was_reserved(tmp_path: Path) -> None:
    def silent(body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}]}

    limited = msgspec.structs.replace(FAST, budget=Limits(tokens=20_000), max_tokens=500)
    with StubTeacher(answer=silent) as stub, pytest.raises(Paused, match=r"the budget is used up: .* of 20,000 tokens"):
        mix.make(tmp_path / "kd.jsonl", stub.url, 100, limited, quiet=True)
    assert len(stub.bodies) * 500 < 20_000
    assert len(Dataset.open(tmp_path / "kd.jsonl")) > 0, "what the budget bought is there"


def test_a_budget_too_small_for_the_first_request_says_so(tmp_path: Path, capsys) -> None:
    with StubTeacher() as stub:
        args = ["--out", str(tmp_path / "kd.jsonl"), "--teacher", stub.url, "--total", "3", "--budget-tokens", "10"]
        assert mix.main(args) == Paused.exit_code and not stub.bodies
    assert "0 of 10 tokens are spent and a request may take" in capsys.readouterr().err


def test_ctrl_c_says_how_far_it_is_and_the_same_command_goes_on(tmp_path: Path, capsys) -> None:
    def interrupting(body: dict[str, Any]) -> dict[str, Any]:
        if len(stub.bodies) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return StubTeacher.default_answer(body)

    (tmp_path / "mix.yaml").write_text(json.dumps({"strata": {"explain": 1.0}, "concurrency": 1, "timeout_s": 5}))
    args = ["--out", str(tmp_path / "kd.jsonl"), "--total", "20", "--config", str(tmp_path / "mix.yaml"), "--teacher"]
    with StubTeacher(answer=interrupting) as stub:
        assert mix.main([*args, stub.url]) == Paused.exit_code
        said = capsys.readouterr().err
        assert re.search(r"paused: interrupted; .*; [1-9]\d? of 20 records are accepted, and the dataset is written at "
                         "the end", said), said  # fmt: skip
        assert not (tmp_path / "kd.jsonl").exists()
        assert mix.main([*args, stub.url]) == 0


def test_fork_is_explained_alike_wherever_it_is(tmp_path: Path, capsys) -> None:
    with StubTeacher() as stub:
        mix.make(tmp_path / "kd.jsonl", stub.url, 3, FAST, quiet=True)
        with pytest.raises(InputError) as refused:
            mix.make(tmp_path / "kd.jsonl", stub.url, 3, FAST, seed=1, quiet=True)
    with pytest.raises(SystemExit):
        mix.main(["--help"])
    for said in (str(refused.value), capsys.readouterr().out, Path("docs/data.md").read_text()):
        assert "everything is asked anew, what was asked before is kept and counts as spent" in " ".join(said.split())


def test_reasoning_is_learned_only_where_the_licence_allows_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reasoning_allowed"):
        MixConfig(reasoning="learn")
    allowed = msgspec.structs.replace(FAST.licence, reasoning_allowed=True)
    config = msgspec.structs.replace(FAST, reasoning="learn", licence=allowed)
    with StubTeacher() as stub:
        mix.make(tmp_path / "kd.jsonl", stub.url, 5, config, quiet=True)
    record = Dataset.open(tmp_path / "kd.jsonl")[0]
    assert record.messages[-1].reasoning == record.reasoning and record.targets[0].kind == "reasoning"


def test_a_dry_run_shows_the_mix_and_asks_nothing(tmp_path: Path, capsys) -> None:
    with StubTeacher() as stub:
        args = ["--out", str(tmp_path / "kd.jsonl"), "--teacher", stub.url, "--total", "100", "--dry-run"]
        assert mix.main(args) == 0 and not stub.bodies
    shown = capsys.readouterr().out
    assert "tool_chain" in shown and "long_context" in shown and not list(tmp_path.iterdir())


def test_the_shipped_mix_is_the_default_one() -> None:
    assert load("configs/kd_mix.yaml", MixConfig) == MixConfig()
    assert set(MixConfig().strata) == set(STRATA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_token: 3", "max_tokens"),
        ("budget: {usd: 5}", "budget.usd needs prices"),
        ("budget: {tokens: 0}", r"budget\.tokens must be above 0"),
        ("prices: {input: 1}", "output"),
        ("temperature: 3", "temperature"),
        ("rpm: 0", "rpm must be at least 1"),
        ("reasoning: think", "reasoning"),
        ("max_tokens: 'many'", r"mix\.yaml: max_tokens must be a whole number or null, not a string"),
        ("budget: [5]", r"mix\.yaml: budget must be a mapping, not a list"),
        ("sources: {path: x}", r"mix\.yaml: sources must be a list, not a mapping"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mix.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "mix.yaml", MixConfig)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tools": ["absent.json"]}, "tools: cannot read absent.json: No such file or directory (looked in {cwd})"),
        ({"fixtures": ["absent.jsonl"]},
         "fixtures: cannot read absent.jsonl: No such file or directory (looked in {cwd})"),
        ({"sources": [{"path": "absent.txt"}]},
         "sources: cannot read absent.txt: No such file or directory (looked in {cwd})"),
        ({"decontaminate": ["absent.txt"]},
         "decontaminate: cannot read absent.txt: No such file or directory (looked in {cwd})"),
        ({"tokenizer": "absent.json"}, "tokenizer: "),
        ({"strata": {"explian": 1.0}}, "strata: unknown stratum 'explian'; the nearest is 'explain'"),
        ({"strata": {"explain": 0.0}}, "strata: no positive weight, and no `sources`"),
    ],
)  # fmt: skip
def test_what_a_mix_names_wrongly_costs_no_attempt_and_leaves_no_journal(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mix.yaml").write_text(json.dumps(keys))
    with StubTeacher() as stub:
        args = ["--out", "kd.jsonl", "--total", "3", "--config", "mix.yaml", "--teacher", stub.url]
        assert mix.main(args) == 2 and not stub.bodies
    assert f"error: mix.yaml: {message.format(cwd=tmp_path)}" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mix.yaml"]


def test_an_unlisted_model_is_remarked_on_and_the_summary_names_model_and_host(tmp_path: Path, capsys) -> None:
    args = ["--out", str(tmp_path / "kd.jsonl"), "--total", "3", "--model", "other", "--teacher"]
    with StubTeacher() as stub:
        assert mix.main([*args, stub.url]) == 0
    said = capsys.readouterr()
    assert "the endpoint does not list --model other; it lists stub-1" in said.err
    assert "rejected) from other at 127.0.0.1; text only" in said.out


def test_specs_are_read(tmp_path: Path) -> None:
    assert parse_spec("https://api.example/v1/") == ("endpoint", "https://api.example/v1")
    assert parse_spec("hf:org/model") == ("hf", "org/model")
    assert parse_spec(str(tmp_path)) == ("hf", str(tmp_path))
    assert os.path.isabs(parse_spec(str(tmp_path)).target)
