"""Writing a run's events: a JSON line into ``events.jsonl``, and a line for people on standard output."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from latentforge.events.event import KINDS, read_events
from latentforge.events.kept import KEPT
from latentforge.verdicts import ExitCode, Verdict

_DURABLE = frozenset({"checkpoint", "verdict", "end"})


def boot_clock() -> float:
    """Seconds since the host booted, suspension included: the clock that no one sets."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class EventLog:
    """The event log of one run, appended line by line; each line reaches the file before the call returns. One that
    is there already is gone on with.

    ``text`` is the stream for people (standard output by default: the supervisor appends it to ``launch.log``).
    """

    def __init__(self, path: Path, run: str, *, text: TextIO | None = None) -> None:
        self.run = run
        self._path = path
        self._text = sys.stdout if text is None else text
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._seq = _go_on(self._file)
        self._lock = threading.Lock()  # a teacher is watched from a thread of its own
        self.timings: dict[str, float] = {}

    def take_up(self) -> None:
        """Go on behind what another process has written meanwhile: with its numbers, and the time of its phases."""
        self._seq, self.timings = _go_on(self._file), {}
        for event in read_events(self._path):
            if event.kind == "phase" and "seconds" in event.fields:
                self._took(event.fields["name"], event.fields["seconds"])

    def _took(self, phase: str, seconds: float) -> None:
        self.timings[phase] = round(self.timings.get(phase, 0.0) + seconds, 3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Append one event. Not-a-number and infinities are written as strings, since JSON has none."""
        if kind not in KINDS:
            raise ValueError(f"unknown event kind {kind!r}")
        wall = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with self._lock:
            head = {"seq": self._seq, "t": round(boot_clock(), 6), "wall": wall, "run": self.run, "kind": kind}
            line = json.dumps({**head, **_finite(fields)}, ensure_ascii=False, allow_nan=False) + "\n"
            os.write(self._file, line.encode())
            if kind in _DURABLE:
                os.fsync(self._file)
            self._seq += 1

    def say(self, line: str) -> None:
        """Write one line for people."""
        self._text.write(line + "\n")
        self._text.flush()

    @contextmanager
    def phase(self, name: str, **fields: Any) -> Iterator[None]:
        """A named phase: an event when it begins, one with its seconds when it ends; none where it raises."""
        begin = time.monotonic()
        self.emit("phase", name=name, state="begin", **fields)
        yield
        seconds = time.monotonic() - begin
        self._took(name, seconds)
        self.emit("phase", name=name, state="end", seconds=round(seconds, 3))
        self.say(f"phase {name} took {seconds:.1f} s")

    def progress(self, name: str, done: int, total: int) -> None:
        """How far a phase is, for the live display; the text log stays free of it."""
        self.emit("phase", name=name, state="progress", done=done, total=total)

    def ready(self, *, requested: dict[str, Any], effective: dict[str, Any]) -> None:
        """Set-up is over: what was asked and what the trainer really holds. No compile may come after this."""
        self.emit("phase", name="ready", state="end", requested=requested, effective=effective)

    def step(
        self,
        step: int,
        steps: int,
        *,
        model: str,
        loss: float,
        learning_rate: float,
        rows: int,
        tokens_per_second: float,
        kd: float | None = None,
        ce: float | None = None,
        grad_norm: float | None = None,
        memory_bytes: int | None = None,
        **fields: Any,
    ) -> None:
        """One optimiser step, with the values that were in force: losses in nats a token, ``rows`` predictions trained.

        ``model`` says who was trained (``teacher``, ``student`` or ``twin``).
        """
        values = {
            "loss": loss,
            "kd": kd,
            "ce": ce,
            "learning_rate": learning_rate,
            "rows": rows,
            "tokens_per_second": round(tokens_per_second, 1),
            "grad_norm": grad_norm,
            "memory_bytes": memory_bytes,
        }
        known = {name: value for name, value in values.items() if value is not None}
        self.emit("step", step=step, steps=steps, model=model, **known, **fields)
        parts = [f"step {step}/{steps}", *([model] if model != "student" else []), f"loss {loss:.4f}"]
        parts += [f"{name} {value:.4f}" for name, value in (("kd", kd), ("ce", ce)) if value is not None]
        parts += [f"lr {learning_rate:.2e}", f"tok/s {tokens_per_second:.0f}"]
        if memory_bytes is not None:
            parts.append(f"mem {memory_bytes / 2**30:.1f}GiB")
        self.say(" ".join(parts))

    def metric(
        self,
        name: str,
        value: float,
        *,
        step: int,
        split: str,
        model: str = "student",
        rows_sha256: str | None = None,
        kept: bool = False,
    ) -> None:
        """A measured value that is not a step's own, as ``val_loss`` or ``val_kl`` on the held-out split.

        ``rows_sha256`` names the rows that it was measured on: two values compare only where it is the same.
        ``kept``: measured once more at the end, of the weights of ``step`` that were put back.
        """
        of = ({} if rows_sha256 is None else {"rows_sha256": rows_sha256}) | ({KEPT: True} if kept else {})
        self.emit("metric", name=name, value=value, step=step, split=split, model=model, **of)
        self.say(f"metric {model} {name}={value:.4f} ({split}, step {step}{', kept' if kept else ''})")

    def checkpoint(self, step: int, *, path: str, bytes: int, expected_bytes: int, **fields: Any) -> None:
        """A checkpoint that was written, read back and found whole."""
        self.emit("checkpoint", step=step, path=path, bytes=bytes, expected_bytes=expected_bytes, **fields)
        self.say(f"checkpoint step {step} {path} {bytes / 1e6:.1f} MB")

    def compile(self, compiler: str, *, count: int, what: Sequence[str], step: int, model: str) -> None:
        """Something was compiled or loaded for the first time after set-up; ``step`` is where it was noticed."""
        self.emit("compile", compiler=compiler, count=count, what=list(what), step=step, model=model)
        named = f": {', '.join(what)}" if what else ""
        self.say(f"compile {compiler} {count} by step {step} of the {model}{named}")

    def memory(self, **fields: int) -> None:
        """Memory in bytes, by name."""
        self.emit("memory", **fields)

    def warning(self, message: str) -> None:
        """Something that the reader should know and that does not stop the run."""
        self.emit("warning", message=message)
        self.say(f"warning: {message}")

    def verdict(self, verdict: Verdict) -> None:
        """What a falsifier said of this run."""
        self.emit(
            "verdict",
            falsifier=verdict.falsifier,
            outcome=verdict.outcome.name.lower(),
            text=verdict.text,
            measured=verdict.measured,
        )
        self.say(verdict.line())

    def end(self, code: ExitCode, *, reason: str = "") -> None:
        """The run's last event: the exit code that it earned."""
        self.emit("end", code=int(code), outcome=code.name.lower(), reason=reason)


class Unheard(EventLog):
    """The log of a process that does not write: another one of its run, which does the same, says it all."""

    def __init__(self, run: str) -> None:
        super().__init__(Path(os.devnull), run)

    def take_up(self) -> None:
        """Nothing was written here."""

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Nothing is written."""

    def say(self, line: str) -> None:
        """Nothing is said."""


def _go_on(file: int) -> int:
    """The number of the next event of a log that a killed process may have left: a torn last line goes."""
    size = os.fstat(file).st_size
    lines = os.pread(file, size, 0).split(b"\n")
    if torn := len(lines[-1]):
        os.ftruncate(file, size - torn)
    return len(lines) - 1


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
