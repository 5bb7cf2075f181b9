"""Debian's chromium, headless, spoken to through its DevTools pipe: pages looked at, measured, pictured and printed.

No driver, no port: the protocol's messages go through two pipes, each ended by a NUL.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BINARY = shutil.which("chromium")

_LIFE = "Page.lifecycleEvent"
_OVERFLOW = """
(() => {
  const width = document.documentElement.clientWidth;
  const over = [];
  if (document.documentElement.scrollWidth > width)
    over.push(`the page is ${document.documentElement.scrollWidth} px wide in ${width}`);
  for (const one of document.querySelectorAll('body *')) {
    const box = one.getBoundingClientRect();
    if (!box.width || !box.height || one.closest('svg')) continue;
    const name = `${one.tagName.toLowerCase()}.${one.className}`;
    if (box.right > width + 0.5 || box.left < -0.5)
      over.push(`${name} reaches from ${Math.round(box.left)} to ${Math.round(box.right)} of ${width} px`);
    const clips = ['hidden', 'clip'].includes(getComputedStyle(one).overflowX);
    if (clips && one.scrollWidth > one.clientWidth + 1)
      over.push(`${name} cuts off ${one.scrollWidth - one.clientWidth} px`);
  }
  return over;
})()
"""


def _lifecycle(told: dict[str, Any]) -> dict[str, Any]:
    """Of which page an event of the protocol says what; empty where it says nothing of a page's life."""
    said = told.get("params", {})
    method = told.get("method")
    return {"method": method, "loader": said["loaderId"], "name": said["name"]} if method == _LIFE else {}


@dataclass
class Seen:
    """What a page did when it was shown: ``console`` its messages and errors, ``asked`` addresses that it asked for
    beside its own, ``overflow`` what reaches out of the window, ``height`` of the page in CSS pixels."""

    console: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    overflow: list[str] = field(default_factory=list)
    height: int = 0


class Chromium:
    """A browser of its own, with a profile that lies in ``folder``; ended with everything below it."""

    def __init__(self, folder: Path) -> None:
        assert BINARY is not None, "chromium is not installed (.ci/run lists it)"
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--mute-audio",
            "--hide-scrollbars", "--font-render-hinting=none", "--force-color-profile=srgb",
            f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip

        def places() -> None:  # the protocol is read from 3 and written to 4
            low_in, low_out = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(low_in, 3)
            os.dup2(low_out, 4)

        self._process = subprocess.Popen(
            [BINARY, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=places,
            pass_fds=(3, 4),
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._count = 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        try:
            page = self.ask("Target.createTarget", url="about:blank")["targetId"]  # its own may not be there yet
            self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
            self.ask("Page.setLifecycleEventsEnabled", enabled=True)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        os.close(self._out)
        os.close(self._in)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command of the protocol; events that come before it are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._count:
                assert "error" not in told, f"{method}: {told['error']}"
                answer: dict[str, Any] = told["result"]
                return answer
            self._events.append(told)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 16)
            assert part, f"chromium ended with {self._process.wait()}"
            self._buffer += part
        whole, _, self._buffer = self._buffer.partition(b"\0")
        told: dict[str, Any] = json.loads(whole)
        return told

    def show(self, page: Path, *, width: int, dark: bool = False, media: str = "", scale: float = 2) -> Seen:
        """Open a page ``width`` CSS pixels wide and say what it did; ``media`` ``print`` lays it out as paper is.

        ``scale`` is how many pixels of a picture a CSS pixel is wide."""
        self._events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=scale, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        address = page.resolve().as_uri()
        loader = self.ask("Page.navigate", url=address)["loaderId"]
        loaded = {"method": _LIFE, "loader": loader, "name": "load"}
        while not any(_lifecycle(one) == loaded for one in self._events):  # of this page, not of the one before
            self._events.append(self._next())
        overflow = self._value(_OVERFLOW)  # laid out first, so that what it asks for and says has come
        height = self._value("document.documentElement.scrollHeight")
        seen = Seen(overflow=overflow, height=height)
        for one in self._events:
            said = one.get("params", {})
            match one.get("method"):
                case "Runtime.consoleAPICalled":
                    seen.console.append(" ".join(str(each.get("value")) for each in said["args"]))
                case "Runtime.exceptionThrown":
                    seen.console.append(said["exceptionDetails"]["text"])
                case "Log.entryAdded":
                    seen.console.append(said["entry"]["text"])
                case "Network.requestWillBeSent" if said["request"]["url"] != address:
                    seen.asked.append(said["request"]["url"])
        return seen

    def picture(self, path: Path, *, height: int | None = None) -> None:
        """Write a PNG of the page that is shown, down to ``height`` CSS pixels (all of it)."""
        metrics = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": metrics["width"], "height": height or metrics["height"], "scale": 1}
        taken = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))

    def printed(self) -> bytes:
        """The page that is shown as a PDF on A4."""
        taken = self.ask(
            "Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True, printBackground=True
        )
        return base64.b64decode(taken["data"])

    def _value(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")
