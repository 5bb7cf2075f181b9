"""Log bytes as lines for people: decoded as they come, cut at line ends, harmless to a terminal."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self

LINE_CAP = 64 * 1024
_CONTROL = re.compile(
    # The last ones turn the reading order, or are halves of characters.
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    r"(?:(?<=\x1b)(?:"  # one set of characters first: the search for it is as quick as can be
    r"\[[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|\][^\x07\x1b\n]{0,4096}(?:\x07|\x1b\\)"  # titles, links, clipboard
    r"|[PX^_][^\x1b\n]{0,4096}\x1b\\"
    r"|[@-_]))?"
)
_PLAIN = bytes(byte for byte in range(256) if byte in (0x09, 0x0A) or (byte >= 0x20 and byte not in (0x7F, 0xC2, 0xE2)))
"""Bytes that need no look: a chunk of nothing else is shown as it is, once it is known to be UTF-8."""


@dataclass(frozen=True)
class Lines:
    """Whole lines as one text with a line feed between each two: of a flood, hardly one is looked at by itself."""

    text: str
    some: bool
    """Whether there is a line at all: one that is empty is a line."""

    @classmethod
    def of(cls, lines: Iterable[str]) -> Self:
        """These lines, none of which holds a line feed."""
        several = list(lines)
        return cls("\n".join(several), bool(several))

    @cached_property
    def _count(self) -> int:
        return self.text.count("\n") + 1 if self.some else 0

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return self.some

    def __iter__(self) -> Iterator[str]:
        return iter(self.text.split("\n") if self.some else ())

    def last(self, count: int) -> list[str]:
        """The last lines, at most so many."""
        return self.text.rsplit("\n", count)[-count:] if self.some else []


NO_LINES = Lines("", False)


class LineReader:
    """Turns chunks of bytes, cut anywhere, into lines.

    Bytes that are not UTF-8 become U+FFFD, a carriage return ends a line as a line feed does (progress bars), a line
    longer than 64 Ki characters is cut with a mark, control sequences are dropped. What is held is one line at most.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = ""
        self._cut = False

    def feed(self, chunk: bytes, *, final: bool = False) -> Lines:
        """The lines that this chunk completes; with ``final`` the last one too, though it has no line end."""
        if not chunk and not final:
            return NO_LINES
        text = self._decoder.decode(chunk, final)
        first, last = text.find("\n") + 1, text.rfind("\n") + 1
        if final or last == first or not _is_plain(chunk):
            return self._looked_at(text, final=final)
        # What was held, or half of a character, can still hold something else: both end with the first line.
        begin, middle = self._looked_at(text[:first]), text[first : last - 1]
        between = Lines(middle, True) if _fits(middle) else self._looked_at(text[first:last])
        return _joined(begin, between, self._looked_at(text[last:]))

    def _looked_at(self, text: str, *, final: bool = False) -> Lines:
        """The lines that a text completes, each looked at."""
        text, held = self._open + text, ""
        if text.endswith("\r") and not final:
            text, held = text[:-1], "\r"  # perhaps the first half of a line end
        *whole, self._open = _ends(text).split("\n")
        self._open += held
        if whole:
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
        return Lines.of(whole)


def _cut(line: str) -> str:
    return f"{harmless(line[:LINE_CAP])}… (line cut at {LINE_CAP // 1024} KiB)"


def _ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _joined(*parts: Lines) -> Lines:
    texts = [part.text for part in parts if part]
    return Lines("\n".join(texts), bool(texts))


def _fits(text: str) -> bool:
    """Whether no line of a text is longer than a line may be."""
    at = 0
    while len(text) - at > LINE_CAP:
        if (end := text.rfind("\n", at, at + LINE_CAP + 1)) < 0:
            return False
        at = end + 1
    return True


def _is_plain(chunk: bytes) -> bool:
    return not chunk.translate(None, _PLAIN)


def harmless(text: str) -> str:
    """The text without control sequences: a log must not be able to move the cursor, set the title or turn words."""
    return _CONTROL.sub("", text)


def single_line(text: object, most: int = 400) -> str:
    """Words that a run gave, fit for one line of a display."""
    line = harmless(" ".join(str(text).split()))
    return line if len(line) <= most else line[: most - 1] + "…"
