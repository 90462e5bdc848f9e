"""What the store costs and loses, beside the same rows uncompressed and in DistillKit's form, in one run.

python -m distill.data.store.bench F.jsonl --teacher models/teacher [--k 50 128] [--tokens 4000]

The rows are captured from the teacher's logits now, so the divergence is against exact values: of the kept entries and
the tail, in nats a token. Speeds are tokens a second of processor time, the codebook's training included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill.artifacts import write_json
from distill.data.records import decode_record, read_lines
from distill.data.schema import Record
from distill.data.store import bits, store
from distill.data.store.distributions import Distribution, divergence, joined
from distill.data.store.store import TopK, Writer, metadata
from distill.errors import InputError, stage_main

Table = list[dict[str, float | int | str]]


class Form(NamedTuple):
    """A way to store rows: to bytes and back."""

    name: str
    encode: Callable[[Distribution], bytes]
    decode: Callable[[bytes, Distribution], Distribution]
    """Given what was encoded too, for what the form does not store and the comparison grants it: the tail."""


def uncompressed() -> Form:
    """32-bit numbers throughout."""

    def decode(data: bytes, given: Distribution) -> Distribution:
        n, k = given.topk_ids.shape
        words = np.frombuffer(data, "<u4").reshape(n, 2 * k + 2)
        values = words[:, k + 1 :].view("<f4")
        return Distribution(words[:, 0].view("<i4"), words[:, 1 : k + 1].view("<i4"), values[:, 1:], values[:, 0])

    def encode(item: Distribution) -> bytes:
        ids = np.concatenate([item.token_ids[:, None], item.topk_ids], 1).astype("<i4")
        values = np.concatenate([item.tail_logprob[:, None], item.topk_logprobs], 1).astype("<f4")
        return np.concatenate([ids.view("<u4"), values.view("<u4")], 1).tobytes()

    return Form("uncompressed, 32 bits a number", encode, decode)


def distillkit(name: str, exact_k: int, powers: Sequence[float], k: int, vocab: int) -> Form:
    """The form of arcee-ai/DistillKit (a61c2e7): ids bit-packed, `exact_k` values in bf16, the others a least-squares
    polynomial in rank with fp32 coefficients. It stores no tail and no own token: here it is granted both."""
    width = (vocab - 1).bit_length()
    ranks = np.arange(k - exact_k, dtype=np.float64)
    terms = np.stack([ranks**power for power in powers], 1)
    solve = np.linalg.pinv(terms)

    def encode(item: Distribution) -> bytes:
        head = item.topk_logprobs[:, :exact_k].astype("<f4").view("<u4")
        head = (head + 0x7FFF + ((head >> 16) & 1) >> 16).astype("<u2")  # to nearest, ties to even
        coefficients = (item.topk_logprobs[:, exact_k:].astype(np.float64) @ solve.T).astype("<f4")
        ids = item.topk_ids.astype(np.int64)
        packed = np.frombuffer(bits.pack(ids.ravel(), np.full(ids.size, width)), np.uint8)
        return head.tobytes() + coefficients.tobytes() + packed.tobytes()

    def decode(data: bytes, given: Distribution) -> Distribution:
        n = len(given.token_ids)
        at, end = 2 * n * exact_k, 2 * n * exact_k + 4 * n * len(powers)
        head = (np.frombuffer(data[:at], "<u2").astype("<u4") << 16).view("<f4").reshape(n, exact_k)
        coefficients = np.frombuffer(data[at:end], "<f4").reshape(n, len(powers))
        values = np.concatenate([head, coefficients @ terms.T.astype(np.float32)], 1)
        ids = bits.Stream(data[end:]).fixed(0, width, n * k).reshape(n, k).astype(np.int32)
        return Distribution(given.token_ids, ids, np.minimum(values, 0).astype(np.float32), given.tail_logprob)

    return Form(name, encode, decode)


def measure(rows: Sequence[Distribution], k: int, vocab: int) -> Table:
    """Size, divergence and speed of every form at the first `k` entries of `rows`."""
    given = [_first(row, k) for row in rows]
    forms = [
        uncompressed(),
        distillkit("DistillKit, recommended", 16, (0, 1, 2, 3, 4, 0.5), k, vocab),
        distillkit("DistillKit, budget", 1, (0, 1, 0.5), k, vocab),
    ]
    table = [_measure_form(form, given, k) for form in forms if k > 16]
    return table + [_measure_store(codec, given, k, vocab) for codec in (store.EXACT, store.COMPACT)]


def _first(row: Distribution, k: int) -> Distribution:
    """The first k entries; the mass of the others goes into the tail."""
    rest = np.concatenate([row.topk_logprobs[:, k:], row.tail_logprob[:, None]], 1).astype(np.float64)
    tail = np.minimum(np.logaddexp.reduce(rest, 1), 0).astype(np.float32)
    return Distribution(row.token_ids, row.topk_ids[:, :k], row.topk_logprobs[:, :k], tail)


def _measure_form(form: Form, given: Sequence[Distribution], k: int) -> dict[str, float | int | str]:
    start = time.process_time()
    encoded = [form.encode(row) for row in given]
    middle = time.process_time()
    decoded = [form.decode(data, row) for data, row in zip(encoded, given)]
    end = time.process_time()
    return _line(form.name, given, decoded, k, sum(map(len, encoded)), middle - start, end - middle)


def _measure_store(codec: str, given: Sequence[Distribution], k: int, vocab: int) -> dict[str, float | int | str]:
    """The whole file, index and codebook included; its writing, training included; its reading 8 rows at a time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.safetensors"
        start = time.process_time()
        writer = Writer(path.parent, k, vocab_size=vocab, codec=codec)
        for row in given:
            writer.add(row)
        writer.finish(path, metadata(tokenizer_sha256="", template_sha256="", teacher="", k=k, temperature=1.0,
                                     vocab_size=vocab, run_id="bench"))  # fmt: skip
        writer.close()
        middle = time.process_time()
        opened = TopK(path)
        decoded = [row for at in range(0, len(opened), 8) for row in opened.take(range(at, min(at + 8, len(opened))))]
        end = time.process_time()
        return _line(f"this store, {codec}", given, decoded, k, path.stat().st_size, middle - start, end - middle)


def _line(
    name: str,
    given: Sequence[Distribution],
    decoded: Sequence[Distribution],
    k: int,
    size: int,
    writing: float,
    reading: float,
) -> dict[str, float | int | str]:
    kl = divergence(joined(given, k), joined(decoded, k))
    return {
        "form": name, "k": k, "tokens": len(kl), "bytes_per_token": size / len(kl), "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)), "kl_max": float(kl.max()),
        "encode_per_s": len(kl) / writing, "decode_per_s": len(kl) / reading,
    }  # fmt: skip


def show(table: Table) -> str:
    """The table as text."""
    titles = ("B/token", "KL mean", "p99", "max", "enc tok/s", "dec tok/s")
    lines = [
        f"{'form':32s} {'k':>4s} {titles[0]:>8s} "
        + "".join(f"{t:>{w}s} " for t, w in zip(titles[1:], (9, 9, 9, 10, 10)))
    ]
    lines += [
        f"{t['form']:32s} {t['k']:4d} {t['bytes_per_token']:8.1f} {t['kl_mean']:9.2e} {t['kl_p99']:9.2e} "
        f"{t['kl_max']:9.2e} {t['encode_per_s']:10,.0f} {t['decode_per_s']:10,.0f}" for t in table
    ]  # fmt: skip
    return "\n".join(lines)


def _captured(path: Path, teacher: str, k: int, tokens: int) -> tuple[list[Distribution], int]:
    """Rows of the dataset's first completions, until there are `tokens` of them."""
    from distill.data.store.capture import teacher_distributions
    from distill.data.teacher.local import load_white_box
    from distill.data.teacher.spec import parse_spec

    box = load_white_box(parse_spec(teacher))
    rows: list[Distribution] = []
    found = 0
    for batch in _windows(decode_record(line, path, number) for number, line in read_lines(path)):
        for row in teacher_distributions(box, batch, k):
            rows.append(row)
            found += len(row.token_ids)
            if found >= tokens:
                return rows, box.tokenizer.vocab_size
    return rows, box.tokenizer.vocab_size


def _windows(records: Iterable[Record], size: int = 16) -> Iterator[list[Record]]:
    window: list[Record] = []
    for record in records:
        window.append(record)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(prog="distill bench-store", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", type=Path, help="whose completions the teacher reads, F.jsonl")
    parser.add_argument("--teacher", required=True, help="gguf:FILE-or-package, hf:org/model or a folder")
    parser.add_argument("--k", type=int, nargs="+", default=[50, 128], help="entries kept a token (default: 50 128)")
    parser.add_argument("--tokens", type=int, default=4000, help="completion tokens to measure on (default: 4000)")
    parser.add_argument("--out", type=Path, help="where to write the table as JSON")
    args = parser.parse_args(argv)
    if min(args.k) < 1 or args.tokens < 1:
        raise InputError("--k and --tokens must be at least 1")
    rows, vocab = _captured(args.dataset, args.teacher, max(args.k), args.tokens)
    table = [line for k in args.k for line in measure(rows, k, vocab)]
    print(f"{sum(len(row.token_ids) for row in rows):,} tokens of {len(rows)} completions, vocabulary {vocab:,}")
    print(show(table))
    if args.out:
        write_json(
            args.out, {"dataset": str(args.dataset), "teacher": args.teacher, "vocab_size": vocab, "table": table}
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
