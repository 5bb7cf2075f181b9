"""Scenarios that were measured, as one table: who was asked, who is fastest, what failed and what to type."""

from __future__ import annotations

from collections.abc import Sequence

from latentforge.teachers.scenarios import CHAT_K, CHAT_TOKENS, TITLES, Figures, Measured
from latentforge.verdicts.exitcode import ExitCode

_HEAD = (
    *("scenario", "capability", "k", "requests", "tokens", "tokens/s", "p50", "p95", "hits", "429s", "errors"),
    *("store", "verdict"),
)


def table(measured: Sequence[Measured]) -> list[str]:
    """A row a scenario, a sentence of who is fastest, then a scenario's own lines: what was asked, what went wrong."""
    rows = [_HEAD, *(_row(one) for one in measured)]
    wide = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], wide[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:-1], wide[2:-1], strict=True)]
        lines.append("  " + "  ".join([*left, *right, row[-1]]).rstrip())
    if said := fastest(measured):
        lines += ["", f"  {said}"]
    lines.append("")
    for one in measured:
        lines += [f"  {TITLES[one.scenario.name]}: {sentence}" for sentence in _sentences(one)]
        lines += [f"    next: {one.next}"] if one.next else []
    return lines


def fastest(measured: Sequence[Measured]) -> str:
    """Who scored the most tokens a second, and what share of it the others reach; empty where fewer than two did."""
    scored = [
        (one.figures.tokens_per_s, TITLES[one.scenario.name])
        for one in measured
        if one.verdict == "pass" and one.figures.capability == "score" and one.figures.tokens_per_s
    ]
    if len(scored) < 2:
        return ""
    (most, first), *others = sorted(scored, reverse=True)
    shares = ", ".join(f"{title} reaches {speed / most:.0%} of that" for speed, title in others)
    return f"{first} is the fastest with {most:.0f} tokens/s; {shares}"


def worst(measured: Sequence[Measured]) -> ExitCode:
    """1 where one failed, 3 where none failed and one was not run, else 0."""
    verdicts = {one.verdict for one in measured}
    return ExitCode.FAIL if "fail" in verdicts else ExitCode.UNKNOWN if "unknown" in verdicts else ExitCode.PASS


def _row(one: Measured) -> tuple[str, ...]:
    found = one.figures
    return (
        TITLES[one.scenario.name],
        found.capability or "–",
        _entries(found),
        _count(found.requests),
        _count(found.charged_tokens),
        _count(found.tokens_per_s),
        _milliseconds(found.p50_s),
        _milliseconds(found.p95_s),
        "–" if found.hit_rate is None else f"{found.hit_rate:.0%}",
        _count(found.rate_limit_events),
        "–" if found.requests is None else str(sum(_errors(found).values())),
        "–" if found.store_bytes is None else f"{found.store_bytes / 1e3:.1f} kB",
        one.verdict,
    )


def _entries(found: Figures) -> str:
    if found.k is None or found.k_least in (None, found.k):
        return _count(found.k)
    return f"{found.k_least}–{found.k}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.0f} ms"


def _errors(found: Figures) -> dict[str, int]:
    """Failed attempts by kind, without those that a rate limit refused."""
    return {kind: count for kind, count in found.failures.items() if kind != "rate-limited"}


def _sentences(one: Measured) -> list[str]:
    spec, found = one.scenario.teacher, one.figures
    said = []
    if spec is not None and found.url is not None:
        if spec.backend == "vllm-local":
            ready = "did not answer" if found.start_s is None else f"answered after {found.start_s:.0f} s, not counted"
            said.append(f"{spec.model} with a vLLM of its own ({ready}), which is stopped")
        else:
            key = "" if spec.api_key_env is None else f", with the key in {spec.api_key_env}"
            said.append(f"{found.model} at {found.url}{key}")
    if found.capability == "chat":
        answers = f"{found.documents} answers of at most {CHAT_TOKENS} tokens with at most {CHAT_K} entries a position"
        said.append(f"{answers}: it scores no documents, so its speed is no such one")
    if errors := _errors(found):
        said.append("failed attempts: " + ", ".join(f"{count} x {kind}" for kind, count in errors.items()))
    return said if one.verdict == "pass" else [*said, one.said]
