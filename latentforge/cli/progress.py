"""What a long command is doing, on stderr, while it does it."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """A line that is replaced on a terminal and vanishes at the end; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._status: Any = None
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, what: str) -> None:
        """Replace the line."""
        if self._status is not None:
            self._status.update(f"{time.monotonic() - self._began:.0f} s  {what}")
