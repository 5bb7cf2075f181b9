"""Log bytes as lines for people: decoded as they come, cut at line ends, harmless to a terminal."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

LINE_CAP = 64 * 1024
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


class LineReader:
    """Turns chunks of bytes, cut anywhere, into lines.

    Bytes that are not UTF-8 become U+FFFD, a carriage return ends a line as a line feed does (progress bars), a line
    longer than 64 KiB is cut with a mark, control sequences are dropped.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = ""
        self._cut = False

    def feed(self, chunk: bytes, *, final: bool = False) -> Iterator[str]:
        """The lines that this chunk completes; with ``final`` the last one too, though it has no line end."""
        text = self._open + self._decoder.decode(chunk, final)
        *whole, self._open = re.split(r"\r\n|\n|\r(?!\Z)", text)
        for line in whole:
            yield from self._given(line)
            self._cut = False
        if len(self._open) > LINE_CAP:
            yield from self._given(self._open)
            self._open, self._cut = "", True
        if final and self._open:
            yield from self._given(self._open.rstrip("\r"))
            self._open = ""

    def _given(self, line: str) -> Iterator[str]:
        if self._cut:
            return  # the rest of a line whose beginning was shown with its mark
        if len(line) > LINE_CAP:
            line = f"{line[:LINE_CAP]}… (line cut at {LINE_CAP // 1024} KiB)"
        yield harmless(line)


def harmless(text: str) -> str:
    """The text without control sequences: a log must not be able to move the cursor or set the title."""
    return _CONTROL.sub("", text)
