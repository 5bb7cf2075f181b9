"""Log bytes as lines for people: decoded as they come, cut at line ends, harmless to a terminal."""

from __future__ import annotations

import codecs
import re

LINE_CAP = 64 * 1024
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|\x1b\][^\x07\x1b\n]{0,4096}(?:\x07|\x1b\\)"  # titles, links, clipboard
    r"|\x1b[PX^_][^\x1b\n]{0,4096}\x1b\\"
    r"|\x1b[@-_]"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # the last ones turn the reading order
)
_PLAIN = bytes(byte for byte in range(256) if byte in (0x09, 0x0A) or (byte >= 0x20 and byte not in (0x7F, 0xC2, 0xE2)))
"""Bytes that need no look: a chunk of nothing else is shown as it is, once it is known to be UTF-8."""


class LineReader:
    """Turns chunks of bytes, cut anywhere, into lines.

    Bytes that are not UTF-8 become U+FFFD, a carriage return ends a line as a line feed does (progress bars), a line
    longer than 64 Ki characters is cut with a mark, control sequences are dropped. What is held is one line at most.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = ""
        self._cut = False

    def feed(self, chunk: bytes, *, final: bool = False) -> list[str]:
        """The lines that this chunk completes; with ``final`` the last one too, though it has no line end."""
        if not chunk and not final:
            return []
        text = self._open + self._decoder.decode(chunk, final)
        held, plain = "", _is_plain(chunk)
        if plain:
            # Only what was held, or half of a character, can still hold something else.
            first, end, rest = text.partition("\n")
            text = _ends(first + end) + rest
        else:
            if text.endswith("\r") and not final:
                text, held = text[:-1], "\r"  # perhaps the first half of a line end
            text = _ends(text)
        *whole, self._open = text.split("\n")
        self._open += held
        if plain:
            whole[:2] = [harmless(line) for line in whole[:2]]
        elif whole:
            whole = harmless("\n".join(whole)).split("\n")
        if self._cut and whole:
            del whole[0]  # what came of a line whose beginning was shown with its mark has ended here
            self._cut = False
        if whole and max(map(len, whole)) > LINE_CAP:
            whole = [line if len(line) <= LINE_CAP else _cut(line) for line in whole]
        if len(self._open) > LINE_CAP:
            if not self._cut:
                whole.append(_cut(self._open))
            # The end of what is dropped may be half of a line end.
            self._open, self._cut = self._open[-1:] if self._open.endswith("\r") else "", True
        if final and self._open:
            if not self._cut:
                whole.append(harmless(self._open))
            self._open = ""
        return whole


def _cut(line: str) -> str:
    return f"{harmless(line[:LINE_CAP])}… (line cut at {LINE_CAP // 1024} KiB)"


def _ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _is_plain(chunk: bytes) -> bool:
    return not chunk.translate(None, _PLAIN)


def harmless(text: str) -> str:
    """The text without control sequences: a log must not be able to move the cursor, set the title or turn words."""
    return _CONTROL.sub("", text)


def single_line(text: object, most: int = 400) -> str:
    """Words that a run gave, fit for one line of a display."""
    line = harmless(" ".join(str(text).split()))
    return line if len(line) <= most else line[: most - 1] + "…"
