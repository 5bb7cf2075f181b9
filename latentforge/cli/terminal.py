"""Plain printing: JSON, one accent colour on a terminal, and a passing line that is overwritten, an orderly end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO


def print_json(value: Any) -> None:
    """Print a value as indented JSON, what is not seen escaped: it steers no terminal, and every terminal takes it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print("".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text))


def accent(text: str) -> str:
    """The text in the accent colour on a terminal; as it is in a pipe or where NO_COLOR is set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[36m{text}\x1b[0m"


def size(count: int) -> str:
    """Bytes for people, in powers of 1000: ``41.2 MB``."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


class Passing:
    """A line that shows what is being done and disappears; nothing at all where its stream is no terminal."""

    def __init__(self, *, active: bool = True, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._shown = False
        self._active = active and self._stream.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Passing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    @property
    def columns(self) -> int:
        """Width of the terminal; without one, as wide as it takes."""
        return shutil.get_terminal_size().columns if self._active else 1 << 20

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._active:
            self._stream.write("\r\x1b[2K" + text[: self.columns - 1])
            self._stream.flush()
            self._shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._shown = False


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is inside as Ctrl-C does: what it started is ended, temporary files are removed.

    One that is ignored (SIGHUP under nohup) stays so.
    """
    stopping = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in stopping}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
