"""Several processes as torchrun starts them, in milliseconds each: forks of one that has imported torch already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["distill.train.loop", "tests.unit.train_sets", "torch._dynamo", "torch.utils.tensorboard", "peft"]
)


def _child(rank: int, size: int, port: int, stderr: str, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= where | {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    if stderr:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), 2)
    body(*arguments)


class Ranks:
    """`size` processes that each run `body(*arguments)`; `stderr`: the file that they all write it to."""

    def __init__(self, size: int, body: Callable[..., None], *arguments: Any, stderr: str = "") -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            process = _FORKS.Process(target=_child, args=(rank, size, port, stderr, body, arguments))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Their exit codes, once all have ended; one that fails takes the others with it, as under torchrun."""
        until = time.monotonic() + seconds
        while any(process.exitcode is None for process in self.processes) and time.monotonic() < until:
            if any(process.exitcode for process in self.processes):
                time.sleep(0.3)  # for those that fail by themselves
                break
            time.sleep(0.01)
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def send(self, number: int) -> None:
        """A signal to all."""
        for process in self.processes:
            self.send_one(process, number)

    @staticmethod
    def send_one(process: BaseProcess, number: int) -> None:
        """A signal to one of them."""
        with contextlib.suppress(ProcessLookupError):
            if process.exitcode is None and process.pid:
                os.kill(process.pid, number)
