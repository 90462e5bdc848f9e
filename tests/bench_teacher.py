"""`python -m tests.bench_teacher`: how fast teacher data is made, beside a plain loop over the `openai` client.

Two measurements, each client in a process of its own, the servers in theirs, turns taken, medians:
stub     requests a second against a loopback server that answers at once: what the client side costs
llama    tokens a second against llama.cpp's server, beside the most that the server gives at any load
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.llama_server import llama_server

LOADS = (1, 2, 4, 8, 16, 32)
CLIENTS = ("distill", "openai")
SLOTS = max(LOADS)


class Span(NamedTuple):
    """One request: when it was sent and answered (seconds), and the tokens that came."""

    began: float
    ended: float
    tokens: int


class Result(NamedTuple):
    """One client's turn."""

    requests: int
    seconds: float
    tokens_per_s: float
    """While there were requests left to send: what the last ones take to run out says nothing about a long run."""

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


def measured(spans: Sequence[Span], seconds: float) -> Result:
    """A turn from its requests; one that is under way at the end of the window counts in part."""
    start, stop = min(span.began for span in spans), max(span.ended for span in spans)
    end = max(max(span.began for span in spans), (start + stop) / 2)  # few requests are all sent at once
    tokens = sum(
        span.tokens * max(min(span.ended, end) - span.began, 0) / max(span.ended - span.began, 1e-9) for span in spans
    )
    return Result(len(spans), seconds, tokens / (end - start))


def config_of(most_tokens: int) -> Any:
    """The default configuration but for greedy answers to word problems: short ones, hardly any of them rejected."""
    from distill.data.mix_config import MixConfig

    return MixConfig(max_tokens=most_tokens, temperature=0.0, strata={"arithmetic": 1.0})


def bodies(count: int, most_tokens: int, model: str) -> list[dict[str, Any]]:
    """The requests that our run sends, in its order."""
    from distill.data.episodes import Protocol, episode
    from distill.data.prompts.stream import open_prompts
    from distill.data.schema import Teacher
    from distill.data.teacher.spec import Sampling

    config = config_of(most_tokens)
    stream = open_prompts(config, 0, tools=False, room=None)
    protocol = Protocol(Teacher("endpoint", model, text_engine=""), "chat", Sampling(most_tokens, 0.0, config.top_p), 0)
    return [dict(next(episode(prompt, protocol, stream.broker)).body) for prompt in itertools.islice(stream, count)]


def ask_distill(url: str, count: int, most_tokens: int, _: int) -> Result:
    """Our whole run: prompts, probe, client, admission, journal on disk, records; `count` records wanted."""
    import sqlite3

    from distill.data import mix

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kd.jsonl"
        began = time.time()
        mix.make(out, url, count, config_of(most_tokens), quiet=True)
        seconds = time.time() - began
        with contextlib.closing(sqlite3.connect(f"{out}.d/{mix.JOURNAL}")) as db:
            rows = db.execute("SELECT began, ended, completion FROM attempt WHERE purpose='answer' AND state='settled'")
            return measured([Span(*row) for row in rows], seconds)


def ask_openai(url: str, count: int, most_tokens: int, load: int) -> Result:
    """What one would write: the `openai` client, a semaphore's worth of workers, a line of JSON an answer."""
    import openai

    async def run(out: Any) -> list[Span]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            model = (await client.models.list()).data[0].id

            async def one(body: dict[str, Any]) -> int:
                answer = await client.chat.completions.create(**body)
                line = {"messages": body["messages"], "answer": answer.choices[0].message.content}
                out.write(json.dumps(line) + "\n")
                return answer.usage.completion_tokens if answer.usage else 0

            return await in_parallel(one, bodies(count, most_tokens, model), load)

    with tempfile.TemporaryFile("w") as out:
        spans = asyncio.run(run(out))
    return measured(spans, max(span.ended for span in spans) - min(span.began for span in spans))


def ask_raw(url: str, count: int, most_tokens: int, load: int) -> Result:
    """As little as a client can do: the bodies encoded beforehand, nothing read of an answer but its usage."""
    import aiohttp

    async def run() -> list[Span]:
        async with aiohttp.ClientSession() as session:
            model = (await (await session.get(f"{url}/v1/models")).json())["data"][0]["id"]

            async def one(body: bytes) -> int:
                headers = {"Content-Type": "application/json"}
                async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as answer:
                    assert answer.status == 200, await answer.text()
                    return int(json.loads(await answer.read())["usage"]["completion_tokens"])

            encoded = [json.dumps(body).encode() for body in bodies(count, most_tokens, model)]
            return await in_parallel(one, encoded, load)

    spans = asyncio.run(run())
    return measured(spans, max(span.ended for span in spans) - min(span.began for span in spans))


async def in_parallel(one: Callable[[Any], Awaitable[int]], requests: Sequence[Any], load: int) -> list[Span]:
    """`load` workers over the requests."""
    waiting, spans = iter(requests), []

    async def work() -> None:
        for request in waiting:
            began = time.time()
            tokens = await one(request)
            spans.append(Span(began, time.time(), tokens))

    await asyncio.gather(*(work() for _ in range(load)))
    return spans


ASK = {"distill": ask_distill, "openai": ask_openai, "raw": ask_raw}


def turn(client: str, url: str, count: int, most_tokens: int, load: int = SLOTS) -> Result:
    """One client's turn, in a process of its own."""
    options = [client, url, str(count), str(most_tokens), str(load)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench_teacher", "--turn", *options], stdout=subprocess.PIPE, text=True, check=True
    )
    return Result(*json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def fast_stub() -> Iterator[str]:
    """The URL of a server that answers at once."""
    with subprocess.Popen([sys.executable, "-m", "tests.unit.fast_stub"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def bench_stub(count: int, repeats: int) -> dict[str, Any]:
    """Requests a second of each client."""
    rates: dict[str, list[float]] = {client: [] for client in CLIENTS}
    with fast_stub() as url:
        for _ in range(repeats):
            for client in CLIENTS:
                rates[client].append(turn(client, url, count, 64).requests_per_s)
    middle = {client: statistics.median(values) for client, values in rates.items()}
    return {"requests": count, "requests_per_s": rates, "median": middle,
            "distill_over_openai": middle["distill"] / middle["openai"]}  # fmt: skip


def bench_llama(count: int, most_tokens: int, repeats: int, loads: Sequence[int] = LOADS) -> dict[str, Any]:
    """Tokens a second at every load, then of each client beside the best load."""
    with llama_server("--slots", str(SLOTS), "--context", "512", "--no-cache") as url:
        turn("raw", url, 4, 8, 4)  # the first requests find a cold server
        swept = {load: turn("raw", url, 3 * load, most_tokens, load).tokens_per_s for load in loads}
        best = max(swept, key=swept.__getitem__)
        rates: dict[str, list[float]] = {"best load": [], **{client: [] for client in CLIENTS}}
        for _ in range(repeats):
            rates["best load"].append(turn("raw", url, count, most_tokens, best).tokens_per_s)
            for client in CLIENTS:
                rates[client].append(turn(client, url, count, most_tokens).tokens_per_s)
    middle = {client: statistics.median(values) for client, values in rates.items()}
    over = {f"{client}_over_best": middle[client] / middle["best load"] for client in CLIENTS}
    return {"requests": count, "max_tokens": most_tokens, "loads": swept, "best_load": best, "tokens_per_s": rates,
            "median": middle, **over}  # fmt: skip


def show(report: dict[str, Any]) -> None:
    """One table."""
    print(f"{report['cores']} cores, load {report['load_before']:.1f} before and {report['load_after']:.1f} after, "
          f"Python {platform.python_version()}, median of {report['repeats']} turns")  # fmt: skip
    if stub := report.get("stub"):
        print(f"\nserver that answers at once, {stub['requests']} requests a turn, requests/s")
        for client in CLIENTS:
            print(f"  {client:<12}{stub['median'][client]:>9.0f}   {_each(stub['requests_per_s'][client], 0)}")
        print(f"  distill / openai: {stub['distill_over_openai']:.2f}")
    if llama := report.get("llama"):
        print(f"\nllama.cpp's server, SmolLM2-135M, {llama['requests']} requests of up to {llama['max_tokens']} tokens "
              "a turn, tokens/s")  # fmt: skip
        print("  raw requests, by number in flight: "
              + ", ".join(f"{load}: {rate:.1f}" for load, rate in llama["loads"].items()))  # fmt: skip
        for name, rates in llama["tokens_per_s"].items():
            label = f"raw at {llama['best_load']}" if name == "best load" else name
            share = llama["median"][name] / llama["median"]["best load"]
            print(f"  {label:<12}{llama['median'][name]:>9.1f}   {share:.3f} of the best   {_each(rates, 1)}")


def _each(values: Sequence[float], digits: int) -> str:
    return "(" + ", ".join(f"{value:.{digits}f}" for value in values) + ")"


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench_teacher", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one short turn each: that it works, not how fast it is")
    parser.add_argument("--only", choices=["stub", "llama"], help="one of the two measurements")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each client")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_teacher.json"), help="report to write")
    parser.add_argument("--turn", nargs=5, help=argparse.SUPPRESS)  # how it starts itself for one client's turn
    args = parser.parse_args(argv)
    if args.turn:
        client, url, *numbers = args.turn
        print(json.dumps(ASK[client](url, *map(int, numbers))))
        return 0
    repeats = 1 if args.quick else args.repeats
    report: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "repeats": repeats,
                              "load_before": os.getloadavg()[0]}  # fmt: skip
    if args.only != "llama":
        report["stub"] = bench_stub(1000, 1) if args.quick else bench_stub(10_000, repeats)
    if args.only != "stub":
        report["llama"] = bench_llama(12, 96, 1, (4, 16)) if args.quick else bench_llama(128, 96, repeats)
    report["load_after"] = os.getloadavg()[0]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
