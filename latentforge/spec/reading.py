"""Reading what others wrote: whole regular files, and JSON in the numbers of RFC 8785."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError

LARGEST = 1 << 26
"""Bytes of the largest file that is taken into memory whole, unless its reader says otherwise."""

_EXACT = 2**53
_DEEPEST = 64
"""Objects and lists within each other. What walks through a value may call itself once for each of them."""


class UnreadableError(RefusedError):
    """A file that cannot be read as one: ``why`` without its path; ``denied`` where only a right to read is missing."""

    def __init__(self, path: Path, why: str, *, denied: bool = False) -> None:
        super().__init__(f"{path} {why}")
        self.why = why
        self.denied = denied

    @classmethod
    def of(cls, path: Path, error: Exception) -> UnreadableError:
        """What an error of the system says of a file."""
        why = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        return cls(path, why, denied=isinstance(error, PermissionError))


def read_regular(path: Path, *, largest: int = LARGEST) -> bytes:
    """The bytes of a regular file, or of one that a link leads to.

    FileNotFoundError where there is nothing under the name; UnreadableError for a pipe, a folder, a device, a link to
    nothing, a file above ``largest`` bytes, and one that cannot be read.
    """
    try:
        # O_NONBLOCK so that a pipe planted under the name keeps nobody waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UnreadableError(path, "is a link to nothing") from None
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UnreadableError.of(path, error) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableError(path, "is no regular file")
        blocks, length = [], 0
        while block := os.read(descriptor, 1 << 20):
            blocks.append(block)
            length += len(block)
            if max(length, found.st_size) > largest:
                raise UnreadableError(path, f"has {max(length, found.st_size)} bytes, and may have {largest}")
    except OSError as error:
        raise UnreadableError.of(path, error) from error
    finally:
        os.close(descriptor)
    return b"".join(blocks)


def parse_json(text: str | bytes, *, whole: Callable[[str], int | float] | None = None) -> Any:
    """Parse JSON in UTF-8; ValueError for what RFC 8785 could not write again.

    That is NaN, infinity and numbers beyond a double, a key that is written twice, half of a character, and more than
    64 objects and lists within each other. Whole numbers of 2**53 and above become doubles (as flops of a long run),
    unless ``whole`` reads them.
    """
    said = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(
            said, parse_int=whole or _whole, parse_float=_double, parse_constant=_refuse, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if said.count("[") + said.count("{") > _DEEPEST:
        _check_depth(value)
    if "\\u" in said:
        json.dumps(value, ensure_ascii=False).encode()  # half of a character, which no file and no terminal takes
    return value


def _whole(digits: str) -> int | float:
    value = _double(digits)
    return int(digits) if abs(value) < _EXACT else value


def _double(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]}… is beyond what a double holds")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = set()
        for name, _ in pairs:
            if name in names:
                raise ValueError(f"key {name!r} is written twice")
            names.add(name)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"more than {_DEEPEST} objects and lists stand within each other")
