"""A real browser for the tests of pages: Chromium, spoken to over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import pytest
from PIL import Image

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: .ci/run installs it")
SECONDS = 60
_LIVE = """[...document.querySelectorAll('*')].filter(one => /^(script|img|iframe|object|embed|link|form)$/i.test(
  one.tagName) || one.getAttributeNames().some(name => /^(on|src|style$)/.test(name))).map(one => one.tagName)"""


class Seen(NamedTuple):
    """A page as a browser shows it."""

    pixels: np.ndarray
    """[height, width, 3]"""
    width: int
    """What it takes; more than the window's width is scrolled sideways."""
    title: str
    text: str
    live: list[str]
    """Names of elements that run or load something."""
    complaints: list[str]
    """Console messages and errors."""


class Browser:
    """A running browser."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self._loop.close()

    def see(self, page: Path, width: int, *, dark: bool = False, open_details: bool = True) -> Seen:
        """Load a file in a window of this width and look at all of it."""
        return self._loop.run_until_complete(asyncio.wait_for(self._see(page, width, dark, open_details), SECONDS))

    async def _see(self, page: Path, width: int, dark: bool, open_details: bool) -> Seen:
        async with aiohttp.ClientSession() as session, session.ws_connect(self._address, max_msg_size=0) as socket:
            tab = _Tab(socket)
            target = (await tab.ask("Target.createTarget", url="about:blank"))["targetId"]
            tab.session = (await tab.ask("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                await tab.ask(f"{domain}.enable")
            await tab.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            await tab.ask("Emulation.setEmulatedMedia", features=scheme)
            await tab.ask("Page.navigate", url=page.resolve().as_uri())
            await tab.until("Page.loadEventFired")
            if open_details:
                await tab.value("document.querySelectorAll('details').forEach(one => { one.open = true })")
            wide, high = await tab.value(
                "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
            )
            clip = {"x": 0, "y": 0, "width": width, "height": min(high, 4_000), "scale": 1}
            shot = await tab.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
            title, text, live = await tab.value(f"[document.title, document.body.innerText, {_LIVE}]")
            await tab.ask("Target.closeTarget", targetId=target)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))
        return Seen(pixels, wide, title, text, live, tab.complaints)


class _Tab:
    """Requests, their answers, and what the page complains of meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self._events = socket, 0, list[str]()
        self.session: str | None = None
        self.complaints: list[str] = []

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        more = {"sessionId": self.session} if self.session else {}
        await self._socket.send_json({"id": self._number, "method": method, "params": params, **more})
        while True:
            answer = await self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    async def until(self, event: str) -> None:
        while event not in self._events:
            await self._read()

    async def value(self, script: str) -> Any:
        found = await self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    async def _read(self) -> dict[str, Any]:
        message = await self._socket.receive_json()
        method = message.get("method", "")
        self._events.append(method)
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(str(message["params"]))
        if method == "Page.javascriptDialogOpening":
            self.complaints.append(f"a dialog: {message['params']['message']}")
            await self._socket.send_json({"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True},
                                          "sessionId": self.session})  # fmt: skip
        return message


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a window, until the end of the block."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory() as profile, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             "--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}",
             "--remote-debugging-port=0", "about:blank"], stdout=subprocess.DEVNULL, stderr=said)  # fmt: skip
        try:
            found = Browser(_address(process, Path(profile) / "DevToolsActivePort"))
            yield found
            found.close()
        finally:
            process.terminate()
            process.wait(timeout=SECONDS)


def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    for _ in range(SECONDS * 10):
        assert process.poll() is None, "Chromium ended before it began"
        if file.is_file() and (found := re.fullmatch(r"(\d+)\n(/\S+)", file.read_text())):
            return f"ws://127.0.0.1:{found[1]}{found[2]}"
        time.sleep(0.1)
    raise AssertionError("Chromium does not say where it listens")
