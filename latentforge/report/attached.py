"""What lies in ``out/`` for people: samples side by side, and what a bench measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.report.axes import drawable
from latentforge.report.chart import Chart, Mark, colour
from latentforge.report.words import is_number, number

_LONGEST = 4000
"""Characters of one sample that are shown."""


@dataclass(frozen=True)
class Sample:
    """A beginning, and how the text and each model went on: ``(who, text)``."""

    prompt: str
    continued: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Contestant:
    """A contestant of a bench: speed in tokens/s (median, least, greatest), operations a token, quality where known.

    Any of the numbers may be one that has no place in a picture. ``colour`` is its mark's in all of them.
    """

    name: str
    colour: str
    speed: float
    least: float
    greatest: float
    flops: float | None
    bits: tuple[float, float, float] | None
    brier: tuple[float, float, float] | None
    other_engine: bool

    @property
    def told(self) -> str:
        """Its speed in words: ``700 tokens/s (691–709)``."""
        return f"{_rate(self.speed)} tokens/s ({_rate(self.least)}–{_rate(self.greatest)})"

    def width(self, fastest: float) -> float:
        """How long its bar is, in percent of the ``fastest``'s; 0 for a speed that is none."""
        return 100 * self.speed / fastest if drawable(self.speed) and self.speed > 0 else 0.0


def fastest(contestants: list[Contestant]) -> float:
    """The speed that the longest bar stands for, tokens/s."""
    return max((one.speed for one in contestants if drawable(one.speed) and one.speed > 0), default=1.0)


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
    if not text.strip():  # nothing to be seen: what a model wrote is told all the same
        text = text.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥") or "(nothing)"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST} characters more)"


def bench(folder: Path) -> tuple[list[Contestant], str | None]:
    """The contestants of ``out/bench.json``, and what is wrong with the file if something is."""
    value, wrong = _json(folder / "out" / "bench.json")
    if value is None:
        return [], wrong
    try:
        return [_contestant(place, one) for place, one in enumerate(value["contestants"])], None
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        return [], f"out/bench.json is no bench's report: {type(error).__name__} {error}"


def quality(contestants: list[Contestant]) -> list[Chart]:
    """Quality against compute: bits a byte and BrierLM by operations a token, with their intervals."""
    charts = []
    for name, title, unit in (
        ("bits", "Bits a byte against compute", "lower is better"),
        ("brier", "BrierLM against compute", "higher is better"),
    ):
        marks = []
        for one in contestants:
            score = one.bits if name == "bits" else one.brier
            if not one.other_engine and score is not None and one.flops is not None:
                value, low, high = score
                whiskers = ((one.flops, low, high),)
                marks.append(Mark(one.name, one.colour, ((one.flops, value),), dots=True, whiskers=whiskers))
        if marks:
            across = "operations a token, sampler included"
            charts.append(Chart(name, title, unit, tuple(marks), across, zero=True, steps=False))
    return charts


def _rate(value: float) -> str:
    return number(round(value)) if drawable(value) else number(value)


def _contestant(place: int, one: dict[str, Any]) -> Contestant:
    speed, known = one["tokens_per_second"], one.get("quality") or {}
    return Contestant(
        _text(one["name"]),
        colour(place),
        _float(speed["median"]),
        _float(speed["least"]),
        _float(speed["greatest"]),
        None if one.get("flops_per_token") is None else _float(one["flops_per_token"]),
        _score(known.get("bits_per_byte")),
        _score(known.get("brier_lm")),
        one.get("role") == "transformers",
    )


def _score(value: Any) -> tuple[float, float, float] | None:
    if value is None or value.get("value") is None:
        return None
    centre = _float(value["value"])
    low, high = value.get("low"), value.get("high")
    return centre, centre if low is None else _float(low), centre if high is None else _float(high)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 20 else f"{text[:20]}…"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"says {_shown(value)} where a name is meant")
    return value


def _float(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"says {_shown(value)} where a number is meant")
    return float(value)


def _json(path: Path) -> tuple[Any, str | None]:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
            return None, f"out/{path.name} is no file"
        value = json.loads(path.read_bytes())
        return value, f"out/{path.name} holds nothing but null" if value is None else None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, RecursionError) as error:
        return None, f"out/{path.name} cannot be read: {error}"
