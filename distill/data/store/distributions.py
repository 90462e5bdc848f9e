"""The teacher's next-token distributions: the k most probable tokens and the mass that remains.

Row j of a completion is the teacher's distribution OF completion token j given everything before it, so row 0
belongs to the first token after the prompt and the last row to the token that ends the turn. A token may have fewer
entries than k, or none at all where no distribution is known. distill/data/store/store.py keeps them in a file.

Shapes: N tokens of a completion, k kept entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.errors import InputError

if TYPE_CHECKING:
    import torch

    from distill.data.teacher.wire import TokenLogprob, TopToken
    from distill.tokenizer import Tokenizer

SUM_TOLERANCE = 1e-3
"""How far the kept probabilities and the tail may sum from 1."""
_NOTHING = -1000.0
"""Log-probability below which an endpoint's entry is left out: far below what fp32 can hold."""
_LEAST_TAIL = 1e-6
"""Mass that an endpoint's entries leave at least: what fp32 cannot tell from none."""


class Distribution(NamedTuple):
    """One completion: its token ids [N], the kept ids and log-probabilities [N, k] by falling probability, the log of
    the mass that remains [N]. Where fewer than k are kept, -1 and -inf follow; where none, the tail is -inf."""

    token_ids: NDArray[np.int32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]
    tail_logprob: NDArray[np.float32]

    @property
    def known(self) -> NDArray[np.bool_]:
        """[N]: whether the token has a distribution."""
        return np.asarray((self.topk_ids >= 0).any(1))

    def only(self, mask: NDArray[np.bool_]) -> Distribution:
        """The tokens of a mask [N]."""
        return Distribution(
            self.token_ids[mask], self.topk_ids[mask], self.topk_logprobs[mask], self.tail_logprob[mask]
        )


class TopEntries(NamedTuple):
    """What `capture` keeps of [N, V] logits."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail: NDArray[np.float32]
    """[N]; of a single token: []."""


def capture(logits_NV: torch.Tensor | NDArray[Any], k: int, *, temperature: float = 1.0) -> TopEntries:
    """The k most probable entries of each row, sorted, and the log of the mass of all the others.

    The tail is a logsumexp over the complement, never 1 minus a sum: it stays exact when it is 1e-12. It is -inf
    only where nothing remains (k = V).
    """
    import torch

    logits = torch.as_tensor(logits_NV)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if not 1 <= k <= logits.shape[-1]:
        raise InputError(f"k = {k} does not fit a vocabulary of {logits.shape[-1]}")
    logits = logits / temperature if temperature != 1.0 else logits
    total_N1 = logits.logsumexp(-1, keepdim=True)
    top, ids = logits.topk(k, dim=-1)
    tail_N1 = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) - total_N1
    return TopEntries(
        ids.to(torch.int32).cpu().numpy(),
        (top - total_N1).clamp(max=0).float().cpu().numpy(),
        tail_N1.squeeze(-1).clamp(max=0).float().cpu().numpy(),
    )


def from_endpoint(
    turns: Sequence[Sequence[TokenLogprob] | None], completion_ids: Sequence[int], tokenizer: Tokenizer, *, k: int
) -> Distribution | None:
    """What an endpoint's `turns` (one per learned turn) say of the student's tokens; None where they do not fit.

    They fit if each turn's chosen tokens are exactly the student's, but for the token that ends the turn: where it is
    not told, it has no entries. The tail is log(1 - kept mass). A token whose numbers are no distribution has none.
    """
    ends = [i + 1 for i, token in enumerate(completion_ids) if token == tokenizer.turn_end]
    if not ends or len(ends) != len(turns) or ends[-1] != len(completion_ids):
        return None
    n = len(completion_ids)
    ids, logprobs = np.full((n, k), -1, np.int32), np.full((n, k), -np.inf, np.float32)
    tail = np.full(n, -np.inf, np.float32)
    for start, end, turn in zip([0, *ends], ends, turns):
        chosen = [_id_of(token, tokenizer) for token in turn or ()]
        if turn is None or chosen not in (list(completion_ids[start:end]), list(completion_ids[start : end - 1])):
            return None
        for row, (token, own) in enumerate(zip(turn, chosen), start):
            kept = entries(token, own, tokenizer, k)
            many = len(kept.ids)
            ids[row, :many], logprobs[row, :many], tail[row] = kept.ids, kept.logprobs, kept.tail
    return Distribution(np.asarray(completion_ids, np.int32), ids, logprobs, tail)


def _id_of(token: TokenLogprob | TopToken, tokenizer: Tokenizer) -> int | None:
    """The student's id: by its bytes, or by the server's id where it gives nothing else."""
    data = token.token.encode(errors="replace") if token.bytes is None else token.bytes
    by_bytes = tokenizer.ids_by_bytes.get(data)
    if token.id is None or (data and by_bytes != token.id):
        return by_bytes
    return token.id if 0 <= token.id < tokenizer.vocab_size else None


def entries(token: TokenLogprob, own: int | None, tokenizer: Tokenizer, k: int) -> TopEntries:
    """The k best of a token and its alternatives; those that are no token of the student's go into the tail."""
    found: dict[int, float] = {}
    candidates = [(_id_of(other, tokenizer), other.logprob) for other in token.top] + [(own, token.logprob)]
    for identity, logprob in candidates:
        if identity is not None and logprob is not None and logprob > _NOTHING:  # a NaN fails this too
            found.setdefault(identity, min(logprob, 0.0) if logprob < SUM_TOLERANCE else np.inf)
    best = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))[:k]
    logprobs = np.asarray([logprob for _, logprob in best], np.float64)
    mass = float(np.exp(np.minimum(logprobs, 1.0)).sum())
    if not best or mass > 1 + SUM_TOLERANCE:
        return TopEntries(np.zeros(0, np.int32), np.zeros(0, np.float32), np.array(-np.inf, np.float32))
    rest = max(1 - mass, _LEAST_TAIL)
    total = np.log(mass + rest)
    ids = np.asarray([identity for identity, _ in best], np.int32)
    return TopEntries(ids, (logprobs - total).astype(np.float32),
                      np.array(np.log(rest) - total, np.float32))  # fmt: skip


def joined(parts: Sequence[Distribution], k: int) -> Distribution:
    """Completions one after another, as one."""
    if not parts:
        return Distribution(np.zeros(0, np.int32), np.zeros((0, k), np.int32), np.zeros((0, k), np.float32),
                            np.zeros(0, np.float32))  # fmt: skip
    return Distribution(*(np.concatenate(arrays) for arrays in zip(*parts)))


def problem_of(item: Distribution, vocab_size: int, tolerance: float = SUM_TOLERANCE) -> str | None:
    """Why `item` is not a list of distributions over `vocab_size` tokens; None if it is."""
    if item.token_ids.size and (item.token_ids.min() < 0 or item.token_ids.max() >= vocab_size):
        return f"token_ids holds an id outside 0..{vocab_size - 1}"
    ids, logprobs = item.topk_ids, item.topk_logprobs.astype(np.float32)
    if ids.size and (ids.min() < -1 or ids.max() >= vocab_size):
        return f"topk_ids holds an id outside 0..{vocab_size - 1}"
    if not (logprobs <= 0).all() or not (item.tail_logprob <= 0).all():  # a NaN fails this too
        return "a log-probability is NaN or above 0"
    if (logprobs[:, 1:] > logprobs[:, :-1]).any():
        return "topk_logprobs is not sorted in descending order"
    absent = ids < 0
    if (absent[:, :-1] > absent[:, 1:]).any() or (logprobs[absent] > -np.inf).any():
        return "an entry follows, or has, the mark of an absent one"
    ordered = np.sort(np.where(absent, -1 - np.arange(ids.shape[1], dtype=np.int32), ids), axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return "topk_ids holds one id twice"
    known = ~absent.all(1)
    total = np.exp(logprobs).sum(1, dtype=np.float64) + np.exp(item.tail_logprob)
    wrong = np.abs(total - known)
    if total.size and wrong.max() > tolerance:
        worst = total[wrong.argmax()]
        return f"kept probabilities and tail sum to {worst:.6f}, not to 1 within {tolerance}"
    return None


def divergence(exact: Distribution, stored: Distribution) -> NDArray[np.float64]:
    """[N]: KL(exact || stored) of the kept entries and the tail, in nats; 0 where no distribution is known.

    `stored` may hold the entries in another order, as those of one level come back.
    """
    known = exact.known
    a, b = exact.only(known), stored.only(known)
    order_a, order_b = np.argsort(a.topk_ids, 1), np.argsort(b.topk_ids, 1)
    p, q = np.take_along_axis(a.topk_logprobs, order_a, 1), np.take_along_axis(b.topk_logprobs, order_b, 1)
    p, q = (
        np.concatenate([x, t[:, None]], 1).astype(np.float64) for x, t in ((p, a.tail_logprob), (q, b.tail_logprob))
    )
    p, q = p - np.log(np.exp(p).sum(1, keepdims=True)), q - np.log(np.exp(q).sum(1, keepdims=True))
    with np.errstate(invalid="ignore"):
        terms = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0)
    out = np.zeros(len(known))
    out[known] = np.maximum(terms.sum(1), 0)
    return out


def full_logprobs(item: Distribution, vocab_size: int) -> NDArray[np.float64]:
    """[N, V] log-probabilities with the tail spread evenly over the entries that were not kept: for small V."""
    kept = (item.topk_ids >= 0).sum(1, keepdims=True)
    out = np.repeat(
        item.tail_logprob.astype(np.float64)[:, None] - np.log(np.maximum(vocab_size - kept, 1)), vocab_size, 1
    )
    rows, ranks = np.nonzero(item.topk_ids >= 0)
    out[rows, item.topk_ids[rows, ranks]] = item.topk_logprobs[rows, ranks]
    return out


def same_entries(a: Distribution, b: Distribution) -> bool:
    """Whether two keep the same tokens of each distribution, in whatever order."""
    return a.topk_ids.shape == b.topk_ids.shape and bool((np.sort(a.topk_ids, 1) == np.sort(b.topk_ids, 1)).all())


def same_tokens(item: Distribution, ids: Sequence[int]) -> bool:
    """Whether the completion's tokens are exactly `ids`."""
    return len(item.token_ids) == len(ids) and bool((item.token_ids == np.asarray(ids)).all())
