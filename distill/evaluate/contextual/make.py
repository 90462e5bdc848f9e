"""The contextual set: `python -m data.make_contextual --out data/contextual_final.jsonl [--seed 0] [--scale N]`.

A set is a function of its seed and scale. A larger scale holds the items of a smaller one. No user's turn may share a
run of words with a training set: --train names those to hold it against.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from distill import chat
from distill.artifacts import atomic_file, provenance, sha256_file
from distill.draw import Draw
from distill.errors import DatasetError, InputError, stage_main
from distill.evaluate.contextual.scene import Built, Scene
from distill.evaluate.contextual.strata import STRATA, build
from distill.evaluate.contextual.tools import TOOLS
from distill.evaluate.items import Item, SetHeader

LARGEST_SCALE = 50
_TRIES = 200


def scenarios(seed: int = 0, scale: int = 1) -> list[Built]:
    """The items with their fixtures, in an order of which every beginning is a fair sample. InputError where the
    scale is not one that there is."""
    if not 1 <= scale <= LARGEST_SCALE:
        raise InputError(f"--scale {scale}: from 1 to {LARGEST_SCALE}")
    made: list[Built] = []
    seen: set[str] = set()
    for name, stratum in STRATA.items():
        made += (_new(seed, name, number, seen) for number in range(scale * stratum.items))
    return sorted(made, key=lambda one: hashlib.sha256(f"{seed}\n{one.item.id}".encode()).digest())


def _new(seed: int, name: str, number: int, seen: set[str]) -> Built:
    """An item whose request no other has. Where a template has no more, the next one has its turn."""
    for attempt in range(_TRIES):
        scene = Scene(Draw("contextual/1", seed, name, number, attempt), STRATA[name].locale)
        one = build(name, scene, f"{name}-{number:04}", number + attempt)
        asked = "\n".join(message.content for message in one.item.messages[1:])  # without the system's date
        if asked not in seen:
            seen.add(asked)
            return one
    raise InputError(f"--scale: the stratum {name} has no more than about {number} different requests")


def overlaps(items: Iterable[Item], train: Sequence[str | Path]) -> dict[str, str]:
    """Names and sha256s of training sets that no item overlaps with. DatasetError names the first that does."""
    if not train:
        return {}
    from distill.data.prompts.contamination import ContaminationIndex

    index = ContaminationIndex.load(train)
    for item in items:
        for message in item.messages:
            if message.role == "user" and (hits := index.hits(message.content, limit=1)):
                hit = hits[0]
                raise DatasetError(f"item {item.id} is also in {hit.set}, {hit.item}: {hit.ngram!r} ({hit.excerpt})")
    return dict(index.sha256s)


def write(path: str | Path, made: Sequence[Built], config: dict[str, Any], disjoint_from: dict[str, str]) -> SetHeader:
    """Write a set: all of its files are complete before the first is renamed, and `path` is renamed last."""
    path = Path(path)
    folder = path.with_name(path.name + ".d")
    offered = {tool["name"] for one in made for tool in one.item.tools}
    tools = [TOOLS[name].function | {"returns": TOOLS[name].returns} for name in TOOLS if name in offered]
    with contextlib.ExitStack() as stack:
        parts = {"items": stack.enter_context(atomic_file(path))}
        parts |= {name: stack.enter_context(atomic_file(folder / name)) for name in ("fixtures.jsonl", "tools.jsonl")}
        header_part = stack.enter_context(atomic_file(folder / "header.json"))
        parts["items"].write_bytes(_lines(one.item for one in made))
        parts["fixtures.jsonl"].write_bytes(_lines(row for one in made for row in one.rows))
        parts["tools.jsonl"].write_bytes(_lines(tools))
        maker = provenance({}, {})
        header = SetHeader(
            created_by={"made_by": maker["made_by"], "code": maker["code"]},
            seed=config["seed"],
            config=config,
            files={name: sha256_file(file) for name, file in parts.items()},
            template_sha256=chat.template_sha256(),
            counts=dict(sorted(Counter(one.item.kind for one in made).items())),
            disjoint_from=disjoint_from,
        )
        header_part.write_text(json.dumps(msgspec.to_builtins(header), indent=2, ensure_ascii=False) + "\n", "utf-8")
    return header


def _lines(rows: Iterable[Any]) -> bytes:
    encoder = msgspec.json.Encoder()
    return b"".join(encoder.encode(row) + b"\n" for row in rows)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Write the contextual set."""
    parser = argparse.ArgumentParser(
        prog="distill contextual", description="Scenarios that a tool-using student is evaluated on."
    )
    parser.add_argument("--out", default="data/contextual_final.jsonl", help="the set to write, F.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="which scenarios")
    parser.add_argument("--scale", type=int, default=1, help="how many times as many items as are needed")
    parser.add_argument("--train", nargs="*", default=[], metavar="KD.jsonl", help="training sets to be disjoint from")
    args = parser.parse_args(argv)
    made = scenarios(args.seed, args.scale)
    disjoint_from = overlaps((one.item for one in made), args.train)
    header = write(args.out, made, {"seed": args.seed, "scale": args.scale}, disjoint_from)
    kinds = ", ".join(f"{count} {kind}" for kind, count in header.counts.items())
    against = f"disjoint from {', '.join(disjoint_from)}" if disjoint_from else "held against no training set"
    print(f"{args.out}: {len(made)} items ({kinds}); {sum(len(one.rows) for one in made)} fixtures; {against}")
    return 0
