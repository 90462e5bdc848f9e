"""Greedy decoding through a .mlpackage: the package's own contract says how to feed it.

A prefill package is run whole for every token (right padding does not change what is before it); a decode package is
fed token by token with its KV state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from distill import mil
from distill.artifacts import sha256_file
from distill.contract import Contract, parse_contract, sidecar_path
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
        return max(self.contract.enumerated_T) if self.contract.mode == "decode" else self.contract.sequence()

    def prefill(self, ids: Sequence[int], pad: int = 0) -> np.ndarray:
        """Logits [n, V] in fp32 of a prefill package after each of n tokens."""
        seq = self.contract.sequence()
        if not 0 < len(ids) <= seq:
            raise InputError(f"{self.path}: {len(ids)} tokens do not fit its {seq}")
        padded = np.full((1, seq), pad, np.int32)
        padded[0, : len(ids)] = ids
        out = self.program.predict({self.contract.inputs[0].name: padded}, policy=self.policy)
        return out[self.output][0, : len(ids)]

    def steps(self, ids: Sequence[int], state: object | None = None) -> Iterator[np.ndarray]:
        """Logits [V] of a decode package after each token, with one state."""
        state = state if state is not None else self.program.make_state()
        names = [spec.name for spec in self.contract.inputs]
        for position, token in enumerate(ids):
            feed = {names[0]: np.array([[token]], np.int32), names[1]: np.array([position], np.int32)}
            yield self.program.predict(feed, state=state, policy=self.policy)[self.output][0, 0]  # type: ignore[arg-type]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [n, V] after each of n tokens, whatever the package's mode."""
        if self.contract.mode == "decode":
            return np.stack(list(self.steps(ids)))
        return self.prefill(ids)

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: set[int]) -> Iterator[int]:
        """Greedy tokens as they come, the stop token not among them; ends when the package is full."""
        ids = list(prompt_ids)
        room = self.capacity - len(ids)
        if not ids or room < 1:
            raise InputError(f"{self.path}: a prompt of {len(ids)} tokens leaves no room in its {self.capacity}")
        if self.contract.mode == "decode":
            yield from self._generate_with_state(ids, min(max_new_tokens, room), stop_ids)
            return
        for _ in range(min(max_new_tokens, room)):
            token = int(self.prefill(ids)[-1].argmax())
            if token in stop_ids:
                return
            yield token
            ids.append(token)

    def _generate_with_state(self, ids: list[int], count: int, stop_ids: set[int]) -> Iterator[int]:
        state = self.program.make_state()
        names = [spec.name for spec in self.contract.inputs]
        position, made = 0, 0
        while True:
            feed = {names[0]: np.array([[ids[position]]], np.int32), names[1]: np.array([position], np.int32)}
            logits = self.program.predict(feed, state=state, policy=self.policy)[self.output][0, 0]
            position += 1
            if position < len(ids):
                continue
            token = int(logits.argmax())
            if token in stop_ids or made == count:
                return
            yield token
            made += 1
            ids.append(token)
