"""One host's table in the text of ``hosts.toml``, replaced where it stands; what people wrote around it is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def with_table(text: str, name: str, values: Mapping[str, Any]) -> str:
    """The text with that host's table replaced, or added at the end.

    Comments stay: those of other tables where they are, those within this one below its header.
    """
    lines, wanted = text.splitlines(), _table(values)
    header = re.compile(rf"^\s*\[\s*hosts\s*\.\s*(?:\"{re.escape(name)}\"|{re.escape(name)})\s*\]\s*(?:#.*)?$")
    at = next((number for number, line in enumerate(lines) if header.match(line)), None)
    if at is None:
        while lines and not lines[-1].strip():
            lines.pop()
        head = f'[hosts."{name}"]' if "." in name else f"[hosts.{name}]"
        return "\n".join([*lines, *([""] if lines else []), head, *wanted]) + "\n"
    end = next((at + 1 + more for more, line in enumerate(lines[at + 1 :]) if line.lstrip()[:1] == "["), len(lines))
    last = end
    while last > at + 1 and (not lines[last - 1].strip() or lines[last - 1].lstrip()[0] == "#"):
        last -= 1  # what stands before the next table is about that one
    said = [line for line in lines[at + 1 : last] if line.lstrip().startswith("#")]
    return "\n".join([*lines[: at + 1], *said, *wanted, *lines[last:]]) + "\n"


def _table(values: Mapping[str, Any]) -> list[str]:
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if name != "keys"]
    if values.get("keys"):
        lines.append("keys = [")
        for key in values["keys"]:
            inner = ", ".join(f"{name} = {_toml(value)}" for name, value in key.items())
            lines.append(f"    {{ {inner} }},")
        lines.append("]")
    return lines


def _toml(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # A TOML basic string: quotes and backslashes escaped, control characters as \uXXXX.
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped) + '"'
