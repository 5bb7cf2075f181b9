"""What a pipeline asks of a bench, and whether it was so: a verdict for each gate that is set."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from latentforge.spec.bench import BenchSpec
from latentforge.verdicts import Outcome, Verdict
from latentforge.writers.bench.hits import Hits
from latentforge.writers.bench.memory import Peak
from latentforge.writers.bench.turns import Measured, quantile

GIGABYTE = 1e9


@dataclass(frozen=True)
class Seen:
    """What the gates are held against: the student's own figures, the peak of the whole bench, the run's cache."""

    tokens_per_second: Sequence[float]
    to_first: Sequence[float]
    between: Sequence[float]
    peak: Peak
    hits: Hits | None

    @classmethod
    def of(cls, ours: Measured, peak: Peak, hits: Hits | None) -> Seen:
        """Of what was measured."""
        return cls(ours.tokens_per_second, ours.to_first, ours.between, peak, hits)


def judge(gates: BenchSpec, seen: Seen) -> list[Verdict]:
    """A verdict for each gate that is set; what is not known fails to pass."""
    found = [_speed(gates, seen), _latency(gates, seen), _memory(gates, seen), _cache(gates, seen)]
    return [verdict for verdict in found if verdict is not None]


def _speed(gates: BenchSpec, seen: Seen) -> Verdict | None:
    least = gates.min_tokens_per_second
    if least is None:
        return None
    value = statistics.median(seen.tokens_per_second)
    return _verdict("F-BENCH-SPEED-001", value >= least, f"{_against(value, least, '>=')} produced tokens/s", value)


def _latency(gates: BenchSpec, seen: Seen) -> Verdict | None:
    asked = (
        ("to the first chunk", gates.max_p95_first_chunk_s, seen.to_first),
        ("a chunk", gates.max_p95_chunk_s, seen.between),
    )
    told, measured, outcomes = [], {}, []
    for what, most, readings in asked:
        if most is None:
            continue
        value = quantile(readings, 0.95)
        measured[what] = value
        if value is None:  # no text had two chunks
            told.append(f"p95 {what} is not known: no text had two")
            outcomes.append(Outcome.UNKNOWN)
            continue
        told.append(f"p95 {_against(value, most, '<=')} s {what}")
        outcomes.append(Outcome.PASS if value <= most else Outcome.FAIL)
    if not outcomes:
        return None
    return Verdict("F-BENCH-LATENCY-001", min(outcomes), ", ".join(told), measured)


def _memory(gates: BenchSpec, seen: Seen) -> Verdict | None:
    most = gates.max_peak_memory_gb
    if most is None:
        return None
    value = seen.peak.total / GIGABYTE
    parts = "" if seen.peak.gpu is None else ", process and GPU together"
    text = f"peak memory {_against(value, most, '<=')} GB{parts}"
    return _verdict("F-BENCH-MEMORY-001", value <= most, text, value)


def _cache(gates: BenchSpec, seen: Seen) -> Verdict | None:
    least = gates.min_hit_rate
    if least is None:
        return None
    if seen.hits is None:
        text = f"hit rate not known, {least:.1%} asked: no run was named whose teacher had a cache"
        return Verdict("F-BENCH-CACHE-001", Outcome.UNKNOWN, text)
    rate = seen.hits.rate
    sign = ">=" if rate >= least else "<"
    text = f"hit rate {rate:.1%} {sign} {least:.1%} of the answers of {seen.hits.run}"
    return _verdict("F-BENCH-CACHE-001", rate >= least, text, rate)


def _verdict(falsifier: str, passed: bool, text: str, value: float) -> Verdict:
    return Verdict(falsifier, Outcome.PASS if passed else Outcome.FAIL, text, {"measured": value})


def _against(value: float, bound: float, sign: str) -> str:
    holds = value >= bound if sign == ">=" else value <= bound
    shown = sign if holds else {">=": "<", "<=": ">"}[sign]
    return f"{value:.4g} {shown} {bound:.4g}"
