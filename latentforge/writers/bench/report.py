"""What one bench of writing measured: a file, a table."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from latentforge.errors import RefusedError
from latentforge.kernels.bench.machine import Machine
from latentforge.verdicts import ExitCode, Verdict, exit_code, meet
from latentforge.writers.bench.hits import Hits
from latentforge.writers.bench.memory import Peak
from latentforge.writers.bench.quality import Quality
from latentforge.writers.bench.turns import Asked, Measured, quantile, ratios, spread

SCHEMA = "latentforge/bench-generate/1"


@dataclass(frozen=True)
class Entrant:
    """One contestant's figures, and what it is: the folder as it was named, the digests of what lies in it, its
    numbers, the tokens of a step, the operations of a token (None: not counted) and its quality (None: not known)."""

    measured: Measured
    role: str
    folder: str
    digests: dict[str, str]
    parameters: int
    chunk: int
    flops_per_token: float | None
    quality: Quality | None


@dataclass(frozen=True)
class Here:
    """Where and when it was measured: the machine, torch's ``threads``, its ``load`` (processes that wanted a core, of
    all programs, over a minute) before and after, UTC times, the code."""

    machine: Machine
    threads: int
    load: tuple[float, float]
    started: str
    ended: str
    source: str


@dataclass(frozen=True)
class Report:
    """Everything of one bench. The first of ``entrants`` is the student that the gates judge; ``peak`` is of all."""

    here: Here
    asked: Asked
    prompts_sha256: str
    tokenizer_sha256: str
    entrants: list[Entrant]
    peak: Peak
    hits: Hits | None
    gates: dict[str, float]
    verdicts: list[Verdict]

    @property
    def code(self) -> ExitCode:
        """What the command ends with: the worst verdict's, 0 without gates."""
        return exit_code(meet(verdict.outcome for verdict in self.verdicts)) if self.verdicts else ExitCode.PASS

    def as_json(self) -> dict[str, Any]:
        """Everything as data; times in seconds, memory in bytes."""
        asked, here = self.asked, self.here
        return {
            "schema": SCHEMA,
            "started": here.started,
            "ended": here.ended,
            "source": here.source,
            "machine": {**asdict(here.machine), "threads": here.threads, "load_average": list(here.load)},
            "asked": {
                "prompts": len(asked.prompts),
                "prompts_sha256": self.prompts_sha256,
                "prompt_tokens": [len(prompt) for prompt in asked.prompts],
                "tokenizer_sha256": self.tokenizer_sha256,
                "max_tokens": asked.max_tokens,
                **asdict(asked.sampling),
                "batch": asked.batch,
                "repeats": asked.repeats,
                "seed": asked.seed,
            },
            "contestants": [self._entry(one) for one in self.entrants],
            "peak_memory": self.peak._asdict() | {"total": self.peak.total},
            "hit_rate": None if self.hits is None else asdict(self.hits),
            "gates": self.gates,
            "verdicts": [
                {"falsifier": one.falsifier, "outcome": one.outcome.name.lower(), "text": one.text}
                for one in self.verdicts
            ],
            "exit_code": int(self.code),
        }

    def _entry(self, one: Entrant) -> dict[str, Any]:
        measured, ours = one.measured, self.entrants[0].measured
        return {
            "name": measured.name,
            "role": one.role,
            "folder": one.folder,
            "digests": one.digests,
            "parameters": one.parameters,
            "chunk": one.chunk,
            "asked_tokens": self.asked.tokens,
            "produced_tokens": [turn.produced for turn in measured.turns],
            "ended_before": [
                sum(len(text.tokens) < self.asked.max_tokens for text in turn.texts) for turn in measured.turns
            ],
            "steps": [turn.steps for turn in measured.turns],
            "draws": [sum(text.draws for text in turn.texts) for turn in measured.turns],
            "seconds": [turn.seconds for turn in measured.turns],
            "tokens_per_second": spread(measured.tokens_per_second) | {"rounds": measured.tokens_per_second},
            "steps_per_second": spread(measured.steps_per_second),
            "first_chunk_s": _latency([turn.to_first for turn in measured.turns]),
            "chunk_s": _latency([turn.between for turn in measured.turns]),
            "student_over_this": None if measured is ours else spread(ratios(ours, measured)),
            "peak_memory": measured.peak._asdict() | {"total": measured.peak.total},
            "flops_per_token": one.flops_per_token,
            "quality": None if one.quality is None else one.quality.as_json(),
        }


def here(machine: Machine, threads: int, before: float, started: datetime, source: str) -> Here:
    """Machine and times, as they are now that all is measured; ``before`` is the load at ``started``."""
    return Here(machine, threads, (before, os.getloadavg()[0]), _stamp(started), _stamp(datetime.now(UTC)), source)


def make_folder(folder: Path) -> None:
    """Make the folder of reports, before anything is measured; RefusedError where it, or a file in it, cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"--out {folder} cannot be made: {error.strerror}", next="name another folder") from None
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RefusedError(
            f"--out {folder}: no file can be made in it: {error.strerror}", next="name another folder"
        ) from None


def write_report(report: Report, folder: Path) -> Path:
    """``bench_<time>.json`` in ``folder``, whole or not at all; where there is one of that second, ``_2`` and so on."""
    name = f"bench_{report.here.started.replace('-', '').replace(':', '')}"
    for number in count(1):
        file = folder / (f"{name}.json" if number == 1 else f"{name}_{number}.json")
        try:
            with open(file, "x", encoding="utf-8") as opened:
                try:
                    opened.write(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n")
                    opened.flush()
                except BaseException:  # a Ctrl-C too
                    file.unlink()
                    raise
        except FileExistsError:
            continue
        except OSError as error:
            raise RefusedError(
                f"{file} cannot be written: {error.strerror}", next="name another folder by --out"
            ) from None
        return file
    raise AssertionError("numbers do not end")


def table(report: Report) -> list[str]:
    """The report in lines for a terminal."""
    machine, asked = report.here.machine, report.asked
    on = machine.processor if machine.device == "cpu" else f"{machine.device}, {machine.processor}"
    many = "s" if report.here.threads != 1 else ""
    load = f"load {report.here.load[0]:.1f} before, {report.here.load[1]:.1f} after"
    sampling = asked.sampling
    how = f"{sampling.method}, {sampling.draws} draws" if sampling.method in ("exact", "vote") else sampling.method
    rows: list[tuple[str, ...]] = [
        ("", "tokens/s", "", "student/this", "steps/s", "first chunk", "chunk (p50 / p95)", "peak", "produced")
    ]
    rows += [_row(report, one) for one in report.entrants]
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{on}, {machine.cores} processors, {report.here.threads} thread{many}, torch {machine.torch}; {load}",
        f"{len(asked.prompts)} prompts, at most {asked.max_tokens} tokens each, {asked.batch} at a time, "
        f"T = {sampling.temperature:g} ({how}); median of {asked.repeats} rounds in turns (least–greatest)",
        "",
    ]
    for row in rows:
        cells = [f"{cell:<{wide[0]}}" if n == 0 else f"{cell:>{wide[n]}}" for n, cell in enumerate(row)]
        lines.append("  " + "  ".join(cells).rstrip())
    if report.hits is not None:
        lines += ["", f"hit rate of the teacher's cache: {report.hits.rate:.1%} of the answers of {report.hits.run}"]
    return lines


def _row(report: Report, one: Entrant) -> tuple[str, ...]:
    measured, ours = one.measured, report.entrants[0].measured
    speed = spread(measured.tokens_per_second)
    lead = "" if measured is ours else f"{statistics.median(ratios(ours, measured)):.2f}x"
    produced = sum(turn.produced for turn in measured.turns)
    return (
        measured.name,
        f"{speed['median']:.1f}",
        f"({speed['least']:.1f}–{speed['greatest']:.1f})",
        lead,
        f"{statistics.median(measured.steps_per_second):.1f}",
        _times(measured.to_first),
        _times(measured.between),
        f"{measured.peak.total / 1e6:.0f} MB",
        f"{produced} of {report.asked.tokens * len(measured.turns)}",
    )


def _times(seconds: Sequence[float]) -> str:
    """Median and 95th percentile in milliseconds."""
    p50, p95 = quantile(seconds, 0.5), quantile(seconds, 0.95)
    return "–" if p50 is None or p95 is None else f"{1e3 * p50:.2f} / {1e3 * p95:.2f} ms"


def _latency(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Quantiles over all rounds, and the readings of each from which they follow."""
    seconds = [reading for one in rounds for reading in one]
    return {
        "p50": quantile(seconds, 0.5),
        "p95": quantile(seconds, 0.95),
        "readings": len(seconds),
        "rounds": [list(one) for one in rounds],
    }


def _stamp(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
