"""Running a recorded run again from its identity and its inputs, in a fresh folder, and judging what comes out."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.reading import RunRecord, read_run
from latentforge.train.likeness import Likeness, compare_executions
from latentforge.train.rerun import Rerun, check_repeatable, lay_out
from latentforge.train.setting import THREADS
from latentforge.verdicts import ExitCode, Outcome

_SHOWN = 5  # names of tensors that are worth a line each
_GRACE_SECONDS = 10
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_COMMAND = "latentforge evidence reproduce"


@dataclass(frozen=True)
class Setting:
    """What may change the order of a sum, threads, processor and versions: where both executions state it and
    ``differs``, and what is ``unknown`` since one of them does not state it; a sentence each."""

    differs: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """A run executed again: its folder, how alike both executions are, and what was not as the first time."""

    run: str
    folder: Path
    likeness: Likeness
    setting: Setting
    tolerance: float

    @property
    def outcome(self) -> Outcome:
        """PASS for the same bits, metrics and verdicts, or within the tolerance where the setting differs.

        UNKNOWN within the tolerance where nobody recorded whether the setting differs; FAIL otherwise.
        """
        if self.likeness.same:
            return Outcome.PASS
        if self.likeness.within(self.tolerance) and (self.setting.differs or self.setting.unknown):
            return Outcome.PASS if self.setting.differs else Outcome.UNKNOWN
        return Outcome.FAIL

    def lines(self) -> list[str]:
        """What was found, in words."""
        found = self.likeness
        counted = f"{found.compared} tensors and shards"
        if found.same:
            alike = f"{found.values} values of metrics and {found.verdicts} verdicts the same"
            lines = [f"bit-equal  {counted} of {self.run}, {alike}"]
        else:
            word = {Outcome.PASS: "within tolerance", Outcome.UNKNOWN: "UNKNOWN", Outcome.FAIL: "NOT REPRODUCED"}
            lines = [
                f"{word[self.outcome]}  {len(found.different)} of {counted} of {self.run} differ: weights by "
                f"{found.distance:.2e} at most, {found.metric or 'metrics'} by {found.metrics:.2e} "
                f"(relative; tolerance {self.tolerance:g})",
                *found.turned,
            ]
            if not self.setting.differs:
                which = "every one that was recorded" if self.setting.unknown else "threads, processor and versions"
                lines.append(f"the setting is the same ({which}): then the bits have to be the same")
                lines += [f"  {name}" for name in found.different[:_SHOWN]]
                if len(found.different) > _SHOWN:
                    lines.append(f"  and {len(found.different) - _SHOWN} more: --json lists all")
        lines += [f"not as the first time: {one}" for one in self.setting.differs]
        if found.same and self.setting.differs:
            lines.append(f"up to {self.tolerance:g} apart (relative) would have been within tolerance: nothing is")
        return lines + [f"not compared: {one}" for one in self.setting.unknown]

    def as_json(self) -> dict[str, Any]:
        """The same as data; a distance that is infinite is null."""
        found = self.likeness
        finite = [None if value == float("inf") else value for value in (found.distance, found.metrics)]
        return {
            "run": self.run,
            "outcome": self.outcome.name.lower(),
            "bit_equal": found.bit_equal,
            "compared": found.compared,
            "different": list(found.different),
            "distance": finite[0],
            "furthest": found.furthest,
            "values": found.values,
            "metrics": finite[1],
            "metric": found.metric,
            "verdicts": found.verdicts,
            "turned": list(found.turned),
            "tolerance": self.tolerance,
            "setting": list(self.setting.differs),
            "unknown": list(self.setting.unknown),
            "folder": str(self.folder),
        }


def reproduce(source: Path, how: Rerun, *, say: Callable[[str], None] = lambda line: None) -> Reproduction:
    """Execute the run of the folder ``source`` again below ``how.folder`` and compare what it leaves.

    ``say`` hears of each line that it writes. RefusedError where it cannot be run again here (other code, an input that
    is not here or has changed, a run that asked a service or left nothing to compare); FailedError where it ends before
    it has its products.
    """
    first = read_run(source)
    check_repeatable(first, how)
    target = lay_out(first, how)
    threads = how.threads or _threads(first)
    environ = {**os.environ, **({THREADS: str(threads)} if threads else {})}
    command = [str(how.python), "-P", "-m", "latentforge", "run", str(target)]
    last = _execute(command, environ, target / "launch.log", say)
    second = read_run(target)
    if (code := second.end["code"]) not in (ExitCode.PASS, ExitCode.FAIL):
        kind = RefusedError if code == ExitCode.REFUSED else FailedError
        ended = "ended" if code is None else f"ended with {code}"
        raise kind(
            f"{first.id} {ended} before it had its products when it ran again: {second.reason or last or 'no word'}",
            next=f"less {target / 'launch.log'}" if how.kept else f"keep its log: {_COMMAND} {source} --to FOLDER",
        )
    return Reproduction(first.id, target, compare_executions(first, second), _setting(first, second), how.tolerance)


def _threads(record: RunRecord) -> int | None:
    found = (record.device or {}).get("threads")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def _execute(command: list[str], environ: dict[str, str], log: Path, say: Callable[[str], None]) -> str:
    """Run a command to its end, its output in ``log``; its last line.

    It is in a session of its own, which is ended, with all that it started, where this process is interrupted.
    """
    last, process = "", None
    with open(log, "w", encoding="utf-8") as text:
        try:
            with _signals_wait():
                process = subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
            assert process.stdout is not None
            for line in process.stdout:
                text.write(line)
                last = line.strip() or last
                say(last)
            process.wait()
        except OSError as error:
            if process is not None:
                raise
            raise RefusedError(f"{command[0]} cannot be started: {error.strerror}") from error
        finally:
            if process is not None:
                _end(process)
    return last


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP are kept for afterwards: one that came while a process is made would leave it
    without anyone who knows of it."""
    came: list[int] = []
    stopping = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in stopping}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for one in came:
        signal.raise_signal(one)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and what it started: asked first, and killed where that takes long or is interrupted again."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with process:  # closes its pipe, and waits
            pass


def _setting(first: RunRecord, second: RunRecord) -> Setting:
    """What may change the order of a sum, of both executions."""
    differs, unknown = [], []
    files = (first.effective_file or {}), (second.effective_file or {})
    for name in ("device", "versions", "extension"):
        before, after = (file.get(name) for file in files)
        if not (isinstance(before, dict) and before and isinstance(after, dict) and after):
            unknown.append(f"{name}, of which one execution states nothing")
            continue
        for key in sorted({*before, *after} - {"memory_bytes", "sha256"}):
            if before.get(key) != after.get(key):
                differs.append(f"{name} {key}: {before.get(key)} then, {after.get(key)} now")
    then, now = (first.host or {}).get("cpu"), _processor()
    if not isinstance(then, str) or now is None:
        unknown.append(f"the processor: {then or 'not recorded'} then, {now or 'not known'} now")
    elif then != now:
        differs.append(f"processor: {then} then, {now} now")
    return Setting(tuple(differs), tuple(unknown))


def _processor() -> str | None:
    """The processor's name in the words of the agent's probe, None where the system does not say."""
    fields: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    if "CPU implementer" in fields and "model name" not in fields:
        return f"ARM implementer {fields['CPU implementer']} part {fields.get('CPU part', 'unknown')}"
    return fields.get("model name")
