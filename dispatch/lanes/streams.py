"""Lines of several hosts in one stream: each whole, each with its host's name before it."""

from __future__ import annotations

import io
import threading
from typing import TextIO, cast

_turn = threading.Lock()


class HostStream(io.TextIOBase):
    """Text for one host's lines; a line is written to the stream below when it is whole."""

    def __init__(self, host: str, below: TextIO, width: int = 0) -> None:
        super().__init__()
        self._host, self._below, self._width = host, below, width
        self._open = ""

    def write(self, text: str) -> int:
        """Take text, pass whole lines on."""
        *whole, self._open = (self._open + text).split("\n")
        with _turn:
            for line in whole:
                self._below.write(f"{self._host:<{self._width}} | {line}\n")
            if whole:
                self._below.flush()
        return len(text)

    def fileno(self) -> int:
        """That of the stream below: whoever finds it closed puts it aside for all hosts."""
        return self._below.fileno()


def host_stream(host: str, below: TextIO, width: int = 0) -> TextIO:
    """Such a stream, as what prints to a file takes it."""
    return cast(TextIO, HostStream(host, below, width))
