"""A Core AI asset against its contract, run by Apple's own runtime: here on Linux, on the CPU.

    distill coreai-verify X.aimodel [--report R.json] [--strict]

Whatever way the golden conversation is cut into calls, its logits, keys and values must be the training model's. An
fp32 asset is held to fp32 rounding, an fp16 one to the derived fp16 error: what is smaller, a slightly wrong weight
say, only the fp32 asset of the same checkpoint shows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill import gates
from distill.artifacts import provenance, sha256_file, write_json
from distill.contract import Contract, read_contract, sidecar_path
from distill.convert.coreai import PROGRAM, contract_folder, quiet
from distill.errors import InputError, PackageError, stage_main
from distill.export.conversation import directions
from distill.export.goldens import random_state
from distill.export.tolerance import relative_error, tolerance_factor
from distill.gates import Gate
from distill.verify.parity import exact_tolerance
from distill.verify.runner import Cut, cut
from distill.versions import installed

BACKEND = "Core AI"
_GOLDEN = ("input_ids", "prompt", "columns", "rows", "logits", "fp16_sigma", "greedy", "margins", "kv", "kv_sigma")
_FAR_ALLOWANCE = 4.0
"""Of a far call's relative error, times what is expected of fp16: it is the largest of a few."""
MAX_TIES = 0.1
"""Share of greedy steps that may be ties: with more, agreement says little."""


_LOAD = """
import asyncio, sys
from pathlib import Path
from coreai.authoring.asset import AIModelAsset
async def load():
    async with AIModelAsset.load(Path(sys.argv[1])).executable() as model:
        for name in model.function_names:
            model.load_function(name)
asyncio.run(load())
"""


class Conversation(NamedTuple):
    """What the asset made of the golden conversation."""

    logits: np.ndarray
    """[n, V] in fp32."""
    kv: np.ndarray
    """(2L, K, C, N) at the end, in fp32."""


class Asset:
    """A loaded asset. Its fingerprint is checked before (`read`), tokens and positions before each call."""

    def __init__(self, path: Path, contract: Contract) -> None:
        with quiet():
            from coreai.authoring.asset import AIModelAsset
            from coreai.runtime import NDArray
        self.path, self.contract, self._array, self._load = path, contract, NDArray, AIModelAsset.load
        self.dtype = np.dtype(contract.states[0].dtype)
        self._loop = asyncio.new_event_loop()
        self._stack = contextlib.AsyncExitStack()
        self._functions: dict[str, Any] = {}

    def __enter__(self) -> Asset:
        try:
            with native_quiet():
                executable = self._load(self.path).executable()
                model = self._loop.run_until_complete(self._stack.enter_async_context(executable))
                self._functions = {name: model.load_function(name) for name in self.contract.functions}
        except Exception as error:  # native code raises RuntimeError, ValueError and its own
            self._loop.close()
            raise PackageError(
                f"{self.path}: Core AI does not load it: {str(error).strip().splitlines()[0]}"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._functions.clear()
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()

    def interface_fault(self) -> str | None:
        """What of the asset is not as its contract says."""
        for name, function in self.contract.functions.items():
            found = self._functions[name].desc
            for kind in ("input", "output", "state"):
                describe = getattr(found, f"{kind}_descriptor")
                have = {key: _described(describe(key)) for key in getattr(found, f"{kind}_names")}
                want = {spec.name: (spec.shape, spec.dtype) for spec in getattr(function, f"{kind}s")}
                if have != want:
                    return f"{kind}s of {name} are {have}, not {want}"
        return None

    def state(self, values: np.ndarray | None = None) -> Any:
        """Keys and values of a conversation; zeros, or these."""
        shape = tuple(self.contract.states[0].shape)
        return self._array(np.zeros(shape, self.dtype) if values is None else values.astype(self.dtype))

    def call(self, name: str, ids: np.ndarray, first: int, state: Any) -> np.ndarray:
        """Logits [T, V] in fp32 of a function at position `first`; tokens short of T are padded. `state` is changed."""
        function = self.contract.functions[name]
        seq, context = function.tokens(), self.contract.states[0].shape[2]
        if not 0 < len(ids) <= seq or not 0 <= first <= context - seq:
            raise InputError(f"{self.path}: {name} takes 1 to {seq} tokens at positions up to {context - seq}, not "
                             f"{len(ids)} at {first}")  # fmt: skip
        if ids.min() < 0 or ids.max() >= self.contract.model_config.vocab_size:
            raise InputError(f"{self.path}: tokens outside its vocabulary of {self.contract.model_config.vocab_size}")
        padded = np.zeros((1, seq), np.int32)
        padded[0, : len(ids)] = ids
        tokens, position = (spec.name for spec in function.inputs)
        feed = {tokens: self._array(padded), position: self._array(np.array([first], np.int32))}
        states = {function.states[0].name: state}
        out = self._loop.run_until_complete(self._functions[name](feed, states))
        return out[function.outputs[0].name].numpy()[0].astype(np.float32)

    def converse(self, ids: np.ndarray, cuts: list[Cut]) -> Conversation:
        """Feed tokens [n] so cut, from an empty state."""
        state, first, parts = self.state(), 0, []
        for name, tokens in cuts:
            parts.append(self.call(name, ids[first : first + tokens], first, state)[:tokens])
            first += tokens
        return Conversation(np.concatenate(parts), state.numpy().astype(np.float32))


def _described(value: Any) -> tuple[list[int], str]:
    return [int(size) for size in value.shape], str(value.dtype)


def read(path: Path) -> tuple[Contract, dict[str, np.ndarray]]:
    """The contract and goldens beside an asset; PackageError where a fingerprint or a golden is not the contract's."""
    if path.suffix != ".aimodel" or not path.is_dir():
        raise PackageError(f"{path}: no Core AI asset (a folder X.aimodel)")
    folder = contract_folder(path)
    contract = read_contract(folder / "contract.json")
    if contract.schema != "distill-coreai/1" or contract.file is None or contract.file.name != PROGRAM:
        raise PackageError(f"{folder}: is no Core AI asset's contract")
    if sha256_file(path / PROGRAM) != contract.file.sha256:
        raise PackageError(f"{path / PROGRAM}: altered: its sha256 is not the one in the contract; not loaded")
    if "goldens" not in contract.sidecar:
        raise PackageError(f"{folder}: its contract names no goldens")
    file = sidecar_path(folder, contract.sidecar["goldens"])
    if sha256_file(file) != contract.sidecar["goldens"].sha256:
        raise PackageError(f"{file}: altered: its sha256 is not the one in the contract")
    try:
        golden = load_file(file)
    except (SafetensorError, OSError) as error:
        raise PackageError(f"{file}: cannot be read: {error}") from error
    if wrong := _wrong_golden(contract, golden):
        raise PackageError(f"{file}: {wrong} is not what the contract says")
    return contract, golden


def _wrong_golden(contract: Contract, golden: dict[str, np.ndarray]) -> str | None:
    """The first golden of a shape or range that the contract rules out."""
    far = [f"far.{name}.{key}" for name in contract.functions for key in ("ids", "at", "logits_half", "kv_half")]
    if missing := next((name for name in (*_GOLDEN, *far) if name not in golden), None):
        return missing
    (layers2, heads, context, width), vocab = contract.states[0].shape, contract.model_config.vocab_size
    ids, rows, columns, p = golden["input_ids"], golden["rows"], golden["columns"], golden["prompt"]
    n, q = ids.shape[-1], len(directions(width))
    if ids.shape != (1, n) or not 1 < n <= context or ids.min() < 0 or ids.max() >= vocab:
        return "input_ids"
    if p.shape != (1,) or not 0 < p[0] < n:
        return "prompt"
    steps = n - int(p[0]) + 1
    if rows[-steps:].tolist() != list(range(int(p[0]) - 1, n)):
        return "rows"
    for name, found, top in (("rows", rows, n), ("columns", columns, vocab)):
        if found.ndim != 1 or not found.size or found.min() < 0 or found.max() >= top:
            return name
    wanted = {"logits": (len(rows), len(columns)), "fp16_sigma": (len(rows), 1), "greedy": (steps,),
              "margins": (steps,), "kv": (layers2, heads, n, q),
              "kv_sigma": (layers2, n)}  # fmt: skip
    return next((name for name, shape in wanted.items() if golden[name].shape != shape), None)


def _require_loadable(path: Path) -> None:
    """Apple's reader ends the process at what it cannot read, so another process loads the asset first."""
    done = subprocess.run([sys.executable, "-c", _LOAD, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = f"its process died of signal {-done.returncode}" if done.returncode < 0 else lines[-1]
        raise PackageError(f"{path}: Core AI does not load it: {reason}")


def run(path: Path) -> dict[str, Gate]:
    """Every gate of an asset; each skipped, with its reason, where the runtime is not installed."""
    contract, golden = read(path)
    names = ["interface", *(f"through_{name}" for name in contract.functions), "as_used", "greedy", "far_calls"]
    if installed("coreai_core") is None:
        return {name: gates.skipped("coreai-core is not installed: pip install 'distill[coreai]'") for name in names}
    _require_loadable(path)
    with Asset(path, contract) as asset:
        if fault := asset.interface_fault():
            wrong = gates.holds(False, backend=BACKEND, reason=fault)
            return dict.fromkeys(names, gates.failed("not reached: the interface is wrong")) | {"interface": wrong}
        out = {"interface": gates.holds(True, observed=f"{len(contract.functions)} functions", backend=BACKEND)}
        ids, sizes = golden["input_ids"][0], {name: f.tokens() for name, f in contract.functions.items()}
        context = contract.states[0].shape[2]
        for name, size in sizes.items():
            cuts = cut(0, len(ids), context, {"decode": 1, name: size})
            out[f"through_{name}"] = _parity(asset.converse(ids, cuts), contract, golden)
        p = int(golden["prompt"][0])
        used = cut(0, p, context, sizes) + cut(p, len(ids) - p, context, {"decode": 1})
        found = asset.converse(ids, used)
        out["as_used"] = _parity(found, contract, golden)
        out["greedy"] = _greedy(found, contract, golden, p)
        out["far_calls"] = _far(asset, golden)
    return out


def _parity(found: Conversation, contract: Contract, golden: dict[str, np.ndarray]) -> Gate:
    """Logits, and keys and values at the end, against the training model's."""
    logits = found.logits[golden["rows"]][:, golden["columns"]].astype(np.float64)
    n, kv = golden["kv"].shape[2], found.kv
    products = kv[:, :, :n].astype(np.float64) @ directions(kv.shape[3]).numpy().T.astype(np.float64)
    if contract.states[0].dtype == "float32":
        worst = max(_relative(logits, golden["logits"]), _relative(products, golden["kv"], axis=(1, 3)))
        what = "||difference|| / ||reference||, worst position, of logits, keys and values"
        return gates.at_most(worst, exact_tolerance(contract), backend=BACKEND, reason=what)
    more = _sequential(contract, n)
    sigma = more * golden["fp16_sigma"] * tolerance_factor(contract.model_config.vocab_size)
    kv_sigma = more * golden["kv_sigma"][:, None, :, None] * tolerance_factor(products.size)
    shares = [_worst(np.abs(logits - golden["logits"]) / sigma), _worst(np.abs(products - golden["kv"]) / kv_sigma)]
    reason = f"share of the derived fp16 error: logits {shares[0]:.2f}, keys and values {shares[1]:.2f}"
    return gates.at_most(_worst(np.array(shares)), 1.0, backend=BACKEND, reason=reason)


def _sequential(contract: Contract, tokens: int) -> float:
    """By how much fp16's derived error grows in this runtime: it adds the products of a matmul one after the other in
    fp16 (docs/executor.md). The partial sums of K independent terms count as K/2 roundings of the whole; attention
    has two such sums in a layer, over head width and over tokens, beside the 32 L + 8 of `relative_error`."""
    model = contract.model_config
    counted = 32 * model.num_hidden_layers + 8
    return math.sqrt(1 + model.num_hidden_layers * (model.head_dim + tokens) / 2 / counted)


def _greedy(found: Conversation, contract: Contract, golden: dict[str, np.ndarray], prompt: int) -> Gate:
    """PyTorch's greedy tokens at every step after the prompt, but for ties within the derived error."""
    chosen = found.logits[prompt - 1 :].argmax(-1)
    wrong = np.flatnonzero(chosen != golden["greedy"])
    more = _sequential(contract, len(found.logits))
    tolerance = more * golden["fp16_sigma"][-len(chosen) :, 0] * tolerance_factor(found.logits.shape[1])
    ties = int((golden["margins"][wrong] < tolerance[wrong]).sum())
    other = len(wrong) - ties
    ok = other == 0 and ties <= MAX_TIES * len(chosen)
    return gates.holds(ok, observed=f"{other} other tokens, {ties} ties in {len(chosen)} steps", backend=BACKEND)


def _far(asset: Asset, golden: dict[str, np.ndarray]) -> Gate:
    """Calls up to the end of the context, each over a state full of random values; no other row may change."""
    contract = asset.contract
    filled = random_state(tuple(contract.states[0].shape))
    worst = 0.0
    for name, function in contract.functions.items():
        seq = function.tokens()
        far = {key: golden[f"far.{name}.{key}"] for key in ("ids", "at", "logits_half", "kv_half")}
        for ids, first, logits, rows in zip(*far.values(), strict=True):
            state = asset.state(filled)
            out = asset.call(name, ids, int(first), state)[[0, seq - 1]][:, golden["columns"]]
            kv = state.numpy().astype(np.float32)
            written = kv[:, :, first : first + seq] @ directions(kv.shape[3]).numpy().T
            kv[:, :, first : first + seq] = filled[:, :, first : first + seq]
            if not np.array_equal(kv, filled):
                return gates.holds(False, backend=BACKEND, reason=f"{name} at {first} changed the state elsewhere")
            worst = max(worst, _relative(out, logits), _relative(written, rows, axis=(1, 2, 3)))
    expected = contract.fp16_gain * relative_error(contract.model_config.num_hidden_layers)
    expected *= _sequential(contract, contract.states[0].shape[2])
    what = "||difference|| / ||reference|| over a full context, the reference's constants in fp16"
    return gates.at_most(worst, _FAR_ALLOWANCE * expected, backend=BACKEND, reason=what)


def _relative(found: np.ndarray, reference: np.ndarray, axis: Any = -1) -> float:
    reference = reference.astype(np.float64)
    norms = np.sqrt(np.sum(reference**2, axis=axis))
    return _worst(np.sqrt(np.sum((found - reference) ** 2, axis=axis)) / np.where(norms > 0, norms, 1))


def _worst(values: np.ndarray) -> float:
    """The largest; NaN anywhere is the worst of all."""
    return math.nan if np.isnan(values).any() else float(values.max())


@contextlib.contextmanager
def native_quiet() -> Iterator[None]:
    """Without what the runtime writes to the process's own stdout and stderr, past Python's."""
    null, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(1), os.dup(2)]
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse, verify, print the table and the closing line."""
    parser = argparse.ArgumentParser(prog="distill coreai-verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="X.aimodel")
    parser.add_argument("--report", type=Path, help="where the JSON report goes")
    parser.add_argument("--strict", action="store_true", help="exit 3 if anything was skipped")
    args = parser.parse_args(argv)
    result = run(args.model)
    if args.report is not None:
        made = provenance({}, {"contract": contract_folder(args.model) / "contract.json"})
        versions = {name: installed(name) for name in ("coreai-core", "coreai-torch", "torch")}
        report = {"schema": "distill-coreai-report/1", "gates": gates.to_json(result), "versions": versions}
        write_json(args.report, report | {"made_by": msgspec.to_builtins(made)})
    print(gates.table(result))
    print(f"{args.model}: {gates.summary(result)}")
    return gates.exit_code(result, strict=args.strict)
