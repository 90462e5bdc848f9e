"""A package against its goldens: logits, named points, and the first op that diverges.

Two questions are kept apart. `exact`: does the program mean what the trained model means? Run under the executor's
`fp32` policy against the twin with fp16-rounded constants, only fp32 summation order differs. `fp16`: is the
arithmetic of the declared types good enough? Run under `ieee16` against the training model, within the derived error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill import gates
from distill.contract import Contract
from distill.errors import PackageError
from distill.export.goldens import embedding_check, golden_positions, random_state
from distill.export.tolerance import relative_error
from distill.gates import Gate
from distill.mil.planner import prepare
from distill.mil.policy import make_policy
from distill.mil.program import Function, Operation
from distill.verify.runner import PackageRunner

EXACT_TOLERANCE = 2e-5
"""Normwise relative error of logits, per position, under the fp32 policy, for models of up to about 12 layers. What the
same program shows when only its summation order differs stays below 7e-6 there; a 1% change of any one matrix lies
above 7e-5 in every configuration measured (tests/integration/test_planted_faults.py)."""


def exact_tolerance(contract: Contract) -> float:
    """EXACT_TOLERANCE, or where the model is deeper or wider: sqrt(n) gain eps32.

    eps32 is `relative_error` with fp32's unit roundoff 2**-24 for fp16's 2**-11, gain the model's amplification of
    rounding; a sum of n terms in another order errs by about sqrt(n) roundings, n the longest that the model takes.
    """
    model = contract.model_config
    longest = math.sqrt(max(model.hidden_size, model.intermediate_size))
    return max(EXACT_TOLERANCE, longest * contract.fp16_gain * relative_error(model.num_hidden_layers) * 2.0**-13)


class Comparison(NamedTuple):
    """Logits of a package against a reference, over all golden positions."""

    max_error: float
    relative: float
    """Largest ||difference|| / ||reference|| over positions."""
    sigmas: float
    """Largest |difference| as a share of the derived fp16 tolerance; NaN where not asked for."""
    psnr: float
    kl: float
    """Mean KL(reference || package) in nats."""
    top1: float
    """Share of positions with the same best token."""


def load_goldens(runner: PackageRunner) -> dict[str, np.ndarray]:
    """The goldens of a package's sidecar; PackageError if they cannot be what the contract says."""
    path = runner.sidecar("goldens")
    try:
        golden = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PackageError(f"{path}: cannot be read: {error}") from error
    inputs: tuple[str, ...] = ("input",)
    if runner.contract.mode != "block":
        inputs = ("input_ids", "positions", "embed_check")
    if runner.contract.mode == "decode":
        inputs += ("far_ids", "far_positions", "far_logits_half", "far_kv")
    needed = (*inputs, "logits", "logits_half", "fp16_sigma")
    if missing := [name for name in needed if name not in golden]:
        raise PackageError(f"{path}: lacks {', '.join(missing)}")
    if wrong := _wrong_golden(runner, golden):
        raise PackageError(f"{path}: {wrong} is not what the contract says")
    return golden


def _wrong_golden(runner: PackageRunner, golden: dict[str, np.ndarray]) -> str | None:
    """The first golden of a shape or range that the package's contract rules out."""
    contract = runner.contract
    logits, out = golden["logits"], contract.outputs[0].shape
    if contract.mode == "block":
        if list(golden["input"].shape) != contract.inputs[0].shape:
            return "input"
    else:
        ids, at = golden["input_ids"], golden["positions"]
        longest = runner.capacity if contract.mode == "decode" else contract.sequence()
        if ids.ndim != 2 or not 0 < ids.shape[1] <= longest or not ids.shape[0] or ids.dtype.kind not in "iu":
            return "input_ids"
        if ids.min() < 0 or ids.max() >= contract.model_config.vocab_size:
            return "input_ids"
        if at.ndim != 1 or at.dtype.kind not in "iu" or at.min() < 0 or at.max() != ids.shape[1] - 1:
            return "positions"
        if len(at) != golden_positions(contract.mode, longest, out[-1]):
            return "positions"
        if logits.shape != (len(ids), len(at), out[-1]):
            return "logits"
    if golden["logits_half"].shape != logits.shape:
        return "logits_half"
    if contract.mode != "block" and golden["embed_check"].shape != (contract.model_config.vocab_size,):
        return "embed_check"
    if contract.mode == "decode" and (wrong := _wrong_far(runner, golden)):
        return wrong
    sigma = golden["fp16_sigma"]
    plausible = np.isfinite(sigma).all() and (sigma > 0).all()
    return None if sigma.shape == (*logits.shape[:-1], 1) and plausible else "fp16_sigma"


def _wrong_far(runner: PackageRunner, golden: dict[str, np.ndarray]) -> str | None:
    config, context, at = runner.contract.model_config, runner.capacity, golden["far_positions"]
    if at.ndim != 1 or not at.size or at.min() < 0 or at.max() != context - 1:
        return "far_positions"
    if (
        golden["far_ids"].shape != at.shape
        or golden["far_ids"].min() < 0
        or golden["far_ids"].max() >= config.vocab_size
    ):
        return "far_ids"
    if golden["far_logits_half"].shape != (len(at), config.vocab_size):
        return "far_logits_half"
    shape = runner.contract.states[0].shape
    return None if golden["far_kv"].shape == (len(at), shape[0], shape[1], shape[3]) else "far_kv"


def run_goldens(runner: PackageRunner, golden: dict[str, np.ndarray]) -> np.ndarray:
    """The package's logits [P, n, V] on the golden inputs at the golden positions.

    A block's output (1, D, 1, S) is taken as [1, S, D].
    """
    if runner.contract.mode == "block":
        name = runner.contract.inputs[0].name
        out = runner.program.predict({name: golden["input"]}, policy=runner.policy)[runner.output]
        return out[:, :, 0].swapaxes(1, 2)
    return np.stack([runner.logits(row.tolist())[golden["positions"]] for row in golden["input_ids"]])


def matrices(runner: PackageRunner, function_name: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every matrix that a convolution or a look-up takes: how it is stored, and its values as the executor gets them,
    in fp16."""
    function = runner.program.function(function_name)
    plan = prepare(runner.program, function, make_policy("ieee16"))
    for step in plan.instructions:
        parameter = {"conv": "weight", "gather": "x"}.get(step.op.type, "")
        value = step.fixed.get(parameter)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            maker = function.producers.get(str(step.op.inputs[parameter][0]))
            yield _stored_as(function, maker), value.half().numpy()


def _stored_as(function: Function, maker: Operation | None) -> str:
    """Kind and bits of a weight's format, as the contract writes them: int4, lut6, ..."""
    if maker is None or not maker.type.startswith("constexpr_"):
        return "fp16"
    kind, codes = {
        "constexpr_blockwise_shift_scale": ("int", "data"),
        "constexpr_lut_to_dense": ("lut", "indices"),
    }.get(maker.type, (maker.type, ""))
    value = function.constant(maker.inputs[codes][0]) if codes in maker.inputs else None
    return kind if value is None else kind + value.type.dtype.lstrip("uint")


def wrong_weights(runner: PackageRunner, function_name: str | None = None) -> str | None:
    """The first matrix of the contract that the function does not hold, bit for bit and in its format."""
    found: dict[str, set[str]] = {}
    for stored, values in matrices(runner, function_name):
        found.setdefault(hashlib.sha256(np.ascontiguousarray(values).data).hexdigest(), set()).add(stored)
    for name, weight in runner.contract.weights.items():
        if weight.sha256 not in found:
            return f"{name}: no matrix of the program has its values"
        if weight.format.split("/")[0] not in found[weight.sha256]:
            return f"{name}: stored as {', '.join(sorted(found[weight.sha256]))}, the contract says {weight.format}"
    return None


def wrong_embedding(
    runner: PackageRunner, golden: dict[str, np.ndarray], function_name: str | None = None
) -> str | None:
    """What is wrong with the table that token ids look up; None if every row is the trained one, rounded to fp16."""
    config = runner.contract.model_config
    tables = [v for _, v in matrices(runner, function_name) if v.shape == (config.vocab_size, config.hidden_size)]
    if len(tables) != 1:
        return f"{len(tables)} constants look like the embedding, expected one"
    found = embedding_check(torch.from_numpy(tables[0].astype(np.float32))).numpy().astype(np.float64)
    expected = golden["embed_check"].astype(np.float64)
    allowed = EXACT_TOLERANCE * np.sqrt(np.mean(expected**2))
    wrong = np.flatnonzero(~(np.abs(found - expected) <= allowed))
    return f"{wrong.size} rows of the embedding are not the trained ones, first {wrong[0]}" if wrong.size else None


def far_steps(runner: PackageRunner, golden: dict[str, np.ndarray]) -> tuple[float, float]:
    """Decode steps far into the context: worst relative error of logits, and of the keys and values written.

    Each runs under the fp32 policy over a state full of random values. PackageError if a step changes any other row.
    """
    name = runner.contract.states[0].name
    token_name, position_name = (spec.name for spec in runner.contract.inputs)
    filled = random_state(tuple(runner.contract.states[0].shape))
    worst_logits = worst_rows = 0.0
    for index, position in enumerate(golden["far_positions"].tolist()):
        state = runner.program.make_state()
        state.write(name, filled)
        feed = {token_name: golden["far_ids"][index].reshape(1, 1), position_name: np.array([position], np.int32)}
        logits = runner.program.predict(feed, state=state, policy="fp32")[runner.output][0, 0]
        kv = state.read(name)
        written = kv[:, :, position].astype(np.float64)
        kv[:, :, position] = filled[:, :, position]
        if not np.array_equal(kv, filled):
            raise PackageError(f"decoding at position {position} changed the state at another position")
        worst_logits = max(worst_logits, _distance(logits, golden["far_logits_half"][index]))
        worst_rows = max(worst_rows, _distance(written, golden["far_kv"][index]))
    return worst_logits, worst_rows


def _distance(found: np.ndarray, reference: np.ndarray) -> float:
    """||found - reference|| / ||reference||; NaN is infinitely far."""
    reference = reference.astype(np.float64)
    distance = float(np.linalg.norm(found.astype(np.float64) - reference) / np.linalg.norm(reference))
    return distance if math.isfinite(distance) else math.inf


def compare(found: np.ndarray, reference: np.ndarray, tolerance: np.ndarray | None = None) -> Comparison:
    """Compare logits [..., V]; `tolerance` [..., 1] is the derived absolute error."""
    if found.shape != reference.shape:
        raise PackageError(f"logits have shape {list(found.shape)}, the goldens {list(reference.shape)}")
    found, reference = found.astype(np.float64), reference.astype(np.float64)
    difference = found - reference
    norms = np.linalg.norm(reference, axis=-1)
    relative = np.linalg.norm(difference, axis=-1) / np.where(norms > 0, norms, 1)
    mse = float(np.mean(difference**2))
    peak = float(np.abs(reference).max())
    return Comparison(
        max_error=float(np.abs(difference).max()),
        relative=_worst(relative),
        sigmas=math.nan if tolerance is None else _worst(np.abs(difference) / tolerance),
        psnr=math.inf if mse == 0 else 20 * math.log10(peak) - 10 * math.log10(mse) if peak > 0 else -math.inf,
        kl=float(np.mean(_kl(reference, found))),
        top1=float(np.mean(found.argmax(-1) == reference.argmax(-1))),
    )


class Point(NamedTuple):
    """One named point of the student, compared."""

    name: str
    value: str
    """Name of the program's value there."""
    op: str
    max_error: float
    relative: float
    psnr: float


def compare_points(
    runner: PackageRunner,
    expected: dict[str, np.ndarray],
    ids: list[int],
    positions: np.ndarray | None,
    *,
    policy: str = "fp32",
    channels_first: bool = False,
    function: str | None = None,
) -> list[Point]:
    """Run the program, of a generator one of its functions, on `ids` and compare its named points, in program order.

    `expected`: point -> values; with `positions`, the last axis holds only those. `channels_first`: the program holds
    (1, D, 1, S) where `expected` holds [1, S, D].
    """
    probes: dict[str, list[str]] = {}  # several modules may end in one value
    known = runner.contract.probes if function is None else runner.contract.functions[function].probes
    for name, value in known.items():
        if name in expected:
            probes.setdefault(value, []).append(name)
    missing = [name for name in expected if name not in known]
    if missing:
        raise PackageError(f"{runner.path}: its contract maps no value to {', '.join(missing)}")
    seq = runner.contract.sequence() if function is None else runner.functions[function]
    padded = np.zeros((1, seq), np.int32)
    padded[0, : len(ids)] = ids
    feed: dict[str, np.ndarray] = {runner.contract.inputs[0].name: padded}
    state = None
    if function is not None:
        feed[runner.contract.inputs[1].name] = np.zeros(1, np.int32)
        state = runner.program.make_state(function)
    points = []
    for step in runner.program.trace(feed, function, state, policy):
        for value, found in step.outputs.items():
            if value in probes:
                if channels_first:
                    found = found[:, :, 0].swapaxes(1, 2)
                names = sorted(probes.pop(value), key=lambda name: -name.count("."))  # the innermost module first
                points += [_point(name, value, step.op.type, found, expected, positions) for name in names]
    if probes:
        raise PackageError(f"{runner.path}: the program makes no value {', '.join(probes)}")
    return points


def points_gate(points: list[Point], contract: Contract) -> tuple[Point | None, Gate]:
    """Pass iff every point is within `exact_tolerance`; else the first that is not, with the op that makes it."""
    tolerance = exact_tolerance(contract)
    first = first_divergence(points, tolerance)
    if first is None:
        worst = max(p.relative for p in points)
        return None, gates.at_most(worst, tolerance, backend="distill.mil fp32", reason=f"{len(points)} points")
    reason = f"first diverging point {first.name}: op {first.op} -> {first.value}"
    return first, gates.holds(
        False, observed=first.relative, threshold=tolerance, backend="distill.mil fp32", reason=reason
    )


def first_divergence(points: list[Point], tolerance: float) -> Point | None:
    """The first point, in program order, that is further from its reference than `tolerance` (or not finite)."""
    return next((p for p in points if not p.relative <= tolerance), None)


def _point(
    name: str, value: str, op: str, found: np.ndarray, expected: dict[str, np.ndarray], positions: np.ndarray | None
) -> Point:
    reference = expected[name].astype(np.float64)
    found = found.astype(np.float64)
    if positions is not None:
        found = found[..., positions]
    if found.shape != reference.shape:
        raise PackageError(f"{name} ({value}) has shape {list(found.shape)}, PyTorch {list(reference.shape)}")
    difference = found - reference
    norm = float(np.linalg.norm(reference))
    mse, peak = float(np.mean(difference**2)), float(np.abs(reference).max())
    psnr = math.inf if mse == 0 else 20 * math.log10(peak) - 10 * math.log10(mse) if peak > 0 else -math.inf
    relative = float(np.linalg.norm(difference)) / (norm or 1.0)
    return Point(name, value, op, float(np.abs(difference).max()), relative, psnr)


def _kl(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    p, q = _log_softmax(reference), _log_softmax(found)
    return np.sum(np.exp(p) * (p - q), -1)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _worst(values: np.ndarray) -> float:
    """The largest; NaN anywhere is the worst of all."""
    return math.nan if np.isnan(values).any() else float(values.max())
