"""What lies in ``out/`` for people: samples side by side, and what a bench measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.report.chart import Chart, Mark

_LONGEST = 4000
"""Characters of one sample that are shown."""


@dataclass(frozen=True)
class Sample:
    """A beginning, and how the text and each model went on: ``(who, text)``."""

    prompt: str
    continued: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Contestant:
    """A contestant of a bench: speed in tokens/s (median, least, greatest), operations a token, quality where known."""

    name: str
    speed: float
    least: float
    greatest: float
    flops: float | None
    bits: tuple[float, float, float] | None
    brier: tuple[float, float, float] | None
    other_engine: bool


def samples(folder: Path) -> tuple[list[Sample], str | None]:
    """The samples of ``out/samples.json``, and what is wrong with the file if something is."""
    value, wrong = _json(folder / "out" / "samples.json")
    if value is None:
        return [], wrong
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return [], "out/samples.json holds no list of samples"
    order = ["text", "teacher", "student", "latent", "twin"]
    found = []
    for one in value:
        names = sorted((name for name in one if name != "prompt"), key=lambda name: _place(order, name))
        told = tuple((_NAMES.get(name, name), _cut(one[name])) for name in names)
        found.append(Sample(_cut(one.get("prompt", "")), told))
    return found, None


_NAMES = {"text": "the text itself"}


def _place(order: list[str], name: str) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST} characters more)"


def bench(folder: Path) -> tuple[list[Contestant], str | None]:
    """The contestants of ``out/bench.json``, and what is wrong with the file if something is."""
    value, wrong = _json(folder / "out" / "bench.json")
    if value is None:
        return [], wrong
    try:
        return [_contestant(one) for one in value["contestants"]], None
    except (KeyError, TypeError, ValueError) as error:
        return [], f"out/bench.json is no bench's report: {type(error).__name__} {error}"


def quality(contestants: list[Contestant]) -> list[Chart]:
    """Quality against compute: bits a byte and BrierLM by operations a token, with their intervals."""
    charts = []
    for name, title, unit in (
        ("bits", "Bits a byte against compute", "lower is better"),
        ("brier", "BrierLM against compute", "higher is better"),
    ):
        marks = []
        for place, one in enumerate(one for one in contestants if not one.other_engine):
            score = one.bits if name == "bits" else one.brier
            if score is not None and one.flops is not None:
                value, low, high = score
                whiskers = ((one.flops, low, high),)
                marks.append(Mark(one.name, f"run{place}", ((one.flops, value),), dots=True, whiskers=whiskers))
        if marks:
            across = "operations a token, sampler included"
            charts.append(Chart(name, title, unit, tuple(marks), across, zero=True, steps=False))
    return charts


def _contestant(one: dict[str, Any]) -> Contestant:
    speed, known = one["tokens_per_second"], one.get("quality") or {}
    return Contestant(
        str(one["name"]),
        float(speed["median"]),
        float(speed["least"]),
        float(speed["greatest"]),
        None if one.get("flops_per_token") is None else float(one["flops_per_token"]),
        _score(known.get("bits_per_byte")),
        _score(known.get("brier_lm")),
        one.get("role") == "transformers",
    )


def _score(value: Any) -> tuple[float, float, float] | None:
    if not isinstance(value, dict) or value.get("value") is None:
        return None
    centre = float(value["value"])
    low, high = value.get("low"), value.get("high")
    return centre, centre if low is None else float(low), centre if high is None else float(high)


def _json(path: Path) -> tuple[Any, str | None]:
    try:
        return json.loads(path.read_bytes()), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, RecursionError) as error:
        return None, f"out/{path.name} cannot be read: {error}"
