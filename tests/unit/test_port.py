"""`distill port`: transformers loads the folder, with no distill there, and says what the student says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill import chat
from distill.errors import CheckpointError
from distill.export import port
from distill.export.deployed import parse_formats
from distill.export.ollama import TEMPLATE, modelfile
from distill.formats import Formats
from distill.model import ModelConfig, RopeScaling, Student
from distill.tokenizer import toy_tokenizer
from distill.train.fake_quantisation import FakeQuantised
from tests.unit.port_sets import (
    BASE,
    CONVERSATIONS,
    FAMILIES,
    Divergence,
    as_requests,
    as_tools,
    prompt_ids,
    require_same_tokens,
    saved,
    student,
)

transformers = pytest.importorskip("transformers", reason="the extra `teacher` is absent")
jinja2 = pytest.importorskip("jinja2")
NEW = 12


def ported(made: Student, tmp_path: Path, **options: Any) -> Path:
    source = saved(made, toy_tokenizer(), tmp_path / "s.pt")
    return port.run(port.PortConfig(source, tmp_path / "out", options.pop("to", "huggingface"), **options)).out


def compared(made: Student, folder: Path) -> int:
    """Tokens that transformers' greedy generation shares with the student's, over all conversations."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    count = 0
    for messages, tools in CONVERSATIONS:
        ids = tokenizer.apply_chat_template(
            as_requests(messages), tools=as_tools(tools) or None, add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        assert ids[0].tolist() == prompt_ids(toy_tokenizer(), (messages, tools))
        with torch.no_grad():
            found = model.generate(ids, max_new_tokens=NEW)[0, ids.shape[1] :].tolist()
        assert len(found) == NEW or found[-1] in toy_tokenizer().stop_ids
        count += require_same_tokens(made, ids[0].tolist(), found, tie=1e-4)
    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_generates_the_students_tokens_from_chats_with_tools(family: str, tmp_path: Path) -> None:
    made = student(family, toy_tokenizer())
    assert compared(made, ported(made, tmp_path)) >= NEW * 2


def test_no_distill_is_needed_where_the_folder_is_used(tmp_path: Path) -> None:
    made = student("qwen3", toy_tokenizer())
    folder = ported(made, tmp_path)
    messages, tools = CONVERSATIONS[3]
    code = (
        "import sys, json; sys.modules['distill'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, words = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        "messages, tools = json.loads(sys.argv[2])\n"
        "ids = words.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_tensors='pt')\n"
        "print(json.dumps(model.generate(**ids, max_new_tokens=6)[0, ids['input_ids'].shape[1]:].tolist()))\n"
    )
    asked = json.dumps([as_requests(messages), as_tools(tools)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), asked], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert require_same_tokens(made, prompt_ids(toy_tokenizer(), (messages, tools)), found, 1e-4) == len(found) > 0


def test_the_template_renders_what_the_student_was_trained_on(tmp_path: Path) -> None:
    folder = ported(student("llama", toy_tokenizer()), tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    for messages, tools in CONVERSATIONS:
        text = words.apply_chat_template(
            as_requests(messages), tools=as_tools(tools) or None, add_generation_prompt=True, tokenize=False
        )
        assert text == chat.render(messages, tools, add_generation_prompt=True)
    assert words.eos_token == "<|im_end|>" and words.decode(words.encode("a . b ,")) == "a . b ,"


def test_a_wrong_rope_theta_is_seen(tmp_path: Path) -> None:
    made = student("llama", toy_tokenizer())
    folder = ported(made, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["rope_theta"] = values["rope_parameters"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(Divergence):
        compared(made, folder)


def test_a_wrong_template_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = student("llama", toy_tokenizer())
    monkeypatch.setattr(chat, "JINJA", chat.JINJA.replace("<|im_end|>\\n", "<|im_end|>", 1))
    folder = ported(made, tmp_path)
    with pytest.raises(AssertionError):
        compared(made, folder)


def test_weights_are_stored_in_float16_only_where_that_changes_none(tmp_path: Path) -> None:
    made = student("llama", toy_tokenizer())
    source = saved(made, toy_tokenizer(), tmp_path / "s.pt")
    assert port.run(port.PortConfig(source, tmp_path / "a", "huggingface")).dtype == "float32"
    assert port.run(port.PortConfig(source, tmp_path / "b", "huggingface", dtype="float16")).dtype == "float16"
    stored = load_file(tmp_path / "b/model.safetensors")
    assert all(torch.equal(stored[name], value.half()) for name, value in made.state_dict().items())
    halved = saved(made.half(), toy_tokenizer(), tmp_path / "h.pt")
    assert port.run(port.PortConfig(halved, tmp_path / "c", "huggingface")).dtype == "float16"


@pytest.mark.parametrize("trained", [True, False])
def test_a_student_in_weight_formats_is_ported_with_its_deployed_values(trained: bool, tmp_path: Path) -> None:
    formats, made = Formats(blocks="int8", embedding="int8"), student("llama", toy_tokenizer())
    facts: dict[str, Any] = {}
    if trained:
        wrapped = FakeQuantised(made, formats)
        facts = {"formats": formats, "tables": {name: table * 1.5 for name, table in wrapped.tables.items()}}
    source = saved(made, toy_tokenizer(), tmp_path / "s.pt", **facts)
    asked = None if trained else parse_formats("blocks=int8,embedding=int8")
    done = port.run(port.PortConfig(source, tmp_path / "out", "huggingface", formats=asked))
    assert done.dtype == "float16"
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load_file(tmp_path / "out/model.safetensors")[name].numpy().astype(np.float64)
    weight = made.state_dict()[name].numpy().astype(np.float64)
    scale = facts["tables"][name].numpy().astype(np.float64) if trained else None
    if scale is None:  # the largest of a channel is a code times the scale, so the steps between values are the scale
        assert all(len(np.unique(row)) < 97 for row in stored) and np.abs(stored - weight).max() < 0.05
        return
    codes = np.clip(np.rint(weight / scale), -127, 127)
    assert np.array_equal(stored, (codes * scale).astype(np.float16))


def test_two_ports_are_the_same_bytes(tmp_path: Path) -> None:
    source = saved(student("qwen2", toy_tokenizer()), toy_tokenizer(), tmp_path / "s.pt")
    folders = [port.run(port.PortConfig(source, tmp_path / name, "huggingface")).out for name in "ab"]
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir()) and "port.json" in names
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(student("llama", toy_tokenizer()), toy_tokenizer(), tmp_path / "s.pt")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/letter.txt").write_text("mine")
    (tmp_path / "no.pt").write_bytes(b"PK\x03\x04 not a checkpoint")

    def refused(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert port.main(list(map(str, arguments))) == 2
        assert sorted(tmp_path.rglob("*")) == before
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        return line

    for_all = ("--to", "huggingface", "--out")
    assert "a folder that is not ours" in refused("--checkpoint", source, *for_all, tmp_path / "theirs")
    assert "something other than a folder" in refused("--checkpoint", source, *for_all, source)
    assert "no.pt" in refused("--checkpoint", tmp_path / "no.pt", *for_all, tmp_path / "out")
    assert "no such checkpoint" in refused("--checkpoint", tmp_path / "none.pt", *for_all, tmp_path / "out")
    line = refused("--checkpoint", source, "--to", "gguf", "--out", tmp_path / "out")
    assert "toy tokenizer" in line or "tokenizer: llama.cpp has no tokenizer with the pre-tokenizer" in line
    with pytest.raises(SystemExit) as stopped:
        port.main(["--checkpoint", str(source), "--to", "onnx", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2


def test_weights_that_no_runtime_can_hold_are_refused(tmp_path: Path) -> None:
    made = student("llama", toy_tokenizer())
    with torch.no_grad():
        made.lm_head.weight[0, 0] = 7e4
    with pytest.raises(CheckpointError, match=r"lm_head.weight has values beyond float16: 70000"):
        ported(made, tmp_path, dtype="float16")
    with torch.no_grad():
        made.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has values that are not finite"):
        ported(made, tmp_path)


@pytest.mark.parametrize("changes, named", [
    ({"attention_bias": True, "mlp_bias": True}, "qwen2 model with this student's mlp_bias"),
    ({"attention_bias": True, "qk_norm": True}, "qwen3 model with this student's output_bias"),
    ({"attention_bias": True, "sliding_window": 8}, "qwen2 model with this student's sliding_window"),
])  # fmt: skip
def test_a_student_that_no_family_represents_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        port.require_family(ModelConfig(vocab_size=8, **BASE | changes))


def test_mlx_is_refused_what_mlx_lm_passes_over(tmp_path: Path) -> None:
    changes = {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=64, attention_factor=1.5)}
    made = Student(ModelConfig(vocab_size=1088, **BASE | changes)).init_weights()
    with pytest.raises(CheckpointError, match="mlx-lm does not compute attention_factor of YaRN"):
        ported(made, tmp_path, to="mlx")
    windowed = ported(student("mistral", toy_tokenizer()), tmp_path, to="mlx")
    values = json.loads((windowed / "config.json").read_text())
    assert "sliding_window" not in values and values["max_position_embeddings"] == 300
    assert "the context is 300 tokens" in (windowed / "port.json").read_text()


_ACTIONS = {
    "if .Tools": "if Tools", "if .System": "if System", "end": "end", "if $i": "if not loop.first",
    "range $i, $tool := .Tools": "for it in Tools", "range $i, $message := .Messages": "for m in Messages",
    'if not (and $.Tools (eq $i 0) (eq .Role "system"))': "if not (Tools and loop.first and m.role == 'system')",
    "if .Thinking": "if m.thinking", "if .ToolCalls": "if m.calls", "range .ToolCalls": "for c in m.calls",
    "range $key, $value := .Function.Arguments": "for key, value in c.arguments | dictsort",
    "if $more": "if not loop.first",
}  # fmt: skip
_VALUES = {
    ".System": "System", "json .Function": "it | json", ".Role": "m.role", ".Thinking": "m.thinking",
    ".Content": "m.content", "json .Function.Name": "c.name | json", '"{"': "'{'", "json $key": "key | json",
    "json $value": "value | json", "$more := false": "''", "$more = true": "''",
}  # fmt: skip


def go_as_jinja(text: str) -> str:
    """The Modelfile's Go template in Jinja, action by action; an action that the tables lack is a KeyError."""
    opened: list[str] = []
    out, rest = "", text
    while "{{ " in rest:
        plain, _, rest = rest.partition("{{ ")
        action, _, rest = rest.partition(" }}")
        out += plain
        if action in _VALUES:
            out += "{{ " + _VALUES[action] + " }}"
            continue
        word = _ACTIONS[action]
        if word == "end":
            word = "end" + opened.pop()
        else:
            opened.append(word.split()[0])
        out += "{% " + word + " %}"
    assert not opened
    return out + rest


def test_the_modelfiles_template_is_the_chat_template_but_for_spelling() -> None:
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(go_as_jinja(TEMPLATE))
    for messages, tools in CONVERSATIONS:
        plain = [{"role": m.role, "content": m.content, "thinking": m.reasoning, "calls": [
            {"name": c.name, "arguments": dict(sorted(c.arguments.items()))} for c in m.tool_calls]}
            for m in messages]  # fmt: skip
        system = messages[0].content if messages[0].role == "system" else ""
        ordered = [chat.Message(m.role, m.content, tuple(
            chat.ToolCall(c.name, dict(sorted(c.arguments.items()))) for c in m.tool_calls), m.reasoning)
            for m in messages]  # fmt: skip
        found = template.render(Messages=plain, Tools=tools, System=system)
        assert found == chat.render(ordered, tools, add_generation_prompt=True)


def test_a_modelfile_names_weights_template_stops_and_context() -> None:
    lines = modelfile("model.gguf", toy_tokenizer(), 512)
    assert lines.startswith('FROM ./model.gguf\nTEMPLATE """{{ if .Tools }}') and lines.count('"""') == 2
    tail = lines.split('"""')[2].strip().splitlines()
    assert tail == ['PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 512",
                    "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]  # fmt: skip
