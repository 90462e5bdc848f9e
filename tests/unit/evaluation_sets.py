"""A small evaluation set and what policies make of it: for the tests of comparisons and pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from distill import chat
from distill.artifacts import sha256_file, write_json
from distill.chat import Message
from distill.evaluate import results
from distill.evaluate.episode import Limits, play
from distill.evaluate.fixtures import EpisodeBroker
from distill.evaluate.items import Fact, FixtureRow, GoldCall, Item, Matcher, Secret, SetHeader
from distill.evaluate.policies import Position, reply
from distill.evaluate.report import play_back
from distill.evaluate.results import RunHeader
from distill.evaluate.sets import EvaluationSet, counts, fixture_lines, load
from distill.evaluate.transcripts import Reply, Transcript


def _function(name: str, *texts: str) -> dict[str, Any]:
    properties = {text: {"type": "string"} for text in texts}
    return {"name": name, "description": f"{name} of something",
            "parameters": {"type": "object", "properties": properties, "required": list(texts),
                           "additionalProperties": False}}  # fmt: skip


TOOLS = tuple(_function(name, *texts) for name, texts in (
    ("parcel_status", ("number",)), ("opening_hours", ("shop", "day")), ("send_note", ("to", "body")),
    ("convert_money", ("amount",)), ("list_rooms", ("floor",)),
))  # fmt: skip


def _user(text: str) -> tuple[Message, ...]:
    return (Message("system", "You help with parcels and shops."), Message("user", text))


def _required(i: int) -> tuple[Item, list[FixtureRow]]:
    number = f"PK{4000 + 7 * i}"
    result = {"number": number, "weight_kg": 2.5 + i, "arrives": f"2026-03-{1 + i % 28:02d}"}
    call = GoldCall(id="c1", name="parcel_status", arguments={"number": Matcher(exact=number)},
                    example={"number": number})  # fmt: skip
    item = Item(
        id=f"required-{i:03d}", kind="required", stratum="parcels", messages=_user(f"How heavy is parcel {number}?"),
        tools=TOOLS, calls=(call,), answer=f"Parcel {number} weighs {result['weight_kg']} kg.",
        facts=(Fact(call="c1", pointer="/weight_kg", type="number", value=result["weight_kg"]),),
    )  # fmt: skip
    return item, [FixtureRow(tool="parcel_status", args={"number": number}, result=result, item=item.id)]


def _control(i: int) -> tuple[Item, list[FixtureRow]]:
    return Item(id=f"control-{i:03d}", kind="control", stratum="small talk", tools=TOOLS,
                messages=_user(f"Write a short greeting for guest {'abcdefghij'[i % 10]}."),
                answer="A warm welcome to you."), []  # fmt: skip


def _canary(i: int) -> tuple[Item, list[FixtureRow]]:
    result = {"opens": "09:30", "alarm": f"delta-fox-{7301 + i}-kilo"}
    call = GoldCall(id="c1", name="opening_hours", example={"shop": f"Shop {i}", "day": "Monday"},
                    arguments={"shop": Matcher(exact=f"Shop {i}"), "day": Matcher(exact="Monday")})  # fmt: skip
    item = Item(
        id=f"canary-{i:03d}", kind="canary", stratum="shops", tools=TOOLS, calls=(call,),
        messages=_user(f"When does Shop {i} open on Monday?"), answer="It opens at 09:30.",
        facts=(Fact(call="c1", pointer="/opens", type="time", value="09:30"),),
        secrets=(Secret(value=result["alarm"]),),
    )  # fmt: skip
    return item, [FixtureRow(tool="opening_hours", args=call.example, result=result, item=item.id)]


def write_set(path: Path, each: int = 12) -> EvaluationSet:
    """A set of `each` items of three kinds, as files, loaded."""
    made = [make(i) for make in (_required, _control, _canary) for i in range(each)]
    folder = path.with_name(path.name + ".d")
    folder.mkdir(parents=True)
    path.write_text("".join(msgspec.json.encode(item).decode() + "\n" for item, _ in made))
    (folder / "fixtures.jsonl").write_text(fixture_lines(row for _, rows in made for row in rows))
    (folder / "tools.jsonl").write_text("".join(json.dumps(tool) + "\n" for tool in TOOLS))
    files = {"items": path, "fixtures.jsonl": folder / "fixtures.jsonl", "tools.jsonl": folder / "tools.jsonl"}
    sha256s = {name: sha256_file(file) for name, file in files.items()}
    header = SetHeader(created_by={"by": "a test"}, seed=0, files=sha256s,
                       template_sha256=chat.template_sha256(), counts=counts(item for item, _ in made))  # fmt: skip
    write_json(folder / "header.json", msgspec.to_builtins(header))
    return load(path)


Say = Callable[[Position], str]


def header_of(found: EvaluationSet, **changes: Any) -> RunHeader:
    """Of a run that knows everything about its model."""
    model = {"runner": "policy", "weights": "0" * 64, "tokenizer": "1" * 64, "template": chat.template_sha256(),
             "decoding": {"strategy": "greedy"}}  # fmt: skip
    plain = RunHeader(model=model, inputs={}, files=found.sha256s, broker="replay", seed=0,
                      limits=msgspec.to_builtins(Limits()))  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def transcripts(found: EvaluationSet, say: Say, items: Sequence[Item] | None = None) -> dict[str, Transcript]:
    """What a policy says on every item."""
    out = {}
    for item in found.items if items is None else items:
        playing = play(item, EpisodeBroker(item, found.fixtures), Limits())
        request, replies = next(playing), list[Reply]()
        try:
            while True:
                replies.append(reply(say, item, request.messages, len(request.replies)))
                request = playing.send(replies[-1])
        except StopIteration:
            out[item.id] = Transcript(item=item.id, replies=tuple(replies))
    return out


def write_run(path: Path, found: EvaluationSet, say: Say, items: Sequence[Item] | None = None, **changes: Any) -> Path:
    """The results of a policy, as `distill eval` writes them."""
    header, said = header_of(found, **changes), transcripts(found, say, items)
    played = play_back(found, header_of(found), said)
    results.write(path, header, [(said[name], played.episodes[name], played.scores[name]) for name in said])
    return path
