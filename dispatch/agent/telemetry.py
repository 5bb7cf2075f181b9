"""What a run's tree uses, read every few seconds for who watches from afar; what cannot be read is None, never 0."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from typing import Any, NamedTuple

from .hardware import PROGRAM_PATHS, meminfo, number
from .processes import boot_clock, descendants, table

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_GPU_FIELDS = ("utilization.gpu", "power.draw", "temperature.gpu", "clocks.sm")
_GPU_SECONDS = 15.0


class Usage(NamedTuple):
    """CPU seconds of a process itself and of the children that it has waited for, and its resident bytes."""

    own: float
    waited: float
    rss: int


class Telemetry:
    """The use of everything that descends from this process, summed up since it was made.

    Sums never fall: a process that nobody waits for takes its share with it, and what was seen once stays counted.
    """

    def __init__(self) -> None:
        me = usage_of(os.getpid())
        self._before = me.waited if me is not None else 0.0
        self._cpu = 0.0
        self._io: int | None = None
        self.gpu = GpuQuestion()

    def read(self, leader: int | None) -> dict[str, Any]:
        """The fields `cpu` (s), `io` (bytes read and written), `rss`, `mem_available` (bytes) and `gpu` of a beat."""
        processes = table()
        members = descendants(os.getpid(), processes)
        members |= {process.pid for process in processes.values() if leader is not None and process.session == leader}
        members -= {os.getpid(), self.gpu.pid or -1}
        me = usage_of(os.getpid())
        cpu = 0.0 if me is None else me.waited - self._before - self.gpu.spent
        rss, io, seen = 0, 0, False
        for pid in members:
            used = usage_of(pid)
            if used is not None:
                cpu += used.own + used.waited
                rss += used.rss
            moved = io_of(pid)
            if moved is not None:
                io, seen = io + moved, True
        self._cpu = max(self._cpu, cpu)
        if seen:
            self._io = max(self._io or 0, io)
        return {
            "cpu": round(self._cpu, 2),
            "io": self._io,
            "rss": rss,
            "mem_available": meminfo().get("MemAvailable"),
            "gpu": self.gpu.answer(),
        }

    def close(self) -> None:
        """End what was started for asking; a sweep of leftovers must not find it."""
        self.gpu.close()


def usage_of(pid: int) -> Usage | None:
    """What a process has used so far; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        own, waited = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
        return Usage(own / _TICKS, waited / _TICKS, int(fields[21]) * _PAGE)
    except (OSError, ValueError, IndexError):
        return None


def io_of(pid: int) -> int | None:
    """Bytes that a process (and the children it waited for) read and wrote; None where that may not be read."""
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            found = {name: int(value) for name, _, value in (line.partition(":") for line in file)}
        # Mapped files are read without a call, cached ones without the disk: whichever tells more.
        return max(found["rchar"], found["read_bytes"]) + max(found["wchar"], found["write_bytes"])
    except (OSError, ValueError, KeyError):
        return None


def total_memory() -> int | None:
    """MemTotal in bytes; None where the kernel does not tell."""
    return meminfo().get("MemTotal")


class GpuQuestion:
    """nvidia-smi asked without waiting for it: on a sick driver it hangs, and a supervisor must not hang with it."""

    def __init__(self, program: str | None = None) -> None:
        self._program = program or shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=PROGRAM_PATHS)
        self._asked: subprocess.Popen[bytes] | None = None
        self._since = 0.0
        self._last: dict[str, float | None] | None = None
        self.spent = 0.0

    @property
    def pid(self) -> int | None:
        """The process that is being waited for, which is no part of the run."""
        return None if self._asked is None else self._asked.pid

    def answer(self) -> dict[str, float | None] | None:
        """The latest answer, at most one call old; None without a GPU, without an answer, or when it does not come."""
        if self._program is None:
            return None
        if self._asked is not None:
            self._hear(self._asked)
        if self._asked is None:
            self._ask()
        return self._last

    def _ask(self) -> None:
        question = ["--query-gpu=" + ",".join(_GPU_FIELDS), "--format=csv,noheader,nounits"]
        try:
            self._asked = subprocess.Popen(
                [str(self._program), *question],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            self._program = None
        self._since = boot_clock()

    def _hear(self, asked: subprocess.Popen[bytes]) -> None:
        late = boot_clock() - self._since > _GPU_SECONDS
        if late:
            os.kill(asked.pid, signal.SIGKILL)  # Popen.kill would reap it first, and its usage would be lost
            self._last = None
        pid, status, usage = os.wait4(asked.pid, os.WNOHANG)
        if pid == 0:
            return  # killed or not, one that sits in the driver is not asked a second time beside itself
        asked.returncode = os.waitstatus_to_exitcode(status)
        self.spent += usage.ru_utime + usage.ru_stime
        assert asked.stdout is not None
        with asked.stdout as stream:
            rows = parse_gpus(stream.read().decode("utf-8", "replace")) if asked.returncode == 0 else []
        self._last = together(rows)
        self._asked = None

    def close(self) -> None:
        """Give up what is being waited for."""
        if self._asked is None:
            return
        self._asked.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._asked.wait(timeout=1.0)
        if self._asked.stdout is not None:
            self._asked.stdout.close()
        self._asked = None


def parse_gpus(text: str) -> list[list[float | None]]:
    """The rows of nvidia-smi's answer; N/A and whatever is no number is None."""
    rows = [[number(cell.strip()) for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [row for row in rows if len(row) == len(_GPU_FIELDS)]


def together(rows: list[list[float | None]]) -> dict[str, float | None] | None:
    """One answer for all GPUs of the host: the busiest, the hottest, the fastest, and their watts together."""
    if not rows:
        return None

    def most(column: int) -> float | None:
        return max((value for row in rows if (value := row[column]) is not None), default=None)

    watts = [value for row in rows if (value := row[1]) is not None]
    return {"util": most(0), "watts": sum(watts) if watts else None, "celsius": most(2), "sm_mhz": most(3)}
