"""`distill kd-ledger F.jsonl`: what a run has spent, read from its journal, also while it is running."""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any

from distill.data.budget import UNIT, usd
from distill.data.journal import JOURNAL, Totals, damage, read_ledger, totals
from distill.data.records import sidecar
from distill.errors import stage_main

_MEANING = {
    "settled": "answered, as the server counted; where it did not count, as reserved",
    "uncertain": "perhaps served, no answer came: counted as reserved",
    "open": "in flight, or cut off when a run died: counted as reserved",
    "released": "not served: costs nothing",
}


def ledger(path: str | Path) -> dict[str, Any]:
    """The ledger of the dataset at `path`: sums by state and by purpose, and the statuses that servers gave."""
    journal = sidecar(path) / JOURNAL
    with contextlib.closing(read_ledger(journal)) as db, damage(journal):
        db.execute("BEGIN")  # one moment in time for all that follows
        states = totals(db)
        counted = [states[name] for name in ("settled", "uncertain", "open") if name in states]
        return {
            "dataset": str(path),
            "counted": _plain(sum(counted, Totals())),
            **{name: _plain(states.get(name, Totals())) for name in _MEANING if name != "released"},
            "released": {"attempts": states.get("released", Totals()).attempts},
            "probe": _plain(sum((t for s, t in totals(db, "purpose='probe'").items() if s != "released"), Totals())),
            "usage": _usage(db),
            "answers": db.execute("SELECT count(*) FROM answer WHERE dead IS NULL").fetchone()[0],
            "runs": db.execute("SELECT count(*) FROM run").fetchone()[0],
            "statuses": {str(status): n for status, n in db.execute(
                "SELECT status, count(*) FROM attempt WHERE status IS NOT NULL GROUP BY status ORDER BY status")},
        }  # fmt: skip


def _usage(db: sqlite3.Connection) -> dict[str, int]:
    names = ("prompt", "cached", "completion", "reasoning")
    row = db.execute(f"SELECT {', '.join(f'coalesce(sum({name}), 0)' for name in names)} FROM attempt").fetchone()
    return dict(zip(names, row))


def _plain(sums: Totals) -> dict[str, Any]:
    return {"attempts": sums.attempts, "tokens": sums.tokens, "cost_usd": f"{sums.cost * UNIT:f}"}


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Print a run's ledger."""
    parser = argparse.ArgumentParser(prog="distill kd-ledger", description="What a dataset's generation has spent.")
    parser.add_argument("path", help="the dataset, F.jsonl; it need not be finished")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    args = parser.parse_args(argv)
    found = ledger(args.path)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    priced = Decimal(found["counted"]["cost_usd"]) > 0
    for name, meaning in _MEANING.items():
        part = found[name]
        tokens = " " * 21 if name == "released" else f"{part['tokens']:>14,} tokens"
        money = f" {_dollars(part):>12} USD" if priced and name != "released" else " " * (17 * priced)
        print(f"{name:10} {part['attempts']:>9,} attempts{tokens}{money}  {meaning}")
    counted = found["counted"]
    money = f", {_dollars(counted)} USD" if priced else " (no prices are in the mix)"
    plural = "s" * (found["runs"] != 1)
    print(f"counted against the budget: {counted['tokens']:,} tokens{money}; {found['answers']:,} answers kept; "
          f"started {found['runs']} time{plural}; of the probe: {found['probe']['attempts']} attempts")  # fmt: skip
    return 0


def _dollars(part: dict[str, Any]) -> str:
    return usd(int(Decimal(part["cost_usd"]) / UNIT))
