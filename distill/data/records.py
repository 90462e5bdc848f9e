"""The KD dataset, schema kd/1: `F.jsonl`, one record a line, and beside it the folder `F.jsonl.d`.

    header.json            what made it: fingerprints, teacher, sampling, configuration, counts, sha256 of each file
    logprobs.safetensors   the teacher's distributions (absent from a text-only set)
    tokenizer.json         the student's tokenizer (absent from a text-only set that names none)
    rejects.jsonl          what the teacher answered and we did not take, each with its reason
    report.json            counts, lengths, costs, what was dropped and why
    report.html            the same for people, with some of the conversations

A record is validated as it is read; errors name file, line and field. Nothing here varies between two runs on the
same answers: times and attempts stay in the journal.
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from distill.artifacts import atomic_file, require_regular, sha256_file
from distill.data.journal import JOURNAL
from distill.data.page import page
from distill.data.schema import (
    Header,
    LogprobInfo,
    LogprobRef,
    Record,
    Teacher,
    Usage,
    completion_ids,
    make_header,
    split_of,
    turn_text,
)
from distill.data.store.distributions import Distribution
from distill.data.store.store import TopK, Writer
from distill.data.store.store import metadata as topk_metadata
from distill.data.tally import Tally, stored_facts
from distill.errors import DatasetError, InputError, describe_os_error
from distill.tokenizer import Tokenizer

__all__ = [
    "SIDECAR_FILES", "Dataset", "Header", "LogprobInfo", "LogprobRef", "Record", "Teacher", "Usage", "absent",
    "completion_ids", "decode_record", "make_header", "read_header", "read_lines", "sidecar", "split_of", "turn_text",
    "write_dataset",
]  # fmt: skip
SIDECAR_FILES = (
    "header.json", "logprobs.safetensors", "tokenizer.json", "rejects.jsonl", "report.json", "report.html",
)  # fmt: skip
MAX_LINE = 64 << 20
_JSON = msgspec.json.Encoder(decimal_format="number")


def sidecar(path: str | Path) -> Path:
    """The folder beside a dataset."""
    return Path(f"{path}.d")


def write_dataset(
    path: str | Path,
    records: Iterable[Record],
    header: Header,
    *,
    distributions: Iterable[Distribution | None] | None = None,
    tokenizer: Tokenizer | None = None,
    rejects: Iterable[Mapping[str, Any]] = (),
    finish: Callable[[Header], Header] = lambda header: header,
    report: Callable[[], Mapping[str, Any]] = dict,
) -> Header:
    """Write a dataset in a stream; `distributions`, in step with the records, sets each record's `logprobs`.

    `rejects`, `finish` and `report` are asked when all records are written: for what is only known then. Every file is
    complete before the first is renamed, and `F.jsonl` is renamed last. Returns the header with its counts and sha256s.
    """
    path, folder = Path(path), sidecar(path)
    if (distributions is None) != (header.logprobs is None) or (distributions is not None and tokenizer is None):
        raise DatasetError(f"{path}: distributions, their description in the header and a tokenizer go together")
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(atomic_file(path))  # entered first, so renamed last
        parts: dict[str, Path] = {}

        def part(name: str) -> Path:
            parts[name] = stack.enter_context(atomic_file(folder / name))
            return parts[name]

        header_part = stack.enter_context(atomic_file(folder / "header.json"))
        tally, stored = Tally(), None
        if header.logprobs is not None and distributions is not None and tokenizer is not None:
            writer = Writer(folder, header.logprobs.k, vocab_size=tokenizer.vocab_size, codec=header.logprobs.codec)
            stack.callback(writer.close)
            _write_records(data, _with_distributions(records, distributions, writer), header.run_id, tally)
            header, stored = _finish_store(part("logprobs.safetensors"), writer, header, tokenizer)
            tally.counts["completion_tokens"] = writer.tokens
        else:
            without = (msgspec.structs.replace(record, logprobs=None) for record in records)
            _write_records(data, without, header.run_id, tally)
        if tokenizer is not None:
            part("tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        lines = [_JSON.encode(reject) + b"\n" for reject in rejects]
        part("rejects.jsonl").write_bytes(b"".join(lines))
        tally.counts["rejected"] = len(lines)
        header = msgspec.structs.replace(finish(header), counts=tally.counts, tools_sha256=tally.tools_sha256)
        facts = {"run_id": header.run_id, **tally.facts(), "distributions": stored, **report()}
        part("report.json").write_bytes(_pretty(facts))
        part("report.html").write_text(page(header, facts, tally.samples), encoding="utf-8")
        files = {"records": sha256_file(data)} | {name: sha256_file(file) for name, file in parts.items()}
        header = msgspec.structs.replace(header, files=files)
        header_part.write_bytes(_pretty(header))
    if header.logprobs is None:
        (folder / "logprobs.safetensors").unlink(missing_ok=True)
    return header


def _pretty(value: object) -> bytes:
    return msgspec.json.format(_JSON.encode(value), indent=2) + b"\n"


def _with_distributions(
    records: Iterable[Record], distributions: Iterable[Distribution | None], writer: Writer
) -> Iterator[Record]:
    """The records, each with where its distributions were put; an endpoint's are made in step with them."""
    found = iter(distributions)
    for record in records:
        item, ref = next(found), None
        if item is not None:
            try:
                ref = LogprobRef(writer.add(item), len(item.token_ids), writer.k)
            except InputError as error:
                raise InputError(f"record {record.id}: {error}") from error
        yield msgspec.structs.replace(record, logprobs=ref)


def _write_records(out: Path, records: Iterable[Record], run_id: str, tally: Tally) -> None:
    seen: set[str] = set()
    with open(out, "wb") as file:
        for record in records:
            if record.id in seen:
                raise DatasetError(f"record {record.id} is given twice")
            seen.add(record.id)
            record = msgspec.structs.replace(record, run_id=run_id)
            file.write(_JSON.encode(record) + b"\n")
            tally.add(record)


def _finish_store(out: Path, writer: Writer, header: Header, tokenizer: Tokenizer) -> tuple[Header, dict[str, Any]]:
    """Write the store; the header with its fidelity, and what the report says of it."""
    assert header.logprobs is not None
    info = msgspec.structs.replace(header.logprobs, kl_to_exact=writer.finish(out, _store_metadata(header, tokenizer)))
    return msgspec.structs.replace(header, logprobs=info), stored_facts(info, writer.tokens, out.stat().st_size)


def _store_metadata(header: Header, tokenizer: Tokenizer) -> dict[str, str]:
    assert header.logprobs is not None
    return topk_metadata(
        tokenizer_sha256=tokenizer.sha256,
        template_sha256=header.template_sha256,
        teacher=f"{header.teacher.model} ({header.teacher.logits_engine or header.teacher.text_engine})",
        k=header.logprobs.k,
        temperature=header.logprobs.temperature,
        vocab_size=tokenizer.vocab_size,
        run_id=header.run_id,
        kind=header.logprobs.kind,
        tail=header.logprobs.tail,
        teacher_sha256=header.teacher.weights_sha256,
    )


class Dataset:
    """A dataset opened for reading: `len`, `[i]`, iteration, `.header`, `.distributions` (None if text-only)."""

    def __init__(self, path: Path, header: Header, starts: array[int], distributions: TopK | None) -> None:
        self.path, self.header, self.distributions = path, header, distributions
        self._starts = starts  # byte offset of each line, and the end of the file

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Open a dataset and check it against its header. DatasetError names what is wrong."""
        path = Path(path)
        starts, digest = _scan(path)
        header = read_header(path)
        if header.files.get("records") != digest:
            raise DatasetError(f"{path}: edited or incomplete: its sha256 is not that of {sidecar(path)}/header.json")
        distributions = None
        if header.logprobs is not None:
            distributions = TopK(sidecar(path) / "logprobs.safetensors")
            for name in ("run_id", "tokenizer_sha256", "template_sha256"):
                if distributions.metadata.get(name) != getattr(header, name):
                    raise DatasetError(f"{distributions.path}: its {name} is not the header's")
        return cls(path, header, starts, distributions)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record:
        """Record `index`, validated."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            return self._checked(file.read(self._starts[index + 1] - self._starts[index]), index + 1)

    def __iter__(self) -> Iterator[Record]:
        """All records in order, read in a stream."""
        for number, line in read_lines(self.path):
            yield self._checked(line, number)

    def distribution(self, record: Record) -> Distribution | None:
        """The teacher's distributions of the record's completion, or None where there are none."""
        if record.logprobs is None or self.distributions is None:
            return None
        item = self.distributions[record.logprobs.row]
        if len(item.token_ids) != record.logprobs.n:
            raise DatasetError(f"{self.path}: record {record.id} names {record.logprobs.n} tokens, its row has "
                               f"{len(item.token_ids)}")  # fmt: skip
        return item

    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer that came with the dataset."""
        found = Tokenizer.from_file(sidecar(self.path) / "tokenizer.json")
        if found.sha256 != self.header.tokenizer_sha256:
            raise DatasetError(f"{found.source}: its sha256 is not the one in header.json")
        return found

    def _checked(self, line: bytes, number: int) -> Record:
        record = decode_record(line, self.path, number)
        if record.run_id != self.header.run_id:
            raise DatasetError(f"{self.path}:{number}: run_id {record.run_id!r} is not the header's")
        if record.logprobs is not None and self.distributions is None:
            raise DatasetError(f"{self.path}:{number}: logprobs: the dataset has no distributions")
        return record


_RECORD = msgspec.json.Decoder(Record)


def decode_record(line: bytes, path: str | Path, number: int) -> Record:
    """A line as a Record; DatasetError names file, line and field."""
    try:
        return _RECORD.decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path}:{number}: {error}") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line. A blank, unfinished or absurdly long line is a DatasetError."""
    number = 0
    require_regular(path)
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise DatasetError(f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB")
                if not line.endswith(b"\n") or not line.strip():
                    raise DatasetError(f"{path}:{number}: the line is {'blank' if line.strip() == b'' else 'cut off'}")
                yield number, line
    except FileNotFoundError as error:
        raise absent(path) from error
    except OSError as error:
        raise DatasetError(f"cannot read dataset {describe_os_error(error, path)}") from error


def absent(path: str | Path) -> DatasetError:
    """What to say where no dataset is."""
    if (sidecar(path) / JOURNAL).is_file():
        return DatasetError(f"{path}: no dataset yet, but the journal of a run; to go on, start that run again")
    return DatasetError(f"{path}: no such dataset")


def read_header(path: str | Path) -> Header:
    """The header of the dataset at `path`."""
    file = sidecar(path) / "header.json"
    require_regular(file)
    try:
        if file.stat().st_size > MAX_LINE:
            raise DatasetError(f"{file}: longer than {MAX_LINE >> 20} MiB")
        return msgspec.json.decode(file.read_bytes(), type=Header)
    except OSError as error:
        raise DatasetError(f"{path}: not a kd/1 dataset: cannot read {describe_os_error(error, file)}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: {error}") from error


def _scan(path: Path) -> tuple[array[int], str]:
    starts, digest = array("Q", [0]), hashlib.sha256()
    for _, line in read_lines(path):
        digest.update(line)
        starts.append(starts[-1] + len(line))
    return starts, digest.hexdigest()
