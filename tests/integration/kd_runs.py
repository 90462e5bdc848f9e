"""Runs of `make_kd_mix_hardened` as their user starts them, and what they leave behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill import cli
from tests.unit.fault_teacher import FaultTeacher

DONE, SHORT, BAD, PAUSED, TERMINATED = 0, 1, 2, 75, 143
CONFIG: dict[str, Any] = {
    "max_tokens": 96, "concurrency": 7, "timeout_s": 1.5, "attempts": 6, "prices": {"input": 1.0, "output": 4.0},
}  # fmt: skip


class Ended(NamedTuple):
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said at last: errors and pauses."""
        return [line for line in self.err.splitlines() if line.startswith(("error: ", "paused: "))]


class Runs:
    """Runs with one output."""

    def __init__(
        self, folder: Path, teacher: FaultTeacher, total: int = 40, config: Mapping[str, Any] = CONFIG
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.teacher, self.total = folder, teacher, total
        self.out, self.config = folder / "kd.jsonl", dict(config)
        self.journal = Path(f"{self.out}.d") / "journal.sqlite"

    def start(self, *flags: str, largest_file: int | None = None, **changes: Any) -> subprocess.Popen[str]:
        """Start a run; `changes` are keys of its configuration."""
        config = self.folder / "mix.yaml"
        config.write_text(json.dumps(self.config | changes))
        command = [sys.executable, "-m", "scripts.make_kd_mix_hardened", "--out", str(self.out), "--teacher",
                   self.teacher.url, "--total", str(self.total), "--config", str(config), *flags]  # fmt: skip
        env = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
        env |= {"OMP_NUM_THREADS": "1"}

        def limit() -> None:
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))

        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                                preexec_fn=limit)  # fmt: skip

    def run(self, *flags: str, within: float = 60.0, largest_file: int | None = None, **changes: Any) -> Ended:
        """Run to its end; no traceback, and at most one line of error or pause."""
        return ended(self.start(*flags, largest_file=largest_file, **changes), within)

    def until_done(self, *flags: str, starts: int = 20, **changes: Any) -> Ended:
        """Run, and start again what paused, until it is done."""
        for _ in range(starts):
            end = self.run(*flags, **changes)
            if end.code != PAUSED:
                break
        assert end.code == DONE, end
        return end

    def files(self) -> dict[str, str]:
        """sha256 of the dataset and of every file beside it but the journal."""
        folder = Path(f"{self.out}.d")
        found = [self.out, *sorted(path for path in folder.rglob("*") if path.is_file())]
        kept = [path for path in found if path.is_file() and not path.name.startswith("journal.sqlite")]
        return {str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}

    @contextlib.contextmanager
    def sql(self) -> Iterator[sqlite3.Connection]:
        """The journal, read by SQLite itself."""
        db = sqlite3.connect(f"{self.journal.as_uri()}?mode=ro", uri=True)
        try:
            yield db
        finally:
            db.close()

    def answers(self) -> dict[bytes, str]:
        """sha256 of each answer in the journal, whose integrity SQLite vouches for; empty before there is one."""
        if not self.journal.exists():
            return {}
        with self.sql() as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if not db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'answer'").fetchone()[0]:
                return {}
            return {key: hashlib.sha256(body).hexdigest() for key, body in db.execute("SELECT key, body FROM answer")}

    def one(self, query: str) -> Any:
        with self.sql() as db:
            return db.execute(query).fetchone()[0]

    def open_attempts(self) -> int:
        """Requests that were in flight when the last run ended, as the journal knows them."""
        if not self.journal.exists():
            return 0
        with self.sql() as db:
            if not db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'attempt'").fetchone()[0]:
                return 0
            return db.execute("SELECT count(*) FROM attempt WHERE state = 'open'").fetchone()[0]

    def ledger(self) -> dict[str, Any]:
        """What `distill kd-ledger` says."""
        done = subprocess.run([sys.executable, "-m", "distill", "kd-ledger", str(self.out), "--json"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        return json.loads(done.stdout)


def ended(run: subprocess.Popen[str], within: float = 60.0) -> Ended:
    """Wait for a run's end."""
    try:
        out, err = run.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGKILL)
        out, err = run.communicate()
        raise AssertionError(f"still running after {within} s\n{out[-2000:]}\n{err[-4000:]}") from None
    end = Ended(run.returncode, out, err)
    assert "Traceback" not in err and "Traceback" not in out, err[-4000:]
    assert len(end.lines) <= 1, end
    return end


def wait_until(condition: Any, within: float = 20.0) -> None:
    """Wait for something that another process or thread does."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.002)


def valid(path: Path) -> bool:
    """Whether the validator has nothing against a dataset."""
    return cli.main(["validate-kd", "--in", str(path), "--report", str(path.with_suffix(".report"))]) == 0
