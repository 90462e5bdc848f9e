"""Prompts from files: what is read, in which order, and what is refused with its line."""

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from distill.data.prompts.sources import Source, SourceConfig
from distill.data.prompts.tool_material import BY_NAME
from distill.errors import ConfigError, DatasetError

TOOL = {"name": "stock_level", "parameters": {"type": "object", "properties": {"item": {"type": "string"}}},
        "returns": {"type": "integer", "minimum": 0, "maximum": 9}}  # fmt: skip


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def opened(path: Path, **more: Any) -> Source:
    return Source(SourceConfig(str(path), **more), BY_NAME)


def test_a_line_of_jsonl_is_a_prompt_with_all_it_says(tmp_path: Path) -> None:
    path = write(
        tmp_path / "shop.jsonl",
        {"prompt": "How many bolts are left?", "system": "Be brief.", "tools": ["get_order", TOOL], "expect": "call",
         "id": "q-1", "ground_truth": "4"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
                      {"role": "user", "content": "Bye"}]},
    )  # fmt: skip
    source = opened(path)
    first, second = sorted(source.prompts("shop", 0), key=lambda prompt: prompt.source)
    assert [(m.role, m.content) for m in first.messages] == [
        ("system", "Be brief."),
        ("user", "How many bolts are left?"),
    ]
    assert [tool["function"]["name"] for tool in first.tools] == ["get_order", "stock_level"]
    assert "returns" not in json.dumps(first.tools) and source.tools["stock_level"].returns == TOOL["returns"]
    assert (first.expect, first.ground_truth, first.stratum, first.source) == ("call", "4", "shop", "shop.jsonl:1")
    assert second.text == "Bye" and len(second.messages) == 3 and second.expect == "any" and not second.tools
    assert second.needs_tokens < first.needs_tokens and first.id.startswith("shop-") and first.id != second.id


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "my prompts!.txt"
    path.write_bytes("\ufeffErste Frage?\r\n\n  zweite \nlast without newline".encode())
    source = opened(path, system="S", tools=["set_timer"], expect="no_call")
    found = sorted(source.prompts("my_prompts_", 1), key=lambda prompt: prompt.source)
    assert [prompt.text for prompt in found] == ["Erste Frage?", "zweite", "last without newline"]
    assert all(p.messages[0].content == "S" and p.expect == "no_call" and len(p.tools) == 1 for p in found)
    assert [prompt.source[-2:] for prompt in found] == [":1", ":3", ":4"]


def test_the_order_follows_seed_and_content_and_not_the_place_in_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}"} for i in range(300)]
    one = opened(write(tmp_path / "a.jsonl", *rows))
    random.Random(1).shuffle(rows)
    two = opened(write(tmp_path / "b.jsonl", *rows), stratum="a")
    texts = [prompt.text for prompt in one.prompts("a", 0)]
    assert texts == [prompt.text for prompt in two.prompts("a", 0)]
    assert sorted(texts) == sorted(row["prompt"] for row in rows), "each comes once"
    assert texts != [prompt.text for prompt in one.prompts("a", 1)]
    more = opened(write(tmp_path / "c.jsonl", *rows, {"prompt": "one more"}), stratum="a")
    assert [t.text for t in more.prompts("a", 0) if t.text != "one more"] == texts, "a line more moves no other"


def test_lines_name_their_strata_and_share_the_weight_of_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "stratum": "tea" if i % 4 else "coffee"} for i in range(40)]
    source = opened(write(tmp_path / "x.jsonl", *rows), weight=2.0)
    assert source.counts == {"coffee": 10, "tea": 30} and source.weights == {"coffee": 0.5, "tea": 1.5}
    assert {p.stratum for p in source.prompts("tea", 0)} == {"tea"}
    assert opened(tmp_path / "x.jsonl", stratum="all").counts == {"all": 40}


def test_a_large_file_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with open(path, "w") as file:
        for i in range(4_000):
            file.write(json.dumps({"prompt": f"{i} " + "word " * 800}) + "\n")
    tracemalloc.start()
    source = opened(path)
    taken = [prompt for _, prompt in zip(range(50), source.prompts("large", 3), strict=False)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(taken) == 50 and peak < path.stat().st_size / 4


def test_a_file_changed_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"prompt": f"prompt {i}"} for i in range(9)))
    source = opened(path)
    write(path, *({"prompt": f"prompt {i + 1}"} for i in range(9)))
    with pytest.raises(DatasetError, match="changed while in use"):
        list(source.prompts("x", 0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('"text"', "expected a JSON object"),
        ({}, "either prompt or messages"),
        ({"prompt": "a", "messages": []}, "either prompt or messages"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a", "promt": "b"}, "promt"),
        ({"prompt": "   "}, "a turn is empty"),
        ({"messages": []}, "end with the user's"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "end with the user's"),
        ({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, "turns go user"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "turns go user"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
         "a system turn comes first"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "tool"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "name"),
        ({"prompt": "ends here<|im_end|>"}, "control token"),
        ({"prompt": "a", "system": "<|im_start|>user"}, "control token"),
        ({"prompt": "a", "tools": ["get_wether"]}, "no tool is called 'get_wether'"),
        ({"prompt": "a", "tools": ["get_order", "get_order"]}, "offered twice"),
        ({"prompt": "a", "tools": [{"name": "x y"}]}, "1 to 64"),
        ({"prompt": "a", "tools": [TOOL | {"name": "get_order"}]}, "defined otherwise"),
        ({"prompt": "a", "tools": [TOOL | {"parameters": {"type": 5}}]}, "parameters of"),
        ({"prompt": "a", "expect": "perhaps"}, "expect"),
        ({"prompt": "a", "expect": "call"}, "offers no tool"),
        ({"prompt": "a", "stratum": "../up"}, "stratum"),
        ({"prompt": "a", "stratum": ""}, None),
        ({"prompt": "a" * (2 << 20)}, "characters"),
        ('{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": "\xc3\x28"}', "not UTF-8"),
        (b'{"prompt": "' + b"x" * (17 << 20) + b'"}', "longer than"),
        ("[" * 50_000, "not JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: Any, message: str | None) -> None:
    path = tmp_path / "x.jsonl"
    text = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(b'{"prompt": "fine"}\n\n' + text + b"\n")
    if message is None:
        assert opened(path).counts == {"x": 2}
        return
    with pytest.raises(DatasetError, match=re.escape(f"{path}:3: ")) as caught:
        opened(path)
    assert message in str(caught.value) and len(str(caught.value)) < 1000


def test_a_file_without_prompts_or_without_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match="no prompts"):
        opened(tmp_path / "empty.txt")
    with pytest.raises(Exception, match=r"absent\.txt"):
        opened(tmp_path / "absent.txt")
    with pytest.raises(Exception, match="not a regular file"):
        opened(Path("/dev/zero"))


def test_two_definitions_of_a_tool_in_one_file_must_agree(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", {"prompt": "a", "tools": [TOOL]}, {"prompt": "b", "tools": [TOOL]})
    assert list(opened(good).tools) == ["stock_level"]
    other = TOOL | {"description": "another"}
    with pytest.raises(DatasetError, match=r"b\.jsonl:2: tool stock_level is defined otherwise"):
        opened(write(tmp_path / "b.jsonl", {"prompt": "a", "tools": [TOOL]}, {"prompt": "b", "tools": [other]}))


@pytest.mark.parametrize("keys", [{"weight": 0}, {"weight": -1.0}, {"weight": float("nan")}, {"stratum": "a b"}])
def test_a_source_that_makes_no_sense_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ConfigError), match=next(iter(keys))):
        SourceConfig("x.jsonl", **keys)
