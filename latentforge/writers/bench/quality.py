"""How good each model is, from the report of ``latentforge bench quality``: found by the digest of its weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError

_MAKE_ONE = "latentforge bench quality … --json > quality.json"


@dataclass(frozen=True)
class Score:
    """A value with the interval that its report states; ``low`` and ``high`` None where it states none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Quality:
    """What a report says of one student: BrierLM (higher is better), bits a byte (lower is), either perhaps not."""

    brier_lm: Score | None
    bits_per_byte: Score | None

    def as_json(self) -> dict[str, Any]:
        """Both as data."""
        return {name: None if one is None else vars(one) for name, one in vars(self).items()}


def read_quality(path: Path) -> dict[str, Quality]:
    """The qualities in a report, by the sha256 of the student's weights; RefusedError where it is no such report."""
    try:
        found = qualities_in(json.loads(path.read_bytes()))
    except OSError as error:
        raise RefusedError(f"--quality {path} cannot be read: {error.strerror}", next=_MAKE_ONE) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RefusedError(f"--quality {path} is no report of bench quality: {error!r}", next=_MAKE_ONE) from None
    if not found:
        raise RefusedError(f"--quality {path} names no model", next=_MAKE_ONE)
    return found


def qualities_in(report: Any) -> dict[str, Quality]:
    """The same of a report's content (``quality_report.as_json``); ValueError, TypeError, KeyError, AttributeError
    where it is none."""
    return {one["digests"]["student"]: _quality(one) for one in report["models"]}


def _quality(model: dict[str, Any]) -> Quality:
    return Quality(_score(model.get("brier_lm")), _score(model.get("bits_per_byte")))


def _score(found: dict[str, Any] | None) -> Score | None:
    if found is None:
        return None
    value, low, high = (found.get(name) for name in ("value", "low", "high"))
    numbers = [float(one) for one in (value, low, high) if one is not None]
    if value is None or not all(math.isfinite(one) for one in numbers):
        raise ValueError(f"{found} holds no finite value")
    return Score(float(value), None if low is None else float(low), None if high is None else float(high))
