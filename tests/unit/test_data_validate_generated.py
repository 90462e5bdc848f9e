"""A generated set with its journal: whatever is altered in it, some rule notices."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distill import chat
from distill.data import mix
from distill.data import records as kd
from distill.data.budget import Prices
from distill.data.build import STOPPED
from distill.data.journal import JOURNAL
from distill.data.mix_config import MixConfig
from distill.data.prompts.strata import make_prompt
from distill.data.rules.files import STORE
from distill.data.schema import Licence, run_id_of
from distill.data.store.store import TopK, Writer
from distill.data.validate import Finding, main, validate
from distill.draw import Draw
from distill.errors import DatasetError
from distill.schema_values import value_of
from distill.tokenizer import toy_tokenizer
from tests.unit.kd_sets import edit_header, edit_lines, reseal, reseal_files, retell
from tests.unit.stub_teacher import StubTeacher

Lines = list[dict[str, Any]]
MIX = MixConfig(
    attempts=2, timeout_s=5, concurrency=4, strata={"explain": 1.0, "arithmetic": 1.0, "tool_single": 2.0},
    prices=Prices(0.5, 1.5), reasoning="learn", licence=Licence(reasoning_allowed=True),
)  # fmt: skip
TOTAL = 16
LONG = '{"id": ' + "9" * 10**6 + "}\n"
KEY = "sk-abcdEFGH1234567890abcdXYZ99"


def _answer(body: dict[str, Any]) -> dict[str, Any]:
    """A valid call where tools are offered and none was made, else some words; now and then one that is cut off."""
    draw = Draw(json.dumps(body["messages"]))
    message: dict[str, Any] = {"content": f"It is {draw.between(100, 999)}.", "reasoning_content": "Let me think."}
    finish = "length" if draw.chance(0.2) else "stop"
    if body.get("tools") and body["messages"][-1]["role"] != "tool":
        function = body["tools"][0]["function"]
        arguments = json.dumps(value_of(function["parameters"], draw, {}), separators=(",", ":"))
        call = {"id": "a1", "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        message, finish = {"content": "One moment.", "reasoning_content": "A tool.", "tool_calls": [call]}, "tool_calls"
    usage = {"prompt_tokens": draw.between(9, 99), "completion_tokens": 5}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage, "model": "stub-1b"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kd") / "d.jsonl"
    with StubTeacher(answer=_answer) as stub:
        mix.make(path, stub.url, TOTAL, MIX, quiet=True)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    shutil.copy(made, tmp_path / "d.jsonl")
    shutil.copytree(kd.sidecar(made), tmp_path / "d.jsonl.d")
    return tmp_path / "d.jsonl"


def failing(path: Path) -> set[str]:
    return {name for name, gate in validate(path).gates.items() if gate.status == "fail"}


def with_calls(lines: Lines) -> dict[str, Any]:
    return next(line for line in lines if any("tool_calls" in turn for turn in line["messages"]))


def calling(lines: Lines) -> dict[str, Any]:
    """A turn that calls a tool: one of the middle."""
    return next(turn for turn in with_calls(lines)["messages"] if "tool_calls" in turn)


def without(lines: Lines) -> dict[str, Any]:
    return next(line for line in lines if not any("tool_calls" in turn for turn in line["messages"]))


def test_a_generated_set_keeps_every_rule_and_journal_and_order_are_checked(path: Path) -> None:
    before = sorted(file.name for file in kd.sidecar(path).iterdir())
    report = validate(path)
    assert report.findings == [] and report.counts["records"] == TOTAL
    assert {name for name, gate in report.gates.items() if gate.status != "pass"} == {"contamination", "distributions"}
    assert sorted(file.name for file in kd.sidecar(path).iterdir()) == before  # reading a journal leaves nothing


def test_without_its_journal_what_it_would_show_is_skipped_and_said_so(path: Path) -> None:
    (kd.sidecar(path) / JOURNAL).unlink()
    gates = validate(path).gates
    assert {name for name, gate in gates.items() if gate.status == "fail"} == set()
    assert gates["journal"].status == gates["costs"].status == "skipped"
    assert "journal.sqlite" in str(gates["journal"].reason)


# record by record


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every plain value, and of every list and object."""
    if at:
        yield at
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(item, (*at, key))


def altered(value: Any) -> Any:
    """Something else of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        others = {"train": "val", "val": "train", "any": "no_call", "call": "any", "dataset": "teacher",
                  "stop": "tool_calls", "tool_calls": "stop", "teacher": "dataset", "broker": "dataset",
                  "user": "system"}  # fmt: skip
        return others.get(value, value + "x")
    if isinstance(value, int | float | Decimal):
        return value + 1
    return value[:-1] or ["x"] if isinstance(value, list) else dict(list(value.items())[:-1]) or {"x": "x"}


def alter(value: Any, at: tuple[Any, ...]) -> None:
    for key in at[:-1]:
        value = value[key]
    value[at[-1]] = "x" if value[at[-1]] is None else altered(value[at[-1]])


@pytest.mark.parametrize("journal", [True, False])
def test_no_value_of_a_record_can_be_altered_unseen(path: Path, journal: bool) -> None:
    """Each line of the set is altered in another place, and each must be named; until all places were tried."""
    if not journal:
        (kd.sidecar(path) / JOURNAL).unlink()
    lines = [json.loads(line, parse_float=Decimal) for line in path.read_text().splitlines()]
    samples = [with_calls(lines), without(lines)]
    todo = [(lines.index(sample), at) for sample in samples for at in leaves(sample)]
    unseen: list[tuple[Any, ...]] = []
    while todo:
        now, todo = todo[:TOTAL], todo[TOTAL:]
        changed = []
        for index, at in now:
            changed.append(copy.deepcopy(lines[index]))
            alter(changed[-1], at)
        path.write_bytes(b"".join(msgspec.json.Encoder(decimal_format="number").encode(v) + b"\n" for v in changed))
        named = {finding.place for finding in validate(path).findings if not _of_copies(finding)}
        unseen += [at for number, (_, at) in enumerate(now, 1) if f"d.jsonl:{number}" not in named]
    assert unseen == []


def _of_copies(finding: Finding) -> bool:
    """What is found because a record stands there many times."""
    return finding.rule in ("duplicates", "near_duplicates", "order") or "its id is that of line" in finding.what


def test_no_value_of_the_header_can_be_altered_unseen(path: Path) -> None:
    file = kd.sidecar(path) / "header.json"
    header = json.loads(file.read_text(), parse_float=Decimal)
    unseen = []
    for at in leaves(header):
        changed = copy.deepcopy(header)
        alter(changed, at)
        file.write_bytes(msgspec.json.Encoder(decimal_format="number").encode(changed))
        try:
            if not failing(path):
                unseen.append(at)
        except DatasetError:
            continue  # no header any more
    assert unseen == []


# altered, and made consistent again


def _rejects(path: Path, change: Callable[[Lines], Any]) -> None:
    file = kd.sidecar(path) / "rejects.jsonl"
    rows = [json.loads(line, parse_float=Decimal) for line in file.read_text().splitlines()]
    change(rows)
    file.write_bytes(b"".join(msgspec.json.Encoder(decimal_format="number").encode(row) + b"\n" for row in rows))
    reseal(path)


def _text(path: Path, name: str, text: str) -> None:
    (kd.sidecar(path) / name).write_text(text)
    reseal_files(path)


def _mix(path: Path, **change: Any) -> None:
    """Another configuration, under a run_id that fits it."""
    edit_header(path, lambda header: header["config"].update(change))
    run_id = run_id_of(kd.read_header(path))
    edit_header(path, lambda header: header.update(run_id=run_id))
    edit_lines(path, lambda lines: [line.update(run_id=run_id) for line in lines])


def _header(**change: Any) -> Callable[[Path], None]:
    return lambda path: edit_header(path, lambda header: header.update(change))


def _lines(change: Callable[[Lines], Any]) -> Callable[[Path], None]:
    return lambda path: edit_lines(path, change)


def _named_anew(lines: Lines) -> None:
    """Another question, and the id that is its hash."""
    line = without(lines)
    said = [chat.Message(turn["role"], turn["content"]) for turn in line["messages"][:-1]]
    said[-1] = chat.Message("user", "What else?")
    line["messages"][-2]["content"] = "What else?"
    for n in range(99):  # of the same split
        prompt = make_prompt(line["stratum"], said, ground_truth=str(n))
        if kd.split_of(prompt.id) == line["split"]:
            break
    line |= {"id": prompt.id, "ground_truth": str(n)}
    retell(line)


def _said_anew(lines: Lines) -> None:
    calling(lines)["content"] = "Something else."
    retell(with_calls(lines))


def _paid_half(path: Path) -> None:
    """Every price and cost halved."""
    prices = {"input": 0.25, "output": 0.75, "cached_input": None}
    _mix(path, prices=prices)
    edit_lines(path, lambda lines: [line.update(cost_usd=line["cost_usd"] / 2) for line in lines])
    _rejects(path, lambda rows: [row.update(cost_usd=row["cost_usd"] / 2) for row in rows])
    report = kd.sidecar(path) / "report.json"
    value = json.loads(report.read_text(), parse_float=Decimal)
    half = value["cost_usd"] / 2
    report.write_bytes(msgspec.json.Encoder(decimal_format="number").encode(value | {"cost_usd": half}))
    edit_header(path, lambda header: header.update(cost_usd=half))
    reseal(path)


def _forget_answer(path: Path) -> None:
    key = json.loads(path.read_text().splitlines()[0])["provenance"]["request_sha256"][0]
    _ledger(path, f"DELETE FROM answer WHERE key = x'{key}'")


def _ledger(path: Path, sql: str) -> None:
    with sqlite3.connect(kd.sidecar(path) / JOURNAL) as db:
        db.execute(sql)


def _answered_anew(lines: Lines) -> None:
    with_calls(lines)["provenance"]["response_sha256"][0] = "a" * 64


_REJECT_PAID = """UPDATE attempt SET cost = 0, prompt = 0, completion = 0 WHERE id IN (SELECT a.attempt FROM answer a
WHERE instr(CAST(a.body AS TEXT), '"length"'))"""


def _report(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    report = json.loads((kd.sidecar(path) / "report.json").read_text(), parse_float=Decimal)
    change(report)
    _text(path, "report.json", msgspec.json.Encoder(decimal_format="number").encode(report).decode())


def _extra(path: Path) -> None:
    edit_header(path, lambda header: header["files"].update({"extra.bin": "0" * 64}))
    _text(path, "extra.bin", "hello")


def _unpaid(path: Path, *names: str) -> None:
    """A record without them, and a header that sums up."""
    edit_lines(path, lambda lines: [lines[0].pop(name) for name in names])
    parts = [*path.read_text().splitlines(), *(kd.sidecar(path) / "rejects.jsonl").read_text().splitlines()]
    cost = sum((json.loads(part, parse_float=Decimal).get("cost_usd", 0) for part in parts), Decimal())
    edit_header(path, lambda header: header.update(cost_usd=cost))


def _else(reject: dict[str, Any]) -> str:
    return "explain" if reject["stratum"] != "explain" else "arithmetic"


def _licensed(path: Path) -> None:
    licence = {"teacher_terms_url": "https://x", "accepted_by": "me", "reasoning_allowed": True}
    edit_header(path, lambda header: header.update(licence=licence))
    _mix(path, licence=licence)


def _toy(path: Path) -> None:
    (kd.sidecar(path) / JOURNAL).unlink()
    edit_header(path, lambda header: header["teacher"].update(kind="toy"))
    _mix(path)


def _huge(path: Path) -> None:
    edit_header(path, lambda header: header["quotas"].update(explain=10**18))
    _mix(path, total=10**18 + 12)


def _header_text(path: Path, old: str, new: str) -> None:
    file = kd.sidecar(path) / "header.json"
    file.write_text(file.read_text().replace(old, new, 1))


def _raw(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))
    reseal_files(path)


def _accepted(path: Path) -> None:
    """The id of a record is that of a reject, too."""
    identity = kd.Dataset.open(path)[0].id
    _rejects(path, lambda rows: rows[0].update(id=identity))


FAULTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "record left out": ("order", _lines(lambda v: v.pop(3))),
    "records in another order": ("order", _lines(lambda v: v.reverse())),
    "ids exchanged": ("ids", _lines(lambda v: _exchange(v, "id"))),
    "strata exchanged": ("ids", _lines(lambda v: (v[0].update(stratum="explain"), v[1].update(stratum="arithmetic")))),
    "prompt of no mix": ("order", _lines(_named_anew)),
    "middle turn altered, its hashes too": ("journal", _lines(_said_anew)),
    "middle answer's hash": ("journal", _lines(_answered_anew)),
    "costs exchanged": ("costs", _lines(lambda v: _exchange(v, "cost_usd"))),
    "usage and cost exchanged": ("journal", _lines(lambda v: (_exchange(v, "cost_usd"), _exchange(v, "usage")))),
    "half the price": ("costs", _paid_half),
    "seed of another": ("journal", lambda path: _mix(path, seed=7)),
    "split by another share": ("split", lambda path: _mix(path, val_share=0.5)),
    "answer damaged": ("journal", lambda path: _ledger(path, "UPDATE answer SET body = x'00'")),
    "answer gone": ("journal", lambda path: _forget_answer(path)),
    "attempt gone": ("journal", lambda path: _ledger(path, "DELETE FROM attempt WHERE purpose = 'answer'")),
    "attempt released": ("journal", lambda path: _ledger(path, "UPDATE attempt SET state = 'released' WHERE id > 5")),
    "table of another": ("journal", lambda path: _ledger(path, "CREATE TABLE mine(x)")),
    "config empty": ("header", _header(config={})),
    "sampling empty": ("header", _header(sampling={})),
    "capabilities empty": ("header", _header(capabilities={})),
    "quotas empty": ("header", _header(quotas={})),
    "tools of another": ("header", _header(tools_sha256="0" * 64)),
    "tools unsaid": ("header", _header(tools_sha256=None)),
    "evaluation sets unsaid": ("header", _header(decontamination={"x": "0" * 64})),
    "tolerance of another": ("header", _header(quota_tolerance=1.0)),
    "secret in the configuration": ("secrets", lambda path: edit_header(path, lambda h: h["config"].update(api=KEY))),
    "secret twice in the header": ("secrets", lambda path: _twice(path)),
    "reject that is a record": ("ids", _accepted),
    "reject given twice": ("rejects", lambda path: _rejects(path, lambda r: r.append(r[0]))),
    "reject left out": ("order", lambda path: _rejects(path, lambda r: r.pop())),
    "reject for another reason": ("order", lambda path: _rejects(path, lambda r: r[0].update(reason="schema"))),
    "reject of no stratum": ("rejects", lambda path: _rejects(path, lambda r: r[0].update(stratum="x"))),
    "reject with more": ("rejects", lambda path: _rejects(path, lambda r: r[0].update(extra=1))),
    "secret in a reject": ("secrets", lambda path: _rejects(path, lambda r: r[0].update(detail=KEY))),
    "blank line among rejects": ("rejects", lambda path: _text(path, "rejects.jsonl", "\n\n")),
    "number without end in a reject": ("rejects", lambda path: _text(path, "rejects.jsonl", LONG)),
    "report that is none": ("header", lambda path: _text(path, "report.json", "{{{")),
    "report of another": ("header", lambda path: _text(path, "report.json", '{"run_id": "x"}')),
    "secret in the report": ("secrets", lambda path: _text(path, "report.json", json.dumps({"x": KEY}))),
    "secret in the page": ("secrets", lambda path: _text(path, "report.html", f"<p>{KEY}</p>")),
    "page of another": ("header", lambda path: _text(path, "report.html", "<html>all is well</html>")),
    "file of no dataset": ("files", lambda path: _extra(path)),
    "length in a report": ("header", lambda path: _report(path, lambda r: r["lengths"]["answer_tokens"].update(max=1))),
    "usage in the report": ("header", lambda path: _report(path, lambda r: r["usage"]["prompt"].update(sum=1))),
    "tool turns in the report": ("header", lambda path: _report(path, lambda r: r.update(tool_turns={"0": TOTAL}))),
    "cost a record in the report": ("header", lambda path: _report(path, lambda r: r.update(cost_usd_per_record=1e-9))),
    "distributions in the report": ("header", lambda path: _report(path, lambda r: r.update(distributions={"k": 9}))),
    "more in the report": ("header", lambda path: _report(path, lambda r: r.update(verified=True))),
    "quota in the report": ("header", lambda path: _report(path, lambda r: r["strata"]["explain"].update(quota=99))),
    "rejects in the report": ("header", lambda path: _report(path, lambda r: r["strata"]["explain"].pop("rejected"))),
    "strata left out in the report": ("order", lambda path: _report(path, lambda r: r.update(left_out={"x": "why"}))),
    "prompts dropped, it says": ("order", lambda path: _report(path, lambda r: r.update(prompts_dropped={"x": 1}))),
    "cost of a record gone": ("costs", lambda path: _unpaid(path, "cost_usd")),
    "cost and usage of a record gone": ("costs", lambda path: _unpaid(path, "cost_usd", "usage")),
    "usage of a record gone": ("costs", lambda path: _unpaid(path, "usage")),
    "costs of the rejects gone": ("costs", lambda path: _rejects(path, lambda rows: [r.pop("cost_usd") for r in rows])),
    "reject paid with nothing": ("order", lambda path: _ledger(path, _REJECT_PAID)),
    "reject of another stratum": ("rejects", lambda path: _rejects(path, lambda r: r[0].update(stratum=_else(r[0])))),
    "licence of another": ("journal", lambda path: _licensed(path)),
    "a toy set, it says": ("header", lambda path: _toy(path)),
    "more counts": ("header", lambda path: edit_header(path, lambda h: h["counts"].update(verified=9))),
    "key twice in the header": ("header", lambda path: _header_text(path, "{", '{"run_id": "x",')),
    "key twice in a record": ("schema", lambda path: _raw(path, b'"prompt":', b'"prompt":"Hello","prompt":')),
    "key twice in a call": ("schema", lambda path: _raw(path, b'"arguments":{', b'"arguments":{"x":1,"x":2,')),
    "lines of another system": ("schema", lambda path: _raw(path, b"\n", b"\r\n")),
    "a total beyond all": ("header", lambda path: _huge(path)),
    "documents without end": ("header", lambda path: _mix(path, long_context_tokens=900_000)),
    "report unlisted": ("files", lambda path: edit_header(path, lambda h: h["files"].pop("report.json"))),
}  # fmt: skip


def _exchange(lines: Lines, name: str) -> None:
    """Between the first record and one of the same split that has another value."""
    other = next(v for v in lines[1:] if v["split"] == lines[0]["split"] and v[name] != lines[0][name])
    lines[0][name], other[name] = other[name], lines[0][name]


def _twice(path: Path) -> None:
    _header_text(path, "{", '{"run_id": "' + KEY + '",')


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_rule_though_hashes_and_counts_were_made_again(path: Path, fault: str) -> None:
    rule, plant = FAULTS[fault]
    plant(path)
    report = validate(path)
    assert rule in {name for name, gate in report.gates.items() if gate.status == "fail"}
    assert KEY not in str(report)


def test_what_follows_from_broken_side_files_is_exit_code_1(path: Path) -> None:
    _text(path, "rejects.jsonl", "\n")
    assert main(["--in", str(path)]) == 1


def test_a_set_that_other_code_made_has_an_order_that_nobody_knows(path: Path) -> None:
    edit_lines(path, _named_anew)
    edit_header(path, lambda header: header["created_by"].update(code="older"))
    gate = validate(path).gates["order"]
    assert gate.status == "skipped" and "other code" in str(gate.reason)


@pytest.mark.parametrize("stopped", [False, True])
def test_without_a_journal_a_prompt_that_was_asked_and_is_nowhere_is_found_unless_the_run_stopped(
    path: Path, *, stopped: bool
) -> None:
    (kd.sidecar(path) / JOURNAL).unlink()
    edit_header(path, lambda header: header.update(quota_tolerance=0.5))
    _mix(path, quota_tolerance=0.5)
    edit_lines(path, lambda lines: lines.pop(3))
    name = next(name for name, n in kd.read_header(path).quotas.items() if n != _counted(path)[name])
    _report(path, lambda report: report["strata"][name].update(short=STOPPED if stopped else "its prompts are used up"))
    gate = validate(path).gates["order"]
    assert gate.status == ("pass" if stopped else "fail")
    assert stopped or f"stratum {name}: a prompt that" in str(gate.reason)


def test_without_a_journal_a_reject_that_was_left_out_is_found(path: Path) -> None:
    (kd.sidecar(path) / JOURNAL).unlink()
    _rejects(path, lambda rows: rows.pop(0))
    assert "no reject" in str(validate(path).gates["order"].reason)


def _counted(path: Path) -> Counter[str]:
    return Counter(json.loads(line)["stratum"] for line in path.read_text().splitlines())


def test_what_a_hostile_header_asks_for_is_bounded(path: Path) -> None:
    for plant in (_huge, lambda path: _mix(path, total=TOTAL, long_context_tokens=900_000)):
        plant(path)
        began = time.process_time()
        assert "header" in failing(path) and time.process_time() - began < 5


def _rated(body: dict[str, Any]) -> dict[str, Any]:
    """A fixed answer with the log-probabilities of its tokens, which are the student's."""
    tokenizer = toy_tokenizer()
    said = [tokenizer.decode([token]) for token in tokenizer.encode("It is 4.")]
    content = [
        {"token": text, "bytes": list(text.encode()), "logprob": -0.1,
         "top_logprobs": [{"token": text, "bytes": list(text.encode()), "logprob": -0.1},
                          {"token": "b", "bytes": [98], "logprob": -3.0}]}
        for text in said
    ]  # fmt: skip
    choice = {"message": {"content": "".join(said)}, "finish_reason": "stop", "logprobs": {"content": content}}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 5}, "model": "stub-1b"}


@pytest.mark.parametrize("forged", [False, True])
def test_an_endpoints_distributions_are_those_of_the_journals_answers(tmp_path: Path, *, forged: bool) -> None:
    path, file = tmp_path / "d.jsonl", tmp_path / "tokenizer.json"
    file.write_text(toy_tokenizer().to_json())
    with StubTeacher(answer=_rated) as stub:
        config = MixConfig(strata={"arithmetic": 1.0}, tokenizer=str(file), top_k=2)
        mix.make(path, stub.url, 4, config, quiet=True)
    assert failing(path) == set()
    old = TopK(kd.sidecar(path) / STORE)
    writer = Writer(tmp_path, old.k, vocab_size=old.vocab_size, codec=old.codec)
    for item in old.take(range(len(old))):
        if forged:
            item.topk_logprobs[0] = [-0.3, -2.0]
            item.tail_logprob[0] = math.log(1 - math.exp(-0.3) - math.exp(-2.0))
        writer.add(item)
    writer.finish(old.path, {name: value for name, value in old.metadata.items() if not name.endswith("_crc32")})
    writer.close()
    reseal_files(path)
    found = [finding for finding in validate(path).findings if "the journal's answers" in finding.what]
    assert {finding.rule for finding in found} == ({"distributions"} if forged else set())
