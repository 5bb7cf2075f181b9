"""How numbers, times and foreign text are written in a report."""

from __future__ import annotations

import math
import unicodedata
from typing import TypeGuard

_SHOWN = {"\n", "\t"}
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode's categories of what is not seen: controls, direction marks, halves of characters, other line ends."""


def plain(value: object) -> str:
    """A text with everything that is not seen written out (``⟨U+001B⟩``), so that no run's text can steer a reader."""
    text = value if isinstance(value, str) else str(value)
    if text.isprintable():
        return text
    return "".join(
        f"⟨U+{ord(one):04X}⟩" if one not in _SHOWN and unicodedata.category(one) in _HIDDEN else one for one in text
    )


def one_line(value: object) -> str:
    """A text as :func:`plain`, on one line: no text of a run can look like a line of the report."""
    return plain(value).replace("\n", "⏎").replace("\t", " ")


def fitted(value: object, columns: int) -> str:
    """A text as :func:`one_line`, in exactly that many columns; an ellipsis stands where it is cut."""
    text = one_line(value)
    return f"{text:<{columns}}" if len(text) <= columns else f"{text[: columns - 1]}…"


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for people: whole ones with thousands apart, others with ``digits`` significant digits."""
    if value is None:
        return "not recorded"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{float(value):.{digits - 1}e}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 10**digits:
        return f"{value:#.{digits}g}".rstrip(".")
    if 10**digits <= abs(value) < 1e15:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def worded(value: object) -> str:
    """What an event says where a number is meant: a number as :func:`number` writes it, anything else as it stands."""
    return number(value) if value is None or is_number(value) else plain(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(value: float) -> str:
    """A number as narrow as an axis wants it: ``25k``, ``0.05``, ``1.2M``."""
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-3 <= size < 1e18:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    for least, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= least:
            factor = 1e3 if unit == "k" else least
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """A time for people: ``0.053 s``, ``28.1 s``, ``12:05 min``, ``3:12:00 h``."""
    if seconds is None or not math.isfinite(seconds):
        return "not recorded"
    if abs(seconds) >= 1e9:
        return f"{number(seconds)} s"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def size(count: float | None) -> str:
    """Bytes for people, in powers of 1024: ``599 MiB``."""
    if count is None or not math.isfinite(count):
        return "not recorded"
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    if abs(value) >= 2.0**60:
        return f"{number(value)} B"
    while abs(value) >= 1023.5 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return (
        f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}" if value < 100 else f"{value:.0f} {units[0]}"
    )


def once(count: int, one: str, many: str | None = None) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"
