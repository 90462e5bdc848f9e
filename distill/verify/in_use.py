"""Gates of use: a generator's golden conversation in chunks and steps, to the end of its context, and two at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import gates
from distill.errors import InputError, PackageError
from distill.export.conversation import repeated
from distill.gates import Gate
from distill.verify import integrity, parity
from distill.verify.decoding import MAX_TIES
from distill.verify.generator import EXECUTOR, NONE, STATE_TOLERANCE, Session, Used, plain, rank
from distill.verify.runner import Conversation, Cut, PackageRunner, cut

if TYPE_CHECKING:
    from distill.verify.contracts import Check

INTERLEAVED_STEPS = 16


def check_use(check: Check, runner: PackageRunner) -> None:
    """Every gate of use."""
    session = check.session
    assert session is not None
    check.gate("weights_shared", lambda: integrity.shared_gate(runner))
    runs: list[Used] = []

    def detailed(name: str, found: tuple[Gate, dict[str, Any]]) -> Gate:
        check.details[name] = found[1]
        return found[0]

    def tokens() -> Gate:
        runs.append(session.run_all())
        return detailed("use_tokens", tokens_gate(session, runs[0]))

    def kv() -> Gate:
        if not runs:
            raise PackageError("not reached: the conversation did not run")
        return kv_gate(session, runs[0])

    check.gate("use_tokens", tokens)
    check.gate("use_kv", kv)
    check.gate("use_chunks", lambda: detailed("use_chunks", chunks_gate(session)))
    check.gate("use_conversations", lambda: conversations_gate(session))
    check.gate("use_limit", lambda: limit_gate(session))


def tokens_gate(session: Session, used: Used) -> tuple[Gate, dict[str, Any]]:
    """The package's greedy tokens are PyTorch's, but for ties within the derived error; after one the reference's own
    token is fed."""
    golden, first = session.golden, int(np.searchsorted(session.golden["rows"], session.prompt - 1))
    tolerance = golden["fp16_sigma"][first:, 0] * session.factor
    differing: list[dict[str, Any]] = []
    ties: list[dict[str, Any]] = []
    for step, (found, wanted) in enumerate(zip(used.chosen, golden["greedy"].tolist(), strict=True)):
        if found != wanted:
            margin = float(golden["margins"][step])
            row = {
                "step": step,
                "pytorch": wanted,
                "package": found,
                "margin": margin,
                "tolerance": float(tolerance[step]),
            }
            (ties if margin < tolerance[step] else differing).append(row)
    steps = len(used.chosen) - 1
    chunks = "+".join(str(count) for _, count in used.cuts)
    detail = {"prompt": session.prompt, "chunks": chunks, "steps": steps, "ties": ties, "differing": differing}
    reason = f"prompt of {session.prompt} as {chunks}, then {steps} steps, {len(ties)} ties within the derived error"
    if differing:
        reason += f"; first at step {differing[0]['step']}"
    if not differing and len(ties) > MAX_TIES * (steps + 1):
        return Gate("inconclusive", len(ties), int(MAX_TIES * (steps + 1)), f"{EXECUTOR} ieee16", reason), detail
    return gates.at_most(len(differing), 0, backend=f"{EXECUTOR} ieee16", reason=reason), detail


def kv_gate(session: Session, used: Used) -> Gate:
    """After every call the state holds PyTorch's keys and values of its tokens, and changed nowhere else."""
    calls = len(used.cuts) + len(used.chosen) - 1
    worst = used.kv.worse(used.logits)
    reason = (
        f"share of the derived fp16 error over {calls} calls: keys and values {used.kv.share:.3g}, "
        f"logits {used.logits.share:.3g}"
    )
    return gates.at_most(worst.share, 1.0, backend=f"{EXECUTOR} ieee16", reason=reason)


def chunks_gate(session: Session) -> tuple[Gate, dict[str, Any]]:
    """However the conversation is cut, logits, keys and values are the reference's, and so equal, without rounding."""
    runner = session.runner
    runner.policy = "fp32"
    try:
        used = session.run_all()
        errors = {"+".join(str(c) for _, c in used.cuts) + " and steps": (used.logits.relative, used.kv.relative)}
        smallest = dict(sorted(runner.functions.items(), key=lambda item: item[1])[:2])
        whole = cut(0, session.prompt, runner.capacity, runner.functions)
        shifted = [Cut("decode", 1), *cut(1, session.prompt - 1, runner.capacity, runner.functions)]
        for cuts in (shifted, cut(0, session.prompt, runner.capacity, smallest)):
            if cuts == whole:
                continue
            logits, kv = NONE, NONE
            for call in session.follow(runner.begin(), session.ids[: session.prompt], cuts):
                logits, kv = logits.worse(call.logits), kv.worse(call.kv)
            errors["+".join(str(count) for _, count in cuts)] = (logits.relative, kv.relative)
    finally:
        runner.policy = "ieee16"
    worst = max(errors, key=lambda name: rank(max(errors[name], key=rank)))
    detail = {name: {"logits": plain(a), "keys_and_values": plain(b)} for name, (a, b) in errors.items()}
    tolerance, (logits_error, kv_error) = parity.exact_tolerance(session.contract), errors[worst]
    reason = f"relative error of logits over {len(errors)} cuttings, worst {worst}; keys and values {kv_error:.2g}"
    if not kv_error <= STATE_TOLERANCE:
        return gates.at_most(kv_error, STATE_TOLERANCE, backend=f"{EXECUTOR} fp32", reason=reason), detail
    return gates.at_most(logits_error, tolerance, backend=f"{EXECUTOR} fp32", reason=reason), detail


def limit_gate(session: Session) -> Gate:
    """The last position works; what does not fit is refused in one line, and then nothing was written."""
    runner, context = session.runner, session.runner.capacity
    ids = repeated(session.ids, context)
    made = list(runner.generate(ids[:-2], context, set()))
    if len(made) != 2 or "full" not in runner.stopped:
        raise PackageError(f"generation up to the end gave {len(made)} tokens of 2 and stopped for {runner.stopped!r}")
    conversation = runner.begin()
    conversation.feed(ids[:-1])
    last = session.end(conversation.feed(ids[-1:]))
    held = conversation.state.read(session.state)
    refused = 0
    for tokens, position in [([1], context), (session.ids[:3], context - 2), (ids, 3)]:
        conversation.position = position
        refused += _refuses(lambda tokens=tokens: conversation.feed(tokens))
    for name, size in runner.functions.items():
        for position in (context - size + 1, -1):
            call = (name, session.ids[:1], position, conversation.state)
            refused += _refuses(lambda call=call: runner.call(*call))
    refused += _refuses(lambda: list(runner.generate(ids, 1, set())))
    wanted = 4 + 2 * len(runner.functions)
    untouched = np.array_equal(held, conversation.state.read(session.state))
    if not untouched:
        raise PackageError("a call that was refused changed the state")
    if refused != wanted:
        raise PackageError(f"only {refused} of {wanted} calls that do not fit were refused")
    reason = (
        f"share of the derived fp16 error at position {context - 1}; then {refused} of {wanted} calls refused, "
        "nothing written"
    )
    return gates.at_most(last, 1.0, backend=f"{EXECUTOR} ieee16", reason=reason)


def _refuses(call: Any) -> bool:
    try:
        call()
    except InputError:
        return True
    return False


def conversations_gate(session: Session) -> Gate:
    """Two conversations in turn, each on its own state, and one begun on a state that another has left: bit for bit
    what each gives alone."""
    runner = session.runner
    chunks = sorted(runner.functions.values())
    length = min(session.prompt, chunks[-1] + chunks[1] // 2 + 1)
    steps = min(INTERLEAVED_STEPS, runner.capacity - length)
    texts = [session.ids[:length], session.ids[::-1][: length // 2 + 1]]
    plans = [[*cut(0, len(text), runner.capacity, runner.functions), *[Cut("decode", 1)] * steps] for text in texts]
    texts = [(t + session.ids)[: sum(count for _, count in p)] for t, p in zip(texts, plans, strict=True)]
    by_itself = [_Talk(runner.begin(), t, p) for t, p in zip(texts, plans, strict=True)]
    for talk in by_itself:
        while talk.step():
            pass
    in_turn = [_Talk(runner.begin(), t, p) for t, p in zip(texts, plans, strict=True)]
    while any([talk.step() for talk in in_turn]):
        pass
    left = runner.begin()
    left.state = by_itself[0].conversation.state.copy()
    after = _Talk(left, texts[1], plans[1])
    while after.step():
        pass
    faults = [f"conversation {i}" for i in (0, 1) if not by_itself[i].same(in_turn[i], session.state)]
    if not by_itself[1].same(after, session.state, len(texts[1])):
        faults.append("a conversation on a state that another has left")
    calls = sum(len(talk.found) for talk in (*by_itself, *in_turn, after))
    reason = f"{calls} calls, logits and states equal bit for bit"
    return gates.holds(
        not faults, observed=len(faults), threshold=0, backend=f"{EXECUTOR} ieee16",
        reason=f"not what it is alone: {', '.join(faults)}" if faults else reason,
    )  # fmt: skip


class _Talk:
    """A conversation, one call at a time."""

    def __init__(self, conversation: Conversation, ids: Sequence[int], cuts: Sequence[Cut]) -> None:
        self.conversation, self.ids, self.cuts = conversation, ids, list(cuts)
        self.found: list[np.ndarray] = []

    def step(self) -> bool:
        """Make the next call; False where there is none."""
        if len(self.found) == len(self.cuts):
            return False
        now, at = self.cuts[len(self.found)], self.conversation.position
        self.found.append(self.conversation.feed(self.ids[at : at + now.tokens], [now]))
        return True

    def same(self, other: _Talk, state: str, rows: int | None = None) -> bool:
        """Bit for bit; of the state the first `rows` positions."""
        mine, theirs = (talk.conversation.state.read(state)[:, :, :rows] for talk in (self, other))
        found = zip(self.found, other.found, strict=True)
        return np.array_equal(mine, theirs) and all(np.array_equal(a, b) for a, b in found)
