"""Datasets of whole episodes (tools, reasoning, distributions, rejects, costs), and ways to spoil one in one place."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from distill import artifacts
from distill.broker import Broker, Tool
from distill.data import records as kd
from distill.data.episodes import reply_sha256
from distill.data.page import page
from distill.data.schema import Call, Licence, Provenance, Turn, Usage, tools_sha256
from distill.data.store.distributions import Distribution
from distill.data.store.store import EXACT, TopK, Writer
from distill.data.tally import Tally, stored_facts
from distill.data.targets import lay_out
from distill.data.teacher.wire import Reply
from distill.draw import Draw
from distill.errors import DatasetError
from distill.tokenizer import Tokenizer, toy_tokenizer

K = 6
_ENCODER = msgspec.json.Encoder(decimal_format="number")
SYLLABLES = re.findall("[a-z]+", "ba ce di fo gu ha ki lo mu na pe ri so tu va we xi yo za bre cla dro fle gri")
PLACES = ("Oslo", "Kyoto", "Lima", "São Paulo", "東京", "Nairobi")


def _function(name: str, what: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties)[:1],
        "additionalProperties": False,
    }
    return {"name": name, "description": what, "parameters": parameters}


def _weather(arguments: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
    return {"place": arguments["place"], "temperature": draw.between(-300, 400) / 10 + 0.01, "sky": "light rain"}


def _search(arguments: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
    return {"hits": [{"title": f"Paper {draw.between(100, 999)}", "id": f"doc-{draw.between(1000, 9999)}"}]}


ANY = {"type": "object"}
WEATHER = Tool(
    _function("get_weather", "The weather in a place.", place={"type": "string"}, unit={"enum": ["C", "F"]}),
    ANY, _weather,
)  # fmt: skip
SEARCH = Tool(
    _function("search", "Search the archive.", query={"type": "string"}, limit={"type": "integer", "minimum": 1}),
    ANY, _search,
)  # fmt: skip


def words(rng: random.Random, n: int) -> str:
    """`n` made-up words."""
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(n))


def identity_of(index: int) -> tuple[str, str]:
    """Stratum and id of an episode."""
    stratum = ("tools", "general")[index % 2]
    return stratum, f"{stratum}-{index:08d}"


def cost_of(index: int) -> Decimal:
    """What an episode cost."""
    return Decimal("0.000123") + index * Decimal("0.00000000001")


def episode(index: int, *, size: int = 20, tokenizer: Tokenizer | None = None, val_share: float = 0.25) -> kd.Record:
    """A question, two calls, their results, and an answer that takes them up; `size` words in each text."""
    rng = random.Random(index)
    broker = Broker([WEATHER, SEARCH])
    place, query = rng.choice(PLACES), words(rng, 3)
    calls = (
        Call("get_weather", {"place": place, "unit": "C"}, "call_0"),
        Call("search", {"query": query, "limit": 2}, "call_1"),
    )
    results = [broker.call(call, seed=index) for call in calls]
    weather, hit = json.loads(results[0].content), json.loads(results[1].content)["hits"][0]
    question = f"{words(rng, size).capitalize()}? And the weather in {place}?"
    answer = (
        f"It is {weather['temperature']} degrees with {weather['sky']} in {place}; see {hit['title']} ({hit['id']}). "
    )
    messages = (
        Turn("system", f"You are {words(rng, 3)}."),
        Turn("user", question),
        Turn("assistant", "Let me look.", calls, words(rng, size), origin="teacher", finish_reason="tool_calls"),
        *(Turn("tool", r.content, origin="broker", tool_call_id=c.id) for r, c in zip(results, calls, strict=True)),
        Turn("assistant", answer + words(rng, 2 * size), (), words(rng, size), origin="teacher", finish_reason="stop"),
    )
    tools = [tool.offer for tool in (WEATHER, SEARCH)]
    layout = lay_out(messages, tools, tokenizer)
    said = _said(messages[-1], messages[-1].reasoning)
    stratum, identity = identity_of(index)
    return kd.Record(
        id=identity, prompt=question, teacher_text=kd.turn_text(messages[-1]), ground_truth=None, messages=messages,
        tools=tools, run_id="", split=kd.split_of(identity, val_share), stratum=stratum,
        reasoning=messages[-1].reasoning, render=layout.rendered, targets=layout.targets,
        usage=Usage(400 + index, 100, 40), cost_usd=cost_of(index),
        provenance=Provenance(("0" * 64,) * 2, ("1" * 64, said), tuple(r.sha256 for r in results)),
    )  # fmt: skip


def distribution(record: kd.Record, tokenizer: Tokenizer) -> Distribution:
    """Invented distributions that favour the record's own tokens."""
    return invented(kd.completion_ids(record, tokenizer), tokenizer)


def invented(completion: list[int], tokenizer: Tokenizer) -> Distribution:
    """Distributions that favour the given tokens."""
    ids = np.array(completion, np.int32)
    kept = (ids[:, None] + np.arange(K, dtype=np.int32) * 7) % tokenizer.vocab_size
    shares = np.array([0.5, 0.2, 0.1, 0.05, 0.04, 0.01])
    logprobs = np.tile(np.log(shares).astype(np.float32), (len(ids), 1))
    return Distribution(ids, kept, logprobs, np.full(len(ids), np.log(1 - shares.sum()), np.float32))


def write_set(path: Path, n: int = 24, *, size: int = 20, logprobs: bool = True, **more: Any) -> kd.Header:
    """Write a sound dataset of `n` episodes; `more` are fields of its header."""
    tokenizer = toy_tokenizer()
    given: list[kd.Record] = []

    def records() -> Iterator[kd.Record]:
        for index in range(n):
            given[:] = [episode(index, size=size, tokenizer=tokenizer)]
            yield given[0]

    rejects = [
        {"id": "general-x", "stratum": "general", "reason": "length", "detail": "", "cost_usd": Decimal("0.001")}
    ]
    named = [identity_of(index) for index in range(n)]
    fields: dict[str, Any] = {
        "licence": Licence(reasoning_allowed=True), "quotas": dict(Counter(stratum for stratum, _ in named)),
        "cost_usd": sum(map(cost_of, range(n)), Decimal("0.001")),
    }  # fmt: skip
    info = kd.LogprobInfo(k=K, temperature=1.0, kind="raw", tail="logsumexp", codec="exact")
    header = kd.make_header(
        config={"val_share": 0.25}, sampling={"temperature": 0.7},
        teacher=kd.Teacher("toy", "invented", "invented", "invented" if logprobs else None),
        prompts_sha256=artifacts.sha256_text("\n".join(identity for _, identity in named)), tokenizer=tokenizer,
        logprobs=info if logprobs else None,
        **(fields | more),
    )  # fmt: skip
    stored = (distribution(given[0], tokenizer) for _ in range(n)) if logprobs else None
    return kd.write_dataset(path, records(), header, distributions=stored, tokenizer=tokenizer, rejects=rejects)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change header.json and nothing else."""
    file = kd.sidecar(path) / "header.json"
    value = json.loads(file.read_text(), parse_float=Decimal)
    change(value)
    file.write_bytes(_ENCODER.encode(value))


def reseal(path: Path) -> None:
    """Make what the header says of the files true again: hashes, counts, quotas. Costs stay."""

    folder = kd.sidecar(path)

    def change(header: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        splits = [line.get("split", "train") for line in lines]
        header["counts"] |= {"records": len(lines), "train": splits.count("train"), "val": splits.count("val")}
        header["counts"]["rejected"] = len((folder / "rejects.jsonl").read_text().splitlines())
        header["prompts_sha256"] = artifacts.sha256_text("\n".join(line["id"] for line in lines))
        offered = [tool for line in lines for tool in line.get("tools", [])]
        header["tools_sha256"] = tools_sha256(map(msgspec.json.encode, offered))
        strata = dict(Counter(line.get("stratum", "") for line in lines))
        if header["quotas"] and header["teacher"]["kind"] == "toy":
            header["quotas"] = strata
        _report(folder / "report.json", {
            "counts": header["counts"], "strata": {name: {"records": n} for name, n in strata.items()},
            "unaligned_logprobs": sum("logprobs" not in line for line in lines) if header["logprobs"] else 0,
        })  # fmt: skip

    edit_header(path, change)
    with contextlib.suppress(DatasetError):  # of what are no records, nothing is said
        _reseal_page(path)
    reseal_files(path)


def _reseal_page(path: Path) -> None:
    """Make what report.json and report.html say of the records true again."""
    file, header, tally = kd.sidecar(path) / "report.json", kd.read_header(path), Tally()
    for number, line in kd.read_lines(path):
        tally.add(kd.decode_record(line, path, number))
    stored = {}
    if header.logprobs is not None and (store := file.with_name("logprobs.safetensors")).is_file():
        size = store.stat().st_size
        stored = {"distributions": stored_facts(header.logprobs, header.counts["completion_tokens"], size)}
    _report(file, tally.facts() | stored | {"counts": header.counts})
    file.with_name("report.html").write_text(page(header, msgspec.json.decode(file.read_bytes()), tally.samples))


def reseal_files(path: Path) -> None:
    """Make the hashes of the files that the header lists true again."""

    def change(header: dict[str, Any]) -> None:
        for name in header["files"]:
            file = path if name == "records" else kd.sidecar(path) / name
            header["files"][name] = artifacts.sha256_file(file) if file.is_file() else header["files"][name]

    edit_header(path, change)


def _report(file: Path, facts: Mapping[str, Any]) -> None:
    """Make true what a report says of these."""
    report = json.loads(file.read_text(), parse_float=Decimal)
    report |= {name: value for name, value in facts.items() if name in report}
    file.write_bytes(_ENCODER.encode(report))


def restore(path: Path, records: list[dict[str, Any]]) -> None:
    """Give records that are marked, by `"logprobs": None`, distributions of their own in a new store."""
    file = kd.sidecar(path) / "logprobs.safetensors"
    if not file.is_file() or not any("logprobs" in record and record["logprobs"] is None for record in records):
        return
    old, tokenizer = TopK(file), toy_tokenizer()
    writer = Writer(path.parent, old.k, vocab_size=old.vocab_size, codec=EXACT)
    for record in records:
        if record.get("logprobs"):
            item = old[record["logprobs"]["row"]]
        else:
            layout = lay_out(msgspec.convert(record["messages"], list[Turn]), record.get("tools", []), tokenizer)
            item = invented(layout.completion or [], tokenizer)
        record["logprobs"] = {"row": writer.add(item), "n": len(item.token_ids), "k": old.k}
    writer.finish(file, {name: value for name, value in old.metadata.items() if not name.endswith("_crc32")})
    writer.close()
    edit_header(path, lambda header: header["counts"].update(completion_tokens=writer.tokens))


def edit_lines(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change records as plain JSON and reseal."""
    values = [json.loads(line, parse_float=Decimal) for line in path.read_text().splitlines()]
    change(values)
    restore(path, values)
    path.write_bytes(b"".join(_ENCODER.encode(value) + b"\n" for value in values))
    reseal(path)


def retell(value: dict[str, Any]) -> None:
    """Make a changed conversation's derived fields true again; `restore` makes its distributions anew."""
    turns = msgspec.convert(value["messages"], list[Turn])
    layout = lay_out(turns, value.get("tools", []), toy_tokenizer())
    value["teacher_text"] = kd.turn_text(turns[-1])
    value["prompt"] = [turn.content for turn in turns if turn.role == "user"][-1]
    value["render"], value["targets"] = msgspec.to_builtins(layout.rendered), msgspec.to_builtins(layout.targets)
    value["provenance"]["response_sha256"][-1] = _said(turns[-1], value["reasoning"])
    value["logprobs"] = None


def _said(turn: Turn, reasoning: str | None) -> str:
    return reply_sha256(Reply(turn.content, reasoning, (), turn.finish_reason, None, "", "", None))
