"""A generator against its golden conversation: each function alone, and all together call by call.

The reference is PyTorch's (distill/export/conversation.py); every logit, key and value of it is the same however the
tokens are cut into calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill import gates
from distill.errors import PackageError
from distill.export.conversation import STEPS, alone, directions, kept_columns, kept_rows, prompt_length
from distill.export.goldens import random_state
from distill.export.tolerance import tolerance_factor
from distill.gates import Gate
from distill.verify import outputs, parity
from distill.verify.runner import Conversation, Cut, PackageRunner, cut

if TYPE_CHECKING:
    from distill.verify.contracts import Check

EXECUTOR = "distill.mil"
STATE_TOLERANCE = 2.0**-11
"""Of a key or value in the state, without rounding: its declared type."""
MAX_GAIN = 8.0
"""A model that amplifies rounding more than this has a derived error too wide to say anything."""


class Difference(NamedTuple):
    """Of logits or states from their reference."""

    relative: float
    """Largest ||difference|| / ||reference|| of a row."""
    share: float
    """Largest |difference| as a share of the derived fp16 error."""

    def worse(self, other: Difference) -> Difference:
        """The larger of each; NaN is the largest."""
        return Difference(*(math.nan if math.isnan(a + b) else max(a, b) for a, b in zip(self, other, strict=True)))


NONE = Difference(0.0, 0.0)


class Session:
    """A generator and its golden conversation; PackageError where the goldens cannot be those of the contract."""

    def __init__(self, runner: PackageRunner) -> None:
        self.runner, self.contract = runner, runner.contract
        path = runner.sidecar("goldens")
        try:
            self.golden = load_file(path)
        except (SafetensorError, OSError) as error:
            raise PackageError(f"{path}: cannot be read: {error}") from error
        if wrong := self._wrong():
            raise PackageError(f"{path}: {wrong} is not what the contract says")
        self.ids: list[int] = self.golden["input_ids"][0].tolist()
        self.prompt = int(self.golden["prompt"][0])
        model = self.contract.model_config
        self.factor = tolerance_factor(model.vocab_size)
        self.kv_factor = tolerance_factor(self.golden["kv"].size)
        self.directions = directions(model.head_dim).numpy()
        self.state = self.contract.states[0].name

    def _wrong(self) -> str | None:
        """The first golden of a shape or range that the contract rules out: all of it follows from the contract."""
        model, context, golden = self.contract.model_config, self.runner.capacity, self.golden
        chunks = [size for size in self.runner.functions.values() if size > 1]
        p = prompt_length(context, chunks)
        n = p + min(STEPS, context - p)
        rows, columns = kept_rows(p, n, chunks), kept_columns(model.vocab_size)
        count, (r, m) = 2 * model.num_hidden_layers, (len(rows), len(columns))
        kv = (count, model.num_key_value_heads, n, directions(model.head_dim).shape[0])
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": (1, n), "prompt": (1,), "columns": (m,), "rows": (r,), "logits": (r, m), "logits_half": (r, m),
            "fp16_sigma": (r, 1), "greedy": (n - p + 1,), "margins": (n - p + 1,), "kv": kv, "kv_half": kv,
            "kv_sigma": (count, n), "embed_check": (model.vocab_size,), "end.logits": (1, m), "end.fp16_sigma": (1, 1),
        }  # fmt: skip
        for name, size in self.runner.functions.items():
            at = golden.get(f"far.{name}.at", np.zeros(0, np.int32))
            if at.ndim != 1 or not at.size or at.min() < 0 or at.max() != context - size:
                return f"far.{name}.at"
            shapes |= {
                f"far.{name}.ids": (len(at), size), f"far.{name}.logits_half": (len(at), 2, m),
                f"far.{name}.kv_half": (len(at), count, kv[1], size, kv[3]),
            }  # fmt: skip
        for name, shape in shapes.items():
            kind = (
                "i" if name.rpartition(".")[2] in ("input_ids", "prompt", "columns", "rows", "greedy", "ids") else "f"
            )
            if name not in golden or golden[name].shape != shape or golden[name].dtype.kind != kind:
                return name
        tokens = [name for name in golden if name.rpartition(".")[2] in ("input_ids", "greedy", "ids")]
        if wrong := next((t for t in tokens if golden[t].min() < 0 or golden[t].max() >= model.vocab_size), None):
            return wrong
        if golden["prompt"][0] != p or golden["greedy"][:-1].tolist() != golden["input_ids"][0, p:].tolist():
            return "prompt"
        if not np.array_equal(golden["rows"], rows) or not np.array_equal(golden["columns"], columns):
            return "rows"
        sigmas = (golden["fp16_sigma"], golden["kv_sigma"], golden["end.fp16_sigma"])
        return None if all(np.isfinite(s).all() and (s > 0).all() for s in sigmas) else "fp16_sigma"

    # --- against the reference -----------------------------------------------------------------------------------

    def logits(self, found: np.ndarray, first: int) -> Difference:
        """Logits [n, V] of the tokens from `first` on, where the goldens keep any."""
        rows = self.golden["rows"]
        kept = np.flatnonzero((rows >= first) & (rows < first + len(found)))
        if not len(kept):
            return NONE
        here = found[rows[kept] - first][:, self.golden["columns"]].astype(np.float64)
        exact = self.runner.policy == "fp32"
        difference = here - self.golden["logits_half" if exact else "logits"][kept]
        allowed = self.golden["fp16_sigma"][kept] * self.factor
        norms = np.linalg.norm(self.golden["logits"][kept], axis=-1)
        return Difference(largest(np.linalg.norm(difference, axis=-1) / norms), largest(np.abs(difference) / allowed))

    def end(self, found: np.ndarray) -> float:
        """Logits [1, V] of the last position of the context, as a share of the derived error."""
        difference = found[:, self.golden["columns"]].astype(np.float64) - self.golden["end.logits"]
        return largest(np.abs(difference) / (self.golden["end.fp16_sigma"] * self.factor))

    def rows(self, kv: np.ndarray, first: int, count: int) -> Difference:
        """Keys and values [2L, K, C, N] of `count` tokens from `first` on."""
        exact = self.runner.policy == "fp32"
        reference = self.golden["kv_half" if exact else "kv"][:, :, first : first + count].astype(np.float64)
        difference = kv[:, :, first : first + count] @ self.directions.T - reference
        typical = np.sqrt(np.mean(self.golden["kv"].astype(np.float64) ** 2, axis=(1, 2, 3)))[:, None, None]
        size = np.maximum(np.sqrt(np.mean(reference**2, axis=-1)), typical)  # a row may be near zero
        allowed = self.golden["kv_sigma"][:, None, first : first + count, None] * self.kv_factor
        norms = np.sqrt(np.mean(difference**2, axis=-1))
        return Difference(largest(norms / size), largest(np.abs(difference) / allowed))

    # --- each function alone -------------------------------------------------------------------------------------

    def alone(self) -> dict[str, Alone]:
        """Each function on the beginning of the conversation."""
        out = {}
        for name, size in self.runner.functions.items():
            state, logits, kv, all_found = self.runner.program.make_state(), NONE, NONE, []
            for first in alone(size, len(self.ids)):
                found = self.runner.call(name, self.ids[first : first + size], first, state)
                logits = logits.worse(self.logits(found, first))
                kv = kv.worse(self.rows(state.read(self.state), first, len(found)))
                all_found.append(found)
            out[name] = Alone(logits, kv, np.concatenate(all_found))
        return out

    def far(self) -> tuple[float, str]:
        """Calls over a state full of random values, up to the last position: the largest relative error of logits and
        of what is written, with its place. PackageError if a call changes any other row."""
        worst, where = 0.0, ""
        filled = random_state(tuple(self.contract.states[0].shape))
        for name, size in self.runner.functions.items():
            golden = {key: self.golden[f"far.{name}.{key}"] for key in ("at", "ids", "logits_half", "kv_half")}
            for index, first in enumerate(golden["at"].tolist()):
                state = self.runner.program.make_state()
                state.write(self.state, filled)
                logits = self.runner.call(name, golden["ids"][index].tolist(), first, state)[[0, -1]]
                kv = state.read(self.state)
                require_only(kv, filled, first, size, f"{name} at position {first}")
                written = kv[:, :, first : first + size] @ self.directions.T
                for found, key in ((logits[:, self.golden["columns"]], "logits_half"), (written, "kv_half")):
                    error = distance(found, golden[key][index])
                    if not error <= worst:
                        worst, where = error, f"{key.removesuffix('_half')} of {name} at position {first}"
        return worst, where

    # --- all together --------------------------------------------------------------------------------------------

    def follow(self, conversation: Conversation, ids: Sequence[int], cuts: Sequence[Cut]) -> Iterator[Call]:
        """Feed the golden tokens, and look at the state after every call."""
        before = conversation.state.read(self.state)
        for function, count in cuts:
            first, ids_now = conversation.position, ids[:count]
            found = conversation.feed(ids_now, [Cut(function, count)])
            kv = conversation.state.read(self.state)
            require_only(kv, before, first, self.runner.functions[function], f"{function} at position {first}")
            before, ids = kv, ids[count:]
            yield Call(found, self.logits(found, first), self.rows(kv, first, count))

    def run_all(self) -> Used:
        """The prompt in chunks, then the greedy tokens one by one, with the reference's own tokens."""
        conversation = self.runner.begin()
        cuts = cut(0, self.prompt, self.runner.capacity, self.runner.functions)
        steps = [Cut("decode", 1)] * (len(self.ids) - self.prompt)
        logits, kv, chosen = NONE, NONE, []
        for index, call in enumerate(self.follow(conversation, self.ids, [*cuts, *steps])):
            logits, kv = logits.worse(call.logits), kv.worse(call.kv)
            if index >= len(cuts) - 1:
                chosen.append(int(call.found[-1].argmax()))
        return Used(cuts, chosen, logits, kv, conversation)


class Alone(NamedTuple):
    """One function, judged alone."""

    logits: Difference
    kv: Difference
    """Of what it leaves in the state."""
    found: np.ndarray
    """Its logits [n, V]."""


class Call(NamedTuple):
    """One call of the golden conversation."""

    found: np.ndarray
    logits: Difference
    kv: Difference


class Used(NamedTuple):
    """The golden conversation, fed as the runner feeds it."""

    cuts: list[Cut]
    chosen: list[int]
    """The package's greedy token after the prompt and after each step."""
    logits: Difference
    kv: Difference
    conversation: Conversation


# --- the gates of its functions ---------------------------------------------------------------------------------------


def check_functions(check: Check, runner: PackageRunner) -> bool:
    """What every package is asked, of each function; False where one does not run."""
    found: dict[str, dict[str, Alone]] = {}

    def shapes() -> Gate:
        check.session = Session(runner)
        check.golden = check.session.golden
        for policy in ("ieee16", "fp32"):
            runner.policy = policy
            found[policy] = check.session.alone()
        runner.policy = "ieee16"
        return gates.holds(True, observed=runner.functions, backend=EXECUTOR)

    if not check.gate("shapes_run", shapes) or check.session is None:
        check.give_up("a function does not run")
        return False
    session, rounded, exact = check.session, found["ieee16"], found["fp32"]
    check.gate("outputs_finite", lambda: outputs.finite(np.concatenate([one.found for one in rounded.values()])))
    check.gate("outputs_vary", lambda: _least([outputs.vary(one.found[None]) for one in rounded.values()]))
    check.gate("parity_exact", lambda: _exact(session, exact))
    check.gate("parity_fp16", lambda: _fp16(session, rounded))
    check.gate("state", lambda: _state(session, exact))
    check.gate("named_points", lambda: _points(session))
    for name in rounded:
        check.details.setdefault("functions", {})[name] = {
            "parity_exact": plain(exact[name].logits.relative), "parity_fp16": plain(rounded[name].logits.share),
            "state": plain(exact[name].kv.relative),
        }  # fmt: skip
    return True


def _least(verdicts: list[Gate]) -> Gate:
    return next((gate for gate in verdicts if gate.status != "pass"), min(verdicts, key=lambda gate: gate.observed))


def _exact(session: Session, exact: dict[str, Alone]) -> Gate:
    runner, backend = session.runner, f"{EXECUTOR} fp32"
    worst = max(exact, key=lambda name: rank(exact[name].logits.relative))
    observed, tolerance = exact[worst].logits.relative, parity.exact_tolerance(session.contract)
    for name in exact:
        wrong = parity.wrong_embedding(runner, session.golden, name) or parity.wrong_weights(runner, name)
        if wrong:
            return gates.holds(
                False, observed=observed, threshold=tolerance, backend=backend, reason=f"{name}: {wrong}"
            )
    reason = f"||difference|| / ||logits||, worst position, in {worst}"
    return gates.at_most(observed, tolerance, backend=backend, reason=reason)


def _fp16(session: Session, rounded: dict[str, Alone]) -> Gate:
    worst = max(rounded, key=lambda name: rank(rounded[name].logits.share))
    observed, gain = rounded[worst].logits.share, session.contract.fp16_gain
    reason = f"share of the derived fp16 error, worst in {worst}, gain {gain:.2f}"
    if gain > MAX_GAIN:
        return Gate("inconclusive", plain(observed), 1.0, f"{EXECUTOR} ieee16", f"{reason}, above {MAX_GAIN:g}")
    return gates.at_most(observed, 1.0, backend=f"{EXECUTOR} ieee16", reason=reason)


def _state(session: Session, exact: dict[str, Alone]) -> Gate:
    """What each function leaves in the state, and its calls far into the context."""
    backend = f"{EXECUTOR} fp32"
    worst = max(exact, key=lambda name: rank(exact[name].kv.relative))
    session.runner.policy = "fp32"
    try:
        far, where = session.far()
    finally:
        session.runner.policy = "ieee16"
    near, tolerance = exact[worst].kv.relative, parity.exact_tolerance(session.contract)
    if rank(near) > STATE_TOLERANCE:
        reason = f"relative error of keys and values that {worst} leaves"
        return gates.at_most(near, STATE_TOLERANCE, backend=backend, reason=reason)
    reason = f"single calls over a full context, worst {where}; keys and values elsewhere {near:.2g}"
    return gates.at_most(far, max(tolerance, STATE_TOLERANCE), backend=backend, reason=reason)


def _points(session: Session) -> Gate:
    golden, rows = session.golden, session.golden["probe_rows"]
    expected = {key.removeprefix("probe."): value for key, value in golden.items() if key.startswith("probe.")}
    if not expected:
        raise PackageError("the goldens lack the named points that a twin has")
    counted, worst = 0, 0.0
    for name, size in session.runner.functions.items():
        inside = rows < min(size, len(session.ids))
        points = parity.compare_points(
            session.runner, {key: value[..., inside] for key, value in expected.items()},
            session.ids[:size], rows[inside], function=name,
        )  # fmt: skip
        gate = parity.points_gate(points, session.contract)[1]
        if gate.status != "pass":
            return Gate(gate.status, gate.observed, gate.threshold, gate.backend, f"{name}: {gate.reason}")
        counted, worst = counted + len(points), max(worst, gate.observed)
    tolerance = parity.exact_tolerance(session.contract)
    return gates.at_most(worst, tolerance, backend=f"{EXECUTOR} fp32", reason=f"{counted} points")


def require_only(kv: np.ndarray, before: np.ndarray, first: int, size: int, what: str) -> None:
    """PackageError if any row but those of the call changed."""
    for rows in (slice(0, first), slice(first + size, None)):
        if not np.array_equal(kv[:, :, rows], before[:, :, rows]):
            raise PackageError(f"{what} changed the state at another position")


def distance(found: np.ndarray, reference: np.ndarray) -> float:
    reference = reference.astype(np.float64)
    return rank(float(np.linalg.norm(found.astype(np.float64) - reference) / np.linalg.norm(reference)))


def largest(values: np.ndarray) -> float:
    return math.nan if np.isnan(values).any() else float(values.max())


def rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
