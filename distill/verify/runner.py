"""Greedy decoding through a .mlpackage: the package's own contract says how to feed it.

A prefill package is run whole for every token (right padding does not change what is before it); a decode package is
fed token by token with its KV state; a generator takes its prompt in chunks and goes on token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill import mil
from distill.artifacts import sha256_file
from distill.contract import WITH_STATE, Contract, parse_contract, sidecar_path
from distill.convert.package import CONTRACT_KEY, refuse_placeholder, sidecar_folder
from distill.errors import InputError, PackageError
from distill.tokenizer import Tokenizer
from distill.verify.integrity import interface_faults


def read_package_contract(program: mil.Program) -> Contract:
    """The contract in a package's metadata; PackageError if it carries none."""
    import msgspec

    text = program.metadata.get(CONTRACT_KEY)
    if text is None:
        raise PackageError(f"{program.path}: carries no contract in its metadata; convert it with this project")
    try:
        data = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise PackageError(f"{program.path}: the contract in its metadata is not JSON: {error}") from error
    return parse_contract(data, f"{program.path} metadata")


class Cut(NamedTuple):
    """One call of a function, with so many of the tokens to feed."""

    function: str
    tokens: int


def cut(first: int, count: int, context: int, functions: Mapping[str, int]) -> list[Cut]:
    """How `count` tokens from position `first` on are fed to functions, each with the number of tokens that it takes.

    The longest chunk that the rest fills, again and again; a rest that fills none is padded to the shortest chunk if
    that stays inside the context, else fed token by token. What a padded row writes lies after every token's own row,
    and is overwritten before a token may see it.
    """
    sizes = sorted(functions.items(), key=lambda item: item[1])
    cuts = []
    while count > 0:
        inside = [(name, size) for name, size in sizes if first + size <= context]
        full = [(name, size) for name, size in inside if size <= count]
        if count > 1 and len(inside) > 1 and len(full) == 1:  # only token by token fits
            full = inside[:2]
        name, size = full[-1]
        cuts.append(Cut(name, min(size, count)))
        first, count = first + size, count - size
    return cuts


class PackageRunner:
    """A loaded package with its contract, run by the reference executor under `policy`.

    PackageError where its interface is not the contract's; with `checked` False the caller looks at that.
    """

    def __init__(self, package: str | Path, policy: str = "ieee16", *, checked: bool = True) -> None:
        self.path = Path(package)
        refuse_placeholder(self.path)
        self.program = mil.load(self.path)
        self.contract = read_package_contract(self.program)
        if checked and (faults := interface_faults(self.program, self.contract)):
            raise PackageError(f"{self.path}: the interface is not the contract's: {faults[0]}")
        self.policy = policy
        self.output = self.contract.outputs[0].name
        self.functions = {name: function.tokens() for name, function in self.contract.functions.items()} or {"main": 1}
        """Of a package with a state: tokens per call."""
        self.stopped = ""
        """Why the last `generate` ended."""

    def tokenizer(self) -> Tokenizer:
        """The sidecar's tokenizer, checked against the contract."""
        path = self.sidecar("tokenizer")
        return Tokenizer.from_file(path)

    def sidecar(self, role: str) -> Path:
        """Path of a sidecar file whose sha256 is the contract's; PackageError otherwise."""
        if role not in self.contract.sidecar:
            raise PackageError(f"{self.path}: its contract names no {role} file")
        ref = self.contract.sidecar[role]
        path = sidecar_path(sidecar_folder(self.path), ref)
        if not path.is_file():
            raise PackageError(f"{path}: missing from the package's sidecar")
        if sha256_file(path) != ref.sha256:
            raise PackageError(f"{path}: altered: its sha256 is not the one in the contract")
        return path

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer together that fit."""
        return max(self.contract.enumerated_T) if self.contract.mode in WITH_STATE else self.contract.sequence()

    def prefill(self, ids: Sequence[int], pad: int = 0) -> np.ndarray:
        """Logits [n, V] in fp32 of a prefill package after each of n tokens."""
        seq = self.contract.sequence()
        if not 0 < len(ids) <= seq:
            raise InputError(f"{self.path}: {len(ids)} tokens do not fit its {seq}")
        padded = np.full((1, seq), pad, np.int32)
        padded[0, : len(ids)] = ids
        return self.predict({self.contract.inputs[0].name: padded})[0, : len(ids)]

    def predict(self, feed: Mapping[str, np.ndarray], function: str | None = None, state: Any = None) -> np.ndarray:
        """The logits of one call of a function, or of the only one."""
        return self.program.predict(feed, function, state, self.policy)[self.output]

    def make_state(self) -> Any:
        """What a conversation keeps: zeros."""
        return self.program.make_state()

    def call(self, function: str, ids: Sequence[int], position: int, state: Any) -> np.ndarray:
        """Logits [n, V] after each of n tokens from `position` on, which the state then holds; n may be less than the
        function takes. InputError where the call would reach beyond the context."""
        size = self.functions[function]
        if not 0 < len(ids) <= size or not 0 <= position <= self.capacity - size:
            raise InputError(
                f"{self.path}: its context is full: {function} takes {size} tokens, and position {position} is less "
                f"than that from the end of its {self.capacity}"
            )
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(ids)] = ids
        tokens, at = (spec.name for spec in self.contract.inputs)
        feed = {tokens: padded, at: np.array([position], np.int32)}
        return self.predict(feed, function, state)[0, : len(ids)]

    def begin(self) -> Conversation:
        """A new conversation, with a state of its own."""
        return Conversation(self)

    def steps(self, ids: Sequence[int], state: Any = None) -> Iterator[np.ndarray]:
        """Logits [V] of a package with a state after each token, fed one by one."""
        state = state if state is not None else self.make_state()
        single = next(name for name, size in self.functions.items() if size == 1)
        for position, token in enumerate(ids):
            yield self.call(single, [token], position, state)[0]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [n, V] after each of n tokens, whatever the package's mode."""
        if self.contract.mode in WITH_STATE:
            return self.begin().feed(ids)
        return self.prefill(ids)

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: set[int]) -> Iterator[int]:
        """Greedy tokens as they come, the stop token not among them; `stopped` says why there are no more."""
        ids = list(prompt_ids)
        room = self.capacity - len(ids)
        if not ids or room < 1:
            raise InputError(f"{self.path}: a prompt of {len(ids)} tokens leaves no room in its {self.capacity}")
        conversation = self.begin() if self.contract.mode in WITH_STATE else None
        new = ids
        for _ in range(min(max_new_tokens, room)):
            logits = conversation.feed(new) if conversation is not None else self.prefill(ids)
            token = int(logits[-1].argmax())
            if token in stop_ids:
                self.stopped = "stop token"
                return
            yield token
            new = [token]
            ids += new
        self.stopped = "length" if max_new_tokens <= room else f"the context of {self.capacity} tokens is full"


class Conversation:
    """One conversation with a package that keeps a state. Several may go on at once, each with its own."""

    def __init__(self, runner: PackageRunner) -> None:
        self.runner = runner
        self.state = runner.make_state()
        self.position = 0

    def feed(self, ids: Sequence[int], cuts: Sequence[Cut] | None = None) -> np.ndarray:
        """Logits [n, V] after each of n more tokens, fed as `cuts` say, else as `cut` does.

        InputError, and the state is as it was, where they do not fit the context.
        """
        runner = self.runner
        if self.position + len(ids) > runner.capacity:
            raise InputError(
                f"{runner.path}: its context of {runner.capacity} tokens is full: {len(ids)} more do not fit after "
                f"{self.position}"
            )
        found = []
        for function, count in cuts or cut(self.position, len(ids), runner.capacity, runner.functions):
            found.append(runner.call(function, ids[:count], self.position, self.state))
            self.position, ids = self.position + count, ids[count:]
        return np.concatenate(found)
