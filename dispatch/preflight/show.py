"""A report as a reader sees it: what needs a look with its rule and remedy, what does not apply in one line."""

from __future__ import annotations

import os
import sys

from dispatch.hosts.facts import HostFacts
from dispatch.preflight.check import Check, Report

_COLOURS = {"warn": "33", "fail": "31", "unknown": "33"}


def render(report: Report, facts: HostFacts, *, seconds: float, colour: bool | None = None) -> str:
    """The report as lines; colour only on a terminal."""
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    applied = [one for one in report.checks if one.outcome != "n/a"]
    width = max((len(one.id) for one in applied), default=0)
    lines = [f"{report.host}  ({_machine(report, facts)})", ""]
    for one in applied:
        lines += _lines(one, width, colour)
    lines += ["", *_left_out(report)]
    stops = ", ".join(one.id for one in report.stopping)
    end = f"; a launch is refused because of: {stops}" if stops else ""
    lines.append(f"{report.counted()} in {seconds:.1f} s{end}")
    return "\n".join(lines)


def _machine(report: Report, facts: HostFacts) -> str:
    host = facts.host
    words = ["GB10"] if report.gb10 else []
    words += [host.cpu or host.arch]
    words += [f"driver {host.driver}"] if host.driver else []
    return ", ".join(words)


def _lines(one: Check, width: int, colour: bool) -> list[str]:
    outcome = f"{one.outcome:<7}"
    if colour and one.outcome in _COLOURS:
        outcome = f"\x1b[{_COLOURS[one.outcome]}m{outcome}\x1b[0m"
    lines = [f"  {one.id:<{width}}  {outcome}  {one.measured}"]
    if one.outcome in ("warn", "fail", "unknown"):
        lines.append(f"  {'':<{width}}           wanted: {one.rule}")
        if one.remedy:
            lines.append(f"  {'':<{width}}           next:   {one.remedy}")
    return lines


def _left_out(report: Report) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for one in report.checks:
        if one.outcome == "n/a":
            reason = "only when asked for (--only ID)" if one.measured.startswith("only when") else one.measured
            reasons.setdefault(reason, []).append(one.id)
    return [f"  n/a, {reason}: {', '.join(ids)}" for reason, ids in reasons.items()]
