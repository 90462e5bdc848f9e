"""A tokenizer.json as llama.cpp's byte-level BPE: tokens, types, merges and the name of its pre-tokenizer.

llama.cpp does not run the expressions of a tokenizer.json: it knows a list of pre-tokenizers by name
(src/llama-vocab.cpp of ggml-org/llama.cpp). Another tokenizer is refused, since its text would be cut in other places;
so is Mistral's Tekken, which llama.cpp has, but which it cuts elsewhere in scripts with combining marks.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from distill.errors import InputError
from distill.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of a token, as GGUF numbers them."""
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PRE: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_WORDS + _REST, "bytes"), True): "llama-bpe",
    ((_WORDS + _REST, "bytes"), False): "smaug-bpe",
    ((_WORDS + _REST.replace("{1,3}", ""), "bytes"), False): "qwen2",
}
"""Steps of a tokenizer.json's pre-tokenizer, and whether a word that is a token skips the merges: llama.cpp's name."""


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    notes: list[str]
    """In what llama.cpp differs all the same."""


def vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """One token for each of a model's `rows`; InputError, in one line, for what llama.cpp cannot do."""
    data = json.loads(tokenizer.to_json())
    model = data["model"]
    notes: list[str] = []
    pre = _pre_tokenizer(data, tokenizer.source)
    if data.get("normalizer"):
        notes.append("llama.cpp does not normalise: text that is not in Unicode's NFC is cut in other places")
    tokens: dict[int, str] = {identity: token for token, identity in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for added in data.get("added_tokens", []):
        if not added["content"] or added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise _refused(tokenizer.source, f"an added token {added['content']!r} that takes what is beside it")
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if tokens and max(tokens) >= rows:
        raise InputError(f"{tokenizer.source}: id {max(tokens)} of {tokens[max(tokens)]!r} has no row among {rows}")
    known = set(tokens.values())
    for unused in (i for i in range(rows) if i not in tokens):
        tokens[unused], types[unused] = f"[PAD{unused}]", UNUSED
        if tokens[unused] in known:
            raise _refused(tokenizer.source, f"a token {tokens[unused]!r}, needed for a row without one")
    merges = [_merge(pair, tokenizer.source) for pair in model["merges"]]
    return Vocabulary(pre, [tokens[i] for i in range(rows)], [types[i] for i in range(rows)], merges, notes)


def is_qwen2(tokenizer: Tokenizer) -> bool:
    """Whether it cuts text as Qwen2's does, normaliser included."""
    data = json.loads(tokenizer.to_json())
    found = (tuple(_steps(data.get("pre_tokenizer") or {})), bool(data["model"].get("ignore_merges")))
    return _PRE.get(found) == "qwen2" and data.get("normalizer") == {"type": "NFC"}


def _pre_tokenizer(data: dict[str, Any], source: str) -> str:
    model = data["model"]
    if model.get("type") != "BPE" or (data.get("decoder") or {}).get("type") != "ByteLevel":
        raise _refused(source, f"a {model.get('type')} model that is no byte-level BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise _refused(source, f"{key} {model[key]!r}")
    if (data.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"}:
        raise _refused(source, f"the normaliser {data['normalizer']['type']}")
    steps, skips = tuple(_steps(data.get("pre_tokenizer") or {})), bool(model.get("ignore_merges"))
    if (steps, skips) not in _PRE:
        what = "; ".join(step.replace("\n", " ") for step in steps)
        raise _refused(source, f"the pre-tokenizer {what}" + (" with ignore_merges" if skips else ""))
    return _PRE[steps, skips]


def _steps(pre: dict[str, Any]) -> list[str]:
    """A pre-tokenizer's steps in words: a regular expression, or `digits`, `gpt2` (its expression), `bytes`."""
    kind = pre.get("type")
    if kind == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    if kind == "Digits" and pre.get("individual_digits"):
        return ["digits"]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return ["gpt2" if pre.get("use_regex", True) else "bytes"]
    if kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert") and "Regex" in pre["pattern"]:
        return [pre["pattern"]["Regex"]]
    return [json.dumps(pre, ensure_ascii=False)]


def _merge(pair: list[str] | str, source: str) -> str:
    """A merge as llama.cpp reads it: its halves around the one space."""
    first, second = pair if isinstance(pair, list) else pair.split(" ", 1)
    if not first or not second or " " in first + second:
        raise _refused(source, f"a merge of {first!r} and {second!r}")
    return f"{first} {second}"


def _refused(source: str, what: str) -> InputError:
    return InputError(f"{source}: llama.cpp has no tokenizer with {what}")
