"""What a package loses in distribution against the float student, on held-out text, judged by weight format.

    distill distribution --model X.mlpackage --checkpoint C.pt --data KD.jsonl [--limits configs/limits.yaml]

Three models read the same records: the float student; the student with its weights as deployed, in fp32; and the
package, run by the executor in the types that it declares. So the loss has two parts, the format and what fp16 and
conversion add. The whole is held to the limits of the package's formats, conversion to those of fp16 whatever they are.

The float student is the checkpoint without formats; of one trained in formats, the checkpoint that it started from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from distill import checkpoint, config, gates
from distill.artifacts import provenance, write_json
from distill.checkpoint import Checkpoint, weights_sha256
from distill.data.batches import Batch, Examples
from distill.data.records import Dataset, sidecar
from distill.errors import CheckpointError, InputError, Skipped, stage_main
from distill.export.deployed import deploy
from distill.formats import Formats
from distill.gates import Gate
from distill.model import Student
from distill.tokenizer import Tokenizer
from distill.verify import distances
from distill.verify.distances import Distances, Estimate, Floats, Records
from distill.verify.limits import Limits, LimitsConfig
from distill.verify.runner import PackageRunner

LIMITS = Path("configs/limits.yaml")
SPLIT = "val"
FLOAT, DEPLOYED, PACKAGE = "float", "deployed", "package"
PAIRS = {"total": (FLOAT, PACKAGE), "format": (FLOAT, DEPLOYED), "conversion": (DEPLOYED, PACKAGE)}
"""What a difference is called, and from which model to which."""
_AT_ONCE = 1 << 22
"""Logits in float64 at one time, of each model."""


@dataclass
class Tokens:
    """What was found of each target token [N], record after record."""

    record: list[np.ndarray] = field(default_factory=list)
    pairs: dict[str, list[Distances]] = field(default_factory=lambda: {name: [] for name in PAIRS})
    nll: dict[str, list[Floats]] = field(default_factory=lambda: {name: [] for name in (FLOAT, DEPLOYED, PACKAGE)})
    teacher: dict[str, list[Floats]] = field(default_factory=lambda: {name: [] for name in (FLOAT, DEPLOYED, PACKAGE)})
    """KL(teacher || model); NaN where no distribution is stored."""

    def add(self, logits: dict[str, Tensor], batch: Batch, at: slice, k: int) -> None:
        """Some tokens of one record, from their logits [N, V] by model."""
        log_p = {name: distances.log_probabilities(value_NV) for name, value_NV in logits.items()}
        if bool(log_p[FLOAT].isnan().any() | log_p[DEPLOYED].isnan().any()):
            raise CheckpointError("the student's own logits are not finite: there is nothing to compare with")
        for name, (one, other) in PAIRS.items():
            self.pairs[name].append(distances.distances(log_p[one], log_p[other], k))
        known_N = batch.has_distribution_N[at].numpy()
        for name, log_q in log_p.items():
            self.nll[name].append(distances.negative_log_likelihood(log_q, batch.labels_N[at]))
            stored = (batch.topk_ids_NK[at], batch.topk_logprobs_NK[at], batch.tail_logprob_N[at])
            kl_N = distances.kl_from_stored(*stored, log_q) if known_N.any() else np.full(len(known_N), np.nan)
            self.teacher[name].append(np.where(known_N, kl_N, np.nan))
        self.record.append(np.full(len(known_N), batch.records[0]))


class Verdict(NamedTuple):
    """Gates, and what they rest on."""

    gates: dict[str, Gate]
    details: dict[str, Any]
    """Plain values; an infinity is text."""


def verdict(
    runner: PackageRunner, reference: Student, deployed: Student, examples: Examples, limits: LimitsConfig
) -> Verdict:
    """Hold a package against the float student and the one with its deployed weights: the same object where the package
    has no formats. Both in fp32. Skipped where no record fits."""
    rule, fine = limits.rule(runner.contract.formats), limits.rule(None)
    found = measure(runner, reference, deployed, examples, limits.top_k)
    record_N = np.concatenate(found.record)
    records = Records(record_N)
    few = _too_few(len(records.tokens_R), len(record_N), limits)
    estimates = {name: estimate(found, name, records) for name in PAIRS}
    judged = {"total": rule} | ({"conversion": fine} if deployed is not reference else {})
    result = {f"{pair}_{name}": gate for pair, by in judged.items()
              for name, gate in judge(estimates[pair], by, few, f"distill.mil {runner.policy}").items()}  # fmt: skip
    details = {
        "formats": msgspec.to_builtins(runner.contract.formats or Formats()),
        "records": len(records.tokens_R),
        "tokens": len(record_N),
        "records_left_out": examples.too_long,
        "confidence": distances.CONFIDENCE,
        "limits": {pair: msgspec.to_builtins(by) for pair, by in judged.items()},
        "pairs": {name: _plain(values) for name, values in estimates.items()},
        "perplexity": {name: _number(float(np.exp(_joined(parts).mean()))) for name, parts in found.nll.items()},
        "kl_teacher": _teacher(found, record_N),
        "by_record": _by_record(found, records, examples),
    }
    return Verdict(result, details)


@torch.no_grad()
def measure(runner: PackageRunner, reference: Student, deployed: Student, examples: Examples, k: int) -> Tokens:
    """Run all three over every example, one at a time; a line on a terminal says how far it is."""
    if not len(examples):
        raise Skipped(f"{examples.dataset.path} holds no record of split {SPLIT} that fits {runner.capacity} tokens")
    if k > reference.config.vocab_size:
        raise InputError(f"limits: top_k {k}: the vocabulary has {reference.config.vocab_size} tokens")
    found, rows = Tokens(), max(1, _AT_ONCE // reference.config.vocab_size)
    for index in range(len(examples)):
        batch = examples.batch([index])
        ids = batch.ids_T[:-1]  # nothing is predicted from the last target
        package_TV = runner.logits(ids.tolist())
        students = {FLOAT: reference, DEPLOYED: deployed}
        hidden = {name: student.hidden(ids[None])[0] for name, student in students.items()}
        for at in _slices(batch.targets, rows):
            where = batch.positions_N[at]
            logits = {name: student.lm_head(hidden[name][where]) for name, student in students.items()}
            found.add(logits | {PACKAGE: torch.from_numpy(package_TV[where.numpy()])}, batch, at, k)
        if sys.stderr.isatty():
            end = "\r" if index + 1 < len(examples) else "\n"
            print(f"{index + 1} of {len(examples)} records", end=end, file=sys.stderr, flush=True)
    return found


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def estimate(found: Tokens, pair: str, records: Records) -> dict[str, Estimate]:
    """Every statistic of a pair, with its interval."""
    parts = Distances(*(_joined(columns) for columns in zip(*found.pairs[pair])))
    one, other = PAIRS[pair]
    return {
        "kl_mean": records.mean(parts.kl),
        "kl_p99": records.percentile(parts.kl, 99),
        "top1_agreement": records.mean(parts.top1),
        "topk_agreement": records.mean(parts.topk),
        "top1_in_topk": records.mean(parts.top1_in_topk),
        "perplexity_ratio": records.ratio(_joined(found.nll[other]) - _joined(found.nll[one])),
    }


def judge(found: dict[str, Estimate], limits: Limits, too_few: str | None, backend: str) -> dict[str, Gate]:
    """A gate for each limit."""
    result = {}
    for name in ("kl_mean", "kl_p99", "top1_agreement", "topk_agreement", "perplexity_ratio"):
        value, *interval = found[name]
        side = "at_least" if name.endswith("agreement") else "at_most"
        limit: dict[str, Any] = {side: getattr(limits, name)}
        result[name] = gates.within(value, (interval[0], interval[1]), too_few=too_few, backend=backend, **limit)
    return result


def _too_few(records: int, tokens: int, limits: LimitsConfig) -> str | None:
    if records < limits.min_records:
        return f"{records} records, {limits.min_records} needed"
    return f"{tokens} tokens, {limits.min_tokens} needed" if tokens < limits.min_tokens else None


def _teacher(found: Tokens, record_N: np.ndarray) -> dict[str, Any] | None:
    """KL(teacher || model), and what the package adds to the float student's; None without stored distributions."""
    by_model = {name: _joined(parts) for name, parts in found.teacher.items()}
    known_N = ~np.isnan(by_model[FLOAT])
    if not known_N.any():
        return None
    records = Records(record_N[known_N])
    added_N = by_model[PACKAGE][known_N] - by_model[FLOAT][known_N]
    values = {name: records.mean(kl_N[known_N]) for name, kl_N in by_model.items()}
    return {"tokens": int(known_N.sum()), **_plain(values | {"package_minus_float": records.mean(added_N)})}


def _by_record(found: Tokens, records: Records, examples: Examples) -> list[dict[str, Any]]:
    """Paired values of each record: its id, tokens, mean KL of each pair, mean NLL of each model."""
    columns = {f"kl_{name}": _joined([part.kl for part in parts]) for name, parts in found.pairs.items()}
    columns |= {f"nll_{name}": _joined(parts) for name, parts in found.nll.items()}
    means = {name: records.sums(values_N) / records.tokens_R for name, values_N in columns.items()}
    indices = np.unique(np.concatenate(found.record)).tolist()
    return [{"id": examples.dataset[record].id, "tokens": int(records.tokens_R[row]),
             **{name: _number(float(mean_R[row])) for name, mean_R in means.items()}}
            for row, record in enumerate(indices)]  # fmt: skip


def _joined(parts: Any) -> Floats:
    whole: Floats = np.concatenate(list(parts))
    return whole


def _plain(values: dict[str, Estimate]) -> dict[str, dict[str, float | str]]:
    return {name: {key: _number(x) for key, x in value._asdict().items()} for name, value in values.items()}


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if np.isfinite(value) else str(value)


class Models(NamedTuple):
    """Float and deployed student, in fp32, and the files that they come from."""

    reference: Student
    deployed: Student
    tokenizer: Tokenizer
    files: dict[str, Path]


def load_models(runner: PackageRunner, path: Path, reference: Path | None = None) -> Models:
    """The two students of a package made from the checkpoint at `path`. InputError if it was made from another."""
    if runner.contract.mode == "block":
        raise InputError(f"{runner.path}: a block gives no distribution over tokens")
    loaded = checkpoint.load(path)
    files, start = {"checkpoint": path}, reference or _start(loaded, path)
    first = loaded if start is None else checkpoint.load(start)
    if first.formats is not None:
        raise InputError(
            f"{start}: was trained in weight formats, so it is no float student: name one with --reference"
        )
    if start is not None:
        files["reference"] = start
        if reference is None and first.lineage != loaded.lineage[:-1]:
            raise InputError(f"{start}: not the checkpoint that {path} started from, as it was then: name it with "
                             "--reference")  # fmt: skip
    same = (first.tokenizer.sha256, first.student.config) == (loaded.tokenizer.sha256, loaded.student.config)
    if not same:
        raise InputError(f"{start}: its tokenizer or configuration is not that of {path}")
    formats = loaded.formats or runner.contract.formats
    if start is None and formats is not None:
        first = checkpoint.load(path)  # deploying changes weights in place
    loaded.student.float().eval()
    if loaded.formats in (None, runner.contract.formats):
        deploy(loaded, runner.contract.formats)
    if weights_sha256(loaded.student) != runner.contract.weights_sha256:
        raise InputError(f"{runner.path}: was not made from {path}: the contract names other weights")
    return Models(first.student.float().eval(), loaded.student, loaded.tokenizer, files)


def _start(loaded: Checkpoint, path: Path) -> Path | None:
    """Where a student trained in formats started from, as its lineage has it; None: it was not trained so."""
    if loaded.formats is None:
        return None
    init = loaded.lineage[-1].get("init") if loaded.lineage else None
    start = init.get("checkpoint") if isinstance(init, dict) else None
    if not isinstance(start, str) or not Path(start).is_file():
        raise InputError(f"{path}: trained in weight formats, and the float student that it started from "
                         f"({start or 'not in its lineage'}) is not there: name it with --reference")  # fmt: skip
    return Path(start)


def held_out(dataset: Dataset, tokenizer: Tokenizer, capacity: int, limit: int | None = None) -> Examples:
    """The held-out sequences that fit a package, with the teacher's distributions where they are of this tokenizer and
    at temperature 1."""
    info = dataset.header.logprobs
    fits = info is not None and info.temperature == 1.0 and dataset.header.tokenizer_sha256 == tokenizer.sha256
    components = ("kl_div", "ce_teacher") if fits else ("ce_teacher",)
    return Examples(dataset, tokenizer, SPLIT, max_length=capacity + 1, components=components, limit=limit)


def table(details: dict[str, Any]) -> str:
    """A line a pair; then perplexities, and the teacher where it is known."""
    head = ("from -> to", "KL mean", "KL p99", "top-1", "top-k", "1 in k", "perplexity ratio")
    lines = [f"{head[0]:22s}" + "".join(f"{word:>10s}" for word in head[1:-1]) + f"{head[-1]:>18s}"]
    for pair, (one, other) in PAIRS.items():
        v = {name: float(estimate["value"]) for name, estimate in details["pairs"][pair].items()}
        lines.append(
            f"{f'{one} -> {other}':22s}{v['kl_mean']:10.2e}{v['kl_p99']:10.2e}{v['top1_agreement']:10.2%}"
            f"{v['topk_agreement']:10.2%}{v['top1_in_topk']:10.2%}{v['perplexity_ratio']:18.4f}"
        )
    lines.append("perplexity: " + ", ".join(f"{name} {float(x):.3f}" for name, x in details["perplexity"].items()))
    if details["kl_teacher"]:
        parts = [f"{name} {float(details['kl_teacher'][name]['value']):.4f}" for name in (FLOAT, DEPLOYED, PACKAGE)]
        lines.append("KL(teacher || model): " + ", ".join(parts))
    return "\n".join(lines)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Print the table, the gates and the closing line."""
    parser = argparse.ArgumentParser(prog="distill distribution", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an .mlpackage")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint that it was made from")
    parser.add_argument("--reference", type=Path, help="the float student (default: the checkpoint without formats; "
                        "of one trained in formats, the checkpoint that it started from)")  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="KD dataset; its records of split val are read")
    parser.add_argument("--limits", type=Path, default=LIMITS, help="what may be lost, by weight format")
    parser.add_argument("--records", type=int, help="the first so many held-out records; default: all")
    parser.add_argument("--report", type=Path, help="JSON report")
    args = parser.parse_args(argv)
    if args.records is not None and args.records < 1:
        raise InputError(f"--records must be at least 1, not {args.records}")
    limits = config.load(args.limits, LimitsConfig)
    dataset, runner = Dataset.open(args.data), PackageRunner(args.model)
    models = load_models(runner, args.checkpoint, args.reference)
    examples = held_out(dataset, models.tokenizer, runner.capacity, args.records)
    result, details = verdict(runner, models.reference, models.deployed, examples, limits)
    print(table(details))
    print(gates.table(result))
    print(f"{args.model}: {gates.summary(result)}, over {details['tokens']:,} tokens of {details['records']} records")
    if args.report is not None:
        files = {**models.files, "data": args.data, "limits": args.limits}
        made = provenance({"records": args.records}, files | {"header": sidecar(args.data) / "header.json"})
        write_json(args.report, {"schema": "distill-distribution/1", "weights_sha256": runner.contract.weights_sha256,
                                 "gates": gates.to_json(result), **details, "made_by": made})  # fmt: skip
    return gates.exit_code(result)
