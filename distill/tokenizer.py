"""Tokenizers: a thin, hashed view of a tokenizer.json, and the project's own byte-level toy tokenizer.

The toy tokenizer is trained, deterministically, from the text that ships in distill/text/ when it is first asked
for; its ids 0 to 2 are those of SmolLM2 for the same control tokens.
"""

from __future__ import annotations

import json
from functools import cache, cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from distill.artifacts import canonical_json, read_text, sha256_text
from distill.errors import InputError

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
TOY_VOCAB_SIZE = 1024
# JSON up to the end of its line is one piece, so that a tool's schema which the shipped text repeats takes few
# tokens and a conversation with two tools fits 64; then words, single digits, punctuation and space, as in GPT-2
_PIECES = r"""\{"[^\n]*|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_TEXT = Path(__file__).parent / "text"


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: itself if printable, else U+0100 on (GPT-2)."""
    own = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or b >= 0xAE]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()


class Spans(NamedTuple):
    """Token ids of a text and, of each, the half-open range of UTF-8 bytes that it stands for."""

    ids: list[int]
    bytes: list[tuple[int, int]]


class Tokenizer:
    """A byte-level tokenizer with the ChatML control tokens."""

    def __init__(self, inner: tokenizers.Tokenizer, source: str) -> None:
        self._inner = inner
        self.source = source
        turn_end = inner.token_to_id(TURN_END)
        if turn_end is None or inner.token_to_id(TURN_START) is None:
            raise InputError(f"{source}: the tokenizer lacks the control tokens {TURN_START} and {TURN_END}")
        self.turn_end: int = turn_end
        end_of_text = inner.token_to_id(END_OF_TEXT)
        self.end_of_text: int = self.turn_end if end_of_text is None else end_of_text
        self.pad: int = self.end_of_text
        self.stop_ids: set[int] = {self.turn_end, self.end_of_text}

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json."""
        return cls.from_json(read_text(path), str(path))

    @classmethod
    def from_json(cls, text: str, source: str) -> Tokenizer:
        """Read the text of a tokenizer.json; `source` names it in errors."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise InputError(f"{source}: not a tokenizer.json: {error}") from error
        # nothing here is ever padded or cut by it, and a hostile file could ask for gigabytes of padding
        inner.no_padding()
        inner.no_truncation()
        return cls(inner, source)

    def to_json(self) -> str:
        """The canonical tokenizer.json: equal tokenizers give equal text."""
        return canonical_json(json.loads(self._inner.to_str()))

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the canonical tokenizer.json."""
        return sha256_text(self.to_json())

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens in it become their single ids, nothing is added around it."""
        return self._encode(text).ids

    def encode_spans(self, text: str) -> Spans:
        """Ids of `text` with the bytes of each. A character split over tokens gives each its own bytes; only where the
        tokenizer is not byte-level, or changes the text before it cuts it, each has the whole character."""
        encoded = self._encode(text)
        lengths = self._byte_lengths
        if lengths is not None:
            ids = encoded.ids
            edges = list(accumulate(map(lengths.__getitem__, ids), initial=0))
            if edges[-1] == (len(text) if text.isascii() else len(text.encode())):
                return Spans(ids, list(pairwise(edges)))
        to_byte = list(accumulate((len(character.encode()) for character in text), initial=0))
        offsets = encoded.offsets
        following = [start for start, _ in offsets[1:]] + [len(text)]  # what a normaliser takes away belongs before it
        ends = [max(stop, after) for (_, stop), after in zip(offsets, following)]
        return Spans(encoded.ids, [(to_byte[start], to_byte[end]) for (start, _), end in zip(offsets, ends)])

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            return self._inner.encode(text, add_special_tokens=False)
        except TypeError as error:  # how the Rust side refuses a lone surrogate, as a broken shell argument holds
            raise InputError(f"not valid Unicode text: {text[:80]!a}") from error

    @cached_property
    def _byte_lengths(self) -> list[int] | None:
        """Bytes of each id; None where the ids do not stand for bytes. A byte-level token has a character a byte."""
        decoder = json.loads(self._inner.to_str()).get("decoder") or {}
        if not any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ()))):
            return None
        lengths = [0] * self.vocab_size
        for token, identity in self._inner.get_vocab(with_added_tokens=False).items():
            lengths[identity] = len(token)
        for identity, added in self._inner.get_added_tokens_decoder().items():
            lengths[identity] = len(added.content.encode())
        return lengths

    @cached_property
    def bytes_by_id(self) -> dict[int, bytes]:
        """What each id stands for; empty where the tokenizer is not byte-level."""
        if self._byte_lengths is None:
            return {}
        added = {i: token.content.encode() for i, token in self._inner.get_added_tokens_decoder().items()}
        own = {
            identity: bytes(_BYTES[character] for character in token)
            for token, identity in self._inner.get_vocab(with_added_tokens=False).items()
            if identity not in added and all(character in _BYTES for character in token)
        }
        return own | added

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, int]:
        """The id of each byte string that is a token; without those of a tokenizer that is not byte-level."""
        return {data: identity for identity, data in self.bytes_by_id.items()}

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control tokens included; ids beyond the tokenizer's vocabulary are dropped."""
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return self._inner.decode(known, skip_special_tokens=False)

    def require_fits(self, vocab_size: int, what: str) -> None:
        """InputError if a model with `vocab_size` rows cannot embed every id of this tokenizer."""
        if self.vocab_size > vocab_size:
            raise InputError(
                f"{what}: vocab_size {vocab_size} is smaller than the tokenizer's {self.vocab_size} ({self.source})"
            )


@cache
def toy_tokenizer() -> Tokenizer:
    """The project's byte-level BPE tokenizer, trained on the shipped text; the same every time."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOY_VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [path.read_text(encoding="utf-8") for path in sorted(_TEXT.glob("*.txt"))]
    inner.train_from_iterator([line for text in texts for line in text.splitlines(keepends=True)], trainer)
    inner.add_tokens([AddedToken(token, normalized=False) for token in (CALL_START, CALL_END)])
    return Tokenizer(inner, "toy tokenizer")
