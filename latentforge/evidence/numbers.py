"""Reading JSON in the numbers of RFC 8785: doubles, so that what is written can be read and written again."""

from __future__ import annotations

import json
from typing import Any

_EXACT = 2**53


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; whole numbers of 2**53 and above become doubles (as flops of a long run), duplicate keys an error."""
    return json.loads(text, parse_int=_whole, parse_constant=_refuse, object_pairs_hook=_object)


def _whole(digits: str) -> int | float:
    value = int(digits)
    return value if abs(value) < _EXACT else float(value)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is written twice")
    return value
