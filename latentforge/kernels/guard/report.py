"""What a warm-up found: one line a variant, what runs, and the exit code; the same as data."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentforge.errors import RefusedError
from latentforge.kernels.guard.ladder import Choice, choose, read_states
from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.reasons import REASONS
from latentforge.kernels.guard.records import Record, Records
from latentforge.kernels.guard.variants import Variant
from latentforge.kernels.guard.warmup import Line
from latentforge.verdicts import ExitCode


@dataclass(frozen=True)
class Report:
    """Lines of this run and the choices that follow from them; ``inspected`` is what was found without a GPU."""

    machine: Machine
    lines: Sequence[Line]
    choices: Sequence[Choice]
    inspected: Sequence[str] = ()

    @property
    def crashed(self) -> list[Line]:
        """The lines of crashes that no person has accepted."""
        return [line for line in self.lines if line.record.state == "crashed" and not line.record.accepted]

    @property
    def alone(self) -> list[Line]:
        """Composites that failed: kernels that are right one by one and not together."""
        return [line for line in self.lines if line.variant.op == "composite" and _unfit(line.record)]

    @property
    def code(self) -> ExitCode:
        """1 where an operator has no kernel left, 3 where a crash waits for a person, else 0."""
        if any(choice.rung is None for choice in self.choices) or self.alone:
            return ExitCode.FAIL
        return ExitCode.UNKNOWN if self.crashed else ExitCode.PASS

    def as_json(self) -> dict[str, Any]:
        """Everything as data."""
        return {
            "host": platform.node(),
            "machine": machine_json(self.machine),
            "variants": [line_json(line) for line in self.lines],
            "choices": [
                {
                    "op": choice.op,
                    "dtype": choice.dtype,
                    "backend": choice.backend,
                    "rung": choice.rung,
                    "native": choice.native,
                    "passed_over": [
                        dict(zip(("variant", "reason", "detail"), one, strict=True)) for one in choice.passed_over
                    ],
                }
                for choice in self.choices
            ],
            "inspected": list(self.inspected),
            "exit_code": int(self.code),
        }


def choices_of(lines: Sequence[Line], machine: Machine, records: Records, variants: Sequence[Variant]) -> list[Choice]:
    """What runs, for each operator and precision that was looked at; other rungs' variants by the records of before.

    An operator of which a variant has neither line nor record is left out: nothing can be chosen yet.
    """
    pairs = dict.fromkeys((line.variant.op, line.variant.dtype) for line in lines if line.variant.op != "composite")
    found = []
    for op, dtype in pairs:
        ours = [v for v in variants if (v.op, v.dtype) == (op, dtype)]
        looked = {line.record.variant: line.record for line in lines}
        states = {**read_states([v for v in ours if v.name not in looked], machine, records), **looked}
        try:
            found.append(choose(op, dtype, ours, states))
        except RefusedError:
            continue
    return found


def machine_json(machine: Machine) -> dict[str, Any]:
    """What the header says, by name."""
    return {
        "device": machine.device_name or None,
        "arch": machine.arch,
        "multiprocessors": machine.multiprocessors,
        "driver": machine.driver,
        "cuda_runtime": machine.cuda_runtime,
        "nvrtc": machine.nvrtc,
        "torch": machine.torch,
        "triton": machine.triton,
        "ptxas": machine.ptxas,
        "kernel": machine.kernel,
        "why_no_cuda": machine.why_not or None,
    }


def line_json(line: Line) -> dict[str, Any]:
    """One variant as data."""
    record = line.record
    return {
        "variant": record.variant,
        "state": record.state,
        "did": line.did,
        "reason": record.reason,
        "detail": record.detail,
        "stage": record.stage,
        "key": record.key,
        "measured": record.measured,
        "config": record.config,
        "attempts": record.attempts,
        "accepted": record.accepted,
        "seconds": round(line.seconds, 2),
        "notes": list(line.notes),
    }


def render(report: Report) -> str:
    """The table for people."""
    machine = report.machine
    device = machine.device_name or "no CUDA device"
    text = [
        f"{platform.node()}: {device}, {machine.arch}, driver {machine.driver}, torch {machine.torch}, "
        f"triton {machine.triton}, ptxas {machine.ptxas}",
        "",
    ]
    width = max((len(line.variant.name) for line in report.lines), default=7)
    if report.lines:
        columns = f"{'of allowed':>10}  {'ms':>9}  {'speed-up':>8}  {'seconds':>7}  stage"
        text.append(f"  {'variant':<{width}}  {'state':<9} {columns}")
    for line in report.lines:
        text.append(_row(line, width))
        text += [f"      {note}" for note in line.notes]
    text += [""] if report.lines else []
    text += [f"  {said}" for said in report.inspected]
    text += [f"  {choice.text}" for choice in report.choices if not choice.native]
    text.append(_footer(report))
    return "\n".join(text)


def _row(line: Line, width: int) -> str:
    record, measured = line.record, line.record.measured
    worst = f"{measured['worst']:.2f}" if "worst" in measured else "–"
    ms = f"{measured['ms']:.3f}" if "ms" in measured else "–"
    speed = f"{measured['speed_up']:.1f}x" if "speed_up" in measured else "–"
    if "taken_bytes" in measured:
        ms = f"{max(measured['taken_bytes'], measured['allocated_bytes']) / 2**30:.1f} GiB"
    row = (
        f"  {record.variant:<{width}}  {record.state:<9} {worst:>10}  {ms:>9}  {speed:>8}  {line.seconds:>7.1f}  "
        f"{record.stage}"
    )
    if line.did not in ("proven", "verified"):
        row += f" ({line.did})"
    spilt = max(int(measured.get(stage, {}).get("spill_bytes", 0)) for stage in ("compiled", "loaded"))
    if spilt:
        row += f" (spills {spilt} bytes a thread)"
    if record.reason:
        row += f"\n      {record.reason}: {REASONS[record.reason]}" + (f" ({record.detail})" if record.detail else "")
    return row


def _unfit(record: Record) -> bool:
    # Who accepts a crash lives with the fallback; kernels that take the host down together have none.
    return record.state == "failed" or (record.state == "crashed" and record.accepted)


def _footer(report: Report) -> str:
    native = sum(choice.native for choice in report.choices)
    fallbacks = [c for c in report.choices if c.rung is not None and not c.native]
    unfit = [choice for choice in report.choices if choice.rung is None]
    parts = [f"{native} of {len(report.choices)} native", f"{len(fallbacks)} fallbacks"]
    slow = [slow_down(report, choice) for choice in fallbacks]
    if known := [value for value in slow if value is not None]:
        parts.append(f"expected slow-down up to {max(known):.1f}x")
    if unfit:
        parts.append("unfit: " + ", ".join(f"{c.op} {c.dtype}" for c in unfit))
    if report.alone:
        parts.append("unfit: the kernels fail together, each alone is right")
    if report.crashed:
        parts.append(f"{len(report.crashed)} crashed before; a person decides:")
    text = ", ".join(parts)
    if report.crashed:
        name = report.crashed[0].record.variant
        text += (
            f"\n    try again    latentforge kernels warmup --again --only {name}"
            f"\n    live with it  latentforge kernels warmup --accept-crash --only {name}"
        )
    return text


def slow_down(report: Report, choice: Choice) -> float | None:
    """How much slower the chosen rung is than the first would have been, where both were timed."""
    over = {name for name, _, _ in choice.passed_over}
    passed = [line for line in report.lines if line.record.variant in over]
    taken = [line for line in report.lines if line.variant.rung == choice.rung and _same(line.variant, choice)]
    ratios = [
        own.record.measured["ms"] / first.record.measured["ms"]
        for first in passed
        for own in taken
        if "ms" in first.record.measured and "ms" in own.record.measured and _alike(first.variant, own.variant)
    ]
    return max(ratios) if ratios else None


def _same(variant: Variant, choice: Choice) -> bool:
    return (variant.op, variant.dtype) == (choice.op, choice.dtype)


def _alike(one: Variant, other: Variant) -> bool:
    return (one.targets, one.direction) == (other.targets, other.direction)
