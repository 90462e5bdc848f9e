"""Models behind one interface: their tokens against plain greedy decoding, and what they say about themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from distill import chat, checkpoint
from distill.artifacts import sha256_file
from distill.chat import Message
from distill.convert import functions
from distill.convert.package import WEIGHT_FILE
from distill.errors import CheckpointError, ConfigError, InputError, PackageError, Skipped
from distill.evaluate.episode import Request
from distill.evaluate.items import GoldCall, Item
from distill.evaluate.runners import BatchModel, Settings, open_model
from distill.evaluate.runners.student import KeptContext, StudentEngine
from distill.evaluate.runners.templated import TemplatedModel
from distill.evaluate.transcripts import Reply
from distill.export.deployed import deploy, parse_formats
from distill.jsonlines import read_objects
from distill.model import ModelConfig, Student
from distill.pretrained import save_pretrained
from distill.tokenizer import toy_tokenizer
from tests.conftest import Toy

ROOT = Path(__file__).parents[2]
TOOLS = (
    {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    {"name": "timer", "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}}},
)
SHAPES = {
    "grouped": {},
    "alone": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "attention_bias": True},
    "window": {"sliding_window": 40},
}


def item(name: str, text: str, tools: Sequence[dict[str, Any]] = TOOLS) -> Item:
    call = GoldCall(id="c", name="weather", example={})
    return Item(id=name, kind="required", stratum="test", messages=(Message("user", text),), tools=tuple(tools),
                calls=(call,), answer="x")  # fmt: skip


def student(seed: int = 0, *, context: int = 512, **shape: Any) -> Student:
    """Random weights, large enough that what is said depends on all that was read."""
    sizes: dict[str, Any] = {"vocab_size": toy_tokenizer().vocab_size, "hidden_size": 32, "intermediate_size": 48,
                             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                             "max_position_embeddings": context}  # fmt: skip
    made = Student(ModelConfig(**sizes | shape)).init_weights(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3.0)
    return made


def model_of(made: Student, *, together: int = 4, **settings: Any) -> TemplatedModel:
    engine = StudentEngine(made, together)
    return TemplatedModel(engine, toy_tokenizer(), Settings(together=together, **settings), {"runner": "test"})


def naive(made: Student, request: Request, most: int) -> Reply:
    """Greedy decoding that reads everything anew for each token."""
    tokenizer = toy_tokenizer()
    prompt = chat.encode(tokenizer, request.messages, request.item.tools, add_generation_prompt=True).ids
    out: list[int] = []
    stop = "length"
    while len(out) < most:
        token = int(made(torch.tensor([prompt + out]))[0, -1].argmax())
        if token in tokenizer.stop_ids:
            stop = "stop"
            break
        out.append(token)
    return Reply(tokenizer.decode(out), None, stop, len(prompt), len(out))  # type: ignore[arg-type]


def go_on(request: Request, reply: Reply, result: str) -> Request:
    """The conversation after a reply and a tool's result."""
    said = Message("assistant", chat.turn_of(reply.text).replace("<|im_start|>", "?"))
    return Request(request.item, (*request.messages, said, Message("tool", result)), (*request.replies, reply))


def conversations(n: int) -> list[Request]:
    items = [item(f"i{k}", f"Question {k}: {'and ' * (3 * k)}what now?", TOOLS[: k % 3]) for k in range(n)]
    return [Request(one, one.messages, ()) for one in items]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_turn_is_that_of_greedy_decoding_that_reads_everything_anew(shape: str) -> None:
    made = student(1, **SHAPES[shape])
    alone, together = model_of(made, max_new_tokens=24), model_of(made, max_new_tokens=24, together=3)
    requests = conversations(5)
    said = set()
    for turn in range(3):
        expected = [naive(made, request, 24) for request in requests]
        assert [alone.reply(*request) for request in requests] == expected
        assert together.replies(requests) == expected
        said |= {reply.text for reply in expected}
        requests = [go_on(request, reply, json.dumps({"result": turn}))
                    for request, reply in zip(requests, expected)]  # fmt: skip
    assert len(said) > 10  # they differ: it matters what was read


class _Counting(StudentEngine):
    """Notes how many tokens are read."""

    read = 0

    def feed(self, contexts: Sequence[KeptContext], ids: Sequence[Sequence[int]]) -> np.ndarray:
        self.read += sum(map(len, ids))
        return super().feed(contexts, ids)


def test_a_later_turn_reads_only_what_is_new() -> None:
    engine = _Counting(student(), 2)
    model = TemplatedModel(engine, toy_tokenizer(), Settings(max_new_tokens=8), {})
    (request, *_) = conversations(1)
    first = model.reply(*request)
    assert engine.read == first.prompt_tokens + first.tokens - (first.stop == "length")
    before = engine.read
    second = model.reply(*go_on(request, first, "{}"))
    read_anew = second.prompt_tokens - (engine.read - before - second.tokens + (second.stop == "length"))
    assert read_anew >= first.prompt_tokens


def test_a_conversation_never_goes_on_from_another_ones_context() -> None:
    """A run that was stopped and goes on must give the same replies, to the last bit of rounding."""
    engine = _Counting(student(), 2)
    model = TemplatedModel(engine, toy_tokenizer(), Settings(max_new_tokens=8), {})
    one, other = (Request(each, each.messages, ()) for each in (item("a", "Oslo?"), item("b", "Oslo!")))
    model.reply(*one)
    before = engine.read
    reply = model.reply(*other)
    assert engine.read - before == reply.prompt_tokens + reply.tokens - (reply.stop == "length")


def test_a_context_that_is_not_cut_back_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = student(2)
    model = model_of(made, max_new_tokens=24)
    (request, *_) = conversations(1)
    first = model.reply(*request)
    later = go_on(request, first._replace(text="altered") if hasattr(first, "_replace") else
                  msgspec.structs.replace(first, text="altered"), "{}")  # fmt: skip
    right = naive(made, later, 24)
    assert model.reply(*later) == right
    spoilt = model_of(made, max_new_tokens=24)
    spoilt.reply(*request)
    monkeypatch.setattr(KeptContext, "cut", lambda self, length: self.ids.__setitem__(slice(length, None), [0]))
    assert spoilt.reply(*later) != right


def test_a_full_context_ends_the_reply_and_crashes_nothing() -> None:
    model = model_of(student(context=80), max_new_tokens=50)
    request = Request(long := item("a", "word " * 200), long.messages, ())
    reply = model.reply(*request)
    assert reply == Reply("", None, "context", reply.prompt_tokens, 0) and reply.prompt_tokens > 80
    short = item("b", "word " * 5, ())
    cut_off = model_of(_never_stops(student(context=60)), max_new_tokens=50).reply(short, short.messages, ())
    assert cut_off.stop == "context" and cut_off.prompt_tokens + cut_off.tokens == 60
    whole = model_of(_never_stops(student(context=60)), max_new_tokens=5).reply(short, short.messages, ())
    assert whole.stop == "length" and whole.tokens == 5


def _never_stops(made: Student) -> Student:
    """Its stop tokens are never the likeliest."""
    with torch.no_grad():
        made.lm_head.weight[sorted(toy_tokenizer().stop_ids)] = 0.0
    return made


class _Scripted:
    """An engine that says what it is told to."""

    capacity, together = 512, 1

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def start(self) -> Any:
        return type("Context", (), {"ids": [], "cut": lambda self, length: None})()

    def feed(self, contexts: Sequence[Any], ids: Sequence[Sequence[int]]) -> np.ndarray:
        return np.eye(toy_tokenizer().vocab_size, dtype=np.float32)[[self.tokens.pop(0)]]


def test_bytes_that_are_no_text_are_replaced_and_unknown_ids_say_nothing() -> None:
    tokenizer = toy_tokenizer()
    broken = tokenizer.ids_by_bytes[b"\xc3"]
    model = TemplatedModel(_Scripted([*tokenizer.encode("a"), broken, *tokenizer.encode("b"), tokenizer.turn_end]),
                           tokenizer, Settings(), {})  # fmt: skip
    one = item("a", "?")
    reply = model.reply(one, one.messages, ())
    assert (reply.text, reply.stop, reply.tokens) == ("a\ufffdb", "stop", 3)


# -- from files


def checkpoint_of(folder: Path, made: Student) -> Path:
    return checkpoint.save(folder / "x.pt", made, toy_tokenizer(), step=1, loss=0.0, stage="worker")


def test_a_checkpoint_and_its_folder_reply_alike_and_have_the_same_weights(tmp_path: Path) -> None:
    made = student(3)
    path = checkpoint_of(tmp_path, made)
    folder = save_pretrained(made, tmp_path / "folder")
    (folder / "tokenizer.json").write_text(toy_tokenizer().to_json())
    settings = Settings(max_new_tokens=16)
    from_file, from_folder = open_model(str(path), settings), open_model(str(folder), settings)
    requests = conversations(4)
    assert from_file.replies(requests) == from_folder.replies(requests)
    identity, other = from_file.identity(), from_folder.identity()
    assert identity == {
        "runner": "checkpoint", "weights": checkpoint.weights_sha256(made), "files": {"x.pt": sha256_file(path)},
        "tokenizer": toy_tokenizer().sha256, "template": chat.template_sha256(),
        "decoding": {"strategy": "greedy", "max_new_tokens": 16, "constrained": False, "formats": None,
                     "device": "cpu"},
    }  # fmt: skip
    assert other["weights"] == identity["weights"] and other["runner"] == "folder"
    assert set(other["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.dumps(identity) and isinstance(from_file, BatchModel)


@torch.no_grad()
def test_formats_are_those_of_deployment(tmp_path: Path) -> None:
    made = student(4)
    path = checkpoint_of(tmp_path, made)
    requests = conversations(3)
    for asked in ("int4/16", {"blocks": "int4/16", "embedding": "int4/16"}, "blocks=int4/16,embedding=int4/16"):
        model = open_model(str(path), Settings(max_new_tokens=16, formats=asked))
        formats = model.identity()["decoding"]["formats"]
        assert (formats["blocks"], formats["embedding"]) == ("int4/16", "int4/16")
        rounded = checkpoint.load(path)
        deploy(rounded, parse_formats("blocks=int4/16,embedding=int4/16"))
        assert model.replies(requests) == [naive(rounded.student, request, 16) for request in requests]
    assert model.replies(requests) != open_model(str(path), Settings(max_new_tokens=16)).replies(requests)


def test_a_student_in_half_precision_computes_in_full(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, student(5).bfloat16())
    model = open_model(str(path), Settings(max_new_tokens=16))
    whole = checkpoint.load(path).student.float()
    with torch.no_grad():
        assert model.replies(conversations(2)) == [naive(whole, request, 16) for request in conversations(2)]


@pytest.mark.parametrize(
    ("spec", "settings", "error", "message"),
    [
        ("nothing.pt", {}, InputError, "nothing.pt: no such checkpoint"),
        ("nothing", {}, InputError, "no such checkpoint, Hugging Face folder, package or endpoint"),
        ("empty", {}, InputError, "neither a checkpoint"),
        ("text.txt", {}, CheckpointError, "text.txt"),
        ("bad.pt", {}, CheckpointError, "bad.pt"),
        ("x.pt", {"formats": "int5"}, ConfigError, "int5"),
        ("x.pt", {"formats": {"blokcs": "int8"}}, ConfigError, "blokcs"),
        ("http://127.0.0.1:9", {"constrained": True}, InputError, "does not give"),
        ("http://127.0.0.1:9", {"formats": "int8"}, InputError, "weight formats"),
        ("empty.mlpackage", {"formats": "int8"}, InputError, "has its own"),
        ("empty.mlpackage", {}, PackageError, "empty.mlpackage"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    tmp_path: Path, spec: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    for folder in ("empty", "empty.mlpackage"):
        (tmp_path / folder).mkdir()
    for file in ("text.txt", "bad.pt"):
        (tmp_path / file).write_text("no")
    checkpoint_of(tmp_path, student())
    with pytest.raises(error, match=message) as caught:
        open_model(spec if spec.startswith("http") else str(tmp_path / spec), Settings(**settings))
    assert "\n" not in str(caught.value)


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"max_new_tokens": 0}, {"together": 0}, {"attempts": 0}, {"must_call": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)  # type: ignore[arg-type]


# -- packages


@pytest.fixture(scope="module")
def generator(toy: Toy) -> Path:
    """Prefill by 8 and by 24 tokens and decode in one package."""
    built = toy.folder / "for_runners" / "toy.mlpackage"
    built.parent.mkdir()
    functions.build(functions.FunctionsConfig(toy.checkpoint, built, 128, (8, 24), toy=True), lambda line: None)
    return built


def toy_requests(toy: Toy, n: int) -> list[Request]:
    """Prompts of the toy's own kind, with the tools that they came with."""
    rows = [row for _, row in read_objects(toy.data)][:n]
    items = [item(row["id"], row["prompt"], row["tools"]) for row in rows]
    return [Request(one, one.messages, ()) for one in items]


def test_packages_reply_as_the_checkpoint_they_were_made_from(toy: Toy, generator: Path) -> None:
    settings = Settings(max_new_tokens=16)
    float_model = open_model(str(toy.checkpoint), settings)
    tokens = {}
    for package, n in ((toy.prefill, 6), (toy.prefill_long, 2), (toy.decode, 6), (generator, 6)):
        model = open_model(str(package), settings)
        requests = toy_requests(toy, n)
        capacity = 64 if package == toy.prefill else 128
        for turn in range(2):
            expected = float_model.replies(requests)
            found = model.replies(requests)
            for one, other in zip(expected, found):
                assert isinstance(one, Reply) and isinstance(other, Reply)
                if one.prompt_tokens + one.tokens < capacity:
                    assert other == one
                elif one.prompt_tokens >= capacity:
                    assert other == Reply("", None, "context", one.prompt_tokens, 0)
                else:
                    assert other.stop == "context" and one.text.startswith(other.text)
            tokens[package.stem, turn] = sum(reply.tokens for reply in found if isinstance(reply, Reply))
            requests = [go_on(request, reply, '{"ok": true}') for request, reply in zip(requests, expected)
                        if isinstance(reply, Reply)]  # fmt: skip
    assert all(count > 5 for key, count in tokens.items() if key != ("prefill", 1)) and sum(tokens.values()) > 100


def test_a_packages_state_is_cut_back_to_what_the_new_prompt_begins_with(toy: Toy) -> None:
    """The state keeps rows of a turn that the conversation did not keep; none of them may be seen."""
    settings = Settings(max_new_tokens=12)
    (request, *_) = toy_requests(toy, 1)
    used, fresh = open_model(str(toy.decode), settings), open_model(str(toy.decode), settings)
    first = used.reply(*request)
    later = go_on(request, msgspec.structs.replace(first, text="No."), '{"ok": true}')
    assert used.reply(*later) == fresh.reply(*later)


def test_a_packages_identity_is_checked_not_copied(toy: Toy, tmp_path: Path) -> None:
    identity = open_model(str(toy.decode), Settings()).identity()
    assert identity["weights"] == sha256_file(toy.decode / WEIGHT_FILE) == identity["files"]["weight.bin"]
    assert identity["contract"]["training_weights"] == checkpoint.weights_sha256(
        checkpoint.load(toy.checkpoint).student
    )
    assert identity["tokenizer"] == toy_tokenizer().sha256 and identity["template"] == chat.template_sha256()
    assert identity["decoding"]["policy"] == "ieee16" and identity["decoding"]["backend"] == "executor"
    for folder in (toy.decode, toy.decode.with_suffix(".contract")):
        shutil.copytree(folder, tmp_path / folder.name)
    weights = tmp_path / toy.decode.name / WEIGHT_FILE
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PackageError, match="not the one that was converted"):
        open_model(str(tmp_path / toy.decode.name), Settings())


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself answers")
def test_core_ml_is_skipped_elsewhere(toy: Toy) -> None:
    with pytest.raises(Skipped, match="macOS only"):
        open_model(str(toy.decode), Settings(backend="coreml"))


PROXY = """
import json, sys
from pathlib import Path
from distill.mil import coreml_proxy
coreml_proxy.install()
from distill.evaluate.runners import Settings, open_model
from distill.evaluate.runners.package import CoreMlRunner, PackageEngine
from distill.evaluate.runners.templated import TemplatedModel
from tests.unit.test_evaluate_runners import go_on, item
from distill.evaluate.episode import Request
settings = Settings(max_new_tokens=10)
one = item("a", "Please lock the door.")
same = []
for path in sys.argv[1:]:
    runner = CoreMlRunner(path)
    models = [TemplatedModel(PackageEngine(runner), runner.tokenizer(), settings, {}), open_model(path, settings)]
    request = Request(one, one.messages, ())
    first = [model.reply(*request) for model in models]
    later = go_on(request, first[0], "{}")
    same.append(first[0] == first[1] and models[0].reply(*later) == models[1].reply(*later) and first[0].tokens > 0)
print(json.dumps([same, coreml_proxy.MLModelProxy.predictions]))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself answers")
def test_the_branch_of_core_ml_runs_with_the_executor_in_core_ml_s_place(toy: Toy, generator: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROXY, str(toy.prefill_long), str(toy.decode), str(generator)], cwd=ROOT,
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    same, predictions = json.loads(done.stdout.splitlines()[-1])
    assert same == [True, True, True] and predictions > 30
