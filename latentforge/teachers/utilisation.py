"""How busy the GPU is, as nvidia-smi tells it: what it does not tell is unknown, never idle."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

IDLE_PERCENT = 10.0
"""Below this a forward pass does not run on the GPU: kernels back to back read well above half."""
PATIENCE = 30.0
"""Seconds of idleness before it is reported: longer than a load of weights reads from a slow disk, shorter than the
minute in which it must be said."""
EVERY = 2.0
_SECONDS = 10.0
_PROGRAM_PATHS = "/usr/bin:/usr/local/bin:/usr/local/cuda/bin"

Read = Callable[[], float | None]


def parse_utilisation(text: str) -> float | None:
    """Percent of the busiest GPU in nvidia-smi's CSV; None for ``[N/A]``, ``[Not Supported]``, and whatever is none."""
    found = []
    for line in text.splitlines():
        word = line.strip().removesuffix("%").strip()
        try:
            value = float(word)
        except ValueError:
            continue
        if 0.0 <= value <= 100.0:
            found.append(value)
    return max(found, default=None)


def gpu_tool() -> str | None:
    """The path of nvidia-smi; None on a machine without one."""
    return shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_PROGRAM_PATHS)


def gpu_utilisation(uuid: str | None = None) -> float | None:
    """Percent of the last sampling period in which a kernel ran; None where there is no GPU or nothing is told.

    ``uuid`` names one GPU as torch does (without ``GPU-``); else it is the busiest of the machine.
    """
    program = gpu_tool()
    if program is None:
        return None
    question = [program, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    if uuid is not None:
        question.append(f"--id=GPU-{uuid}")
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_utilisation(answer.stdout)


@dataclass
class IdleWatch:
    """Whether a teacher that is being asked leaves the GPU idle; fed with readings in the order of time.

    Idle is what reads below ``threshold`` at each known reading for ``patience`` seconds, at ``least`` of them. An
    unknown reading says nothing: it neither begins nor ends idleness, and counts for none.
    """

    threshold: float = IDLE_PERCENT
    patience: float = PATIENCE
    least: int = 5
    readings: list[float] = field(default_factory=list)
    reported: bool = False
    _since: float | None = None
    _count: int = 0

    def see(self, seconds: float, utilisation: float | None) -> str | None:
        """A sentence the first time that the GPU was left idle for so long; None otherwise."""
        if utilisation is None:
            return None
        self.readings.append(utilisation)
        if utilisation >= self.threshold:
            self._since, self._count = None, 0
            return None
        self._since = seconds if self._since is None else self._since
        self._count += 1
        if self.reported or self._count < self.least or seconds - self._since < self.patience:
            return None
        self.reported = True
        return (
            f"the teacher leaves the GPU idle: below {self.threshold:g} % for {seconds - self._since:.0f} s of scoring "
            f"({self._count} readings)"
        )

    @property
    def median(self) -> float | None:
        """The middle of all known readings; None where there are too few to say anything."""
        return statistics.median(self.readings) if len(self.readings) >= self.least else None


@contextmanager
def sampled(read: Read, every: float = 0.2) -> Iterator[list[float]]:
    """The known readings of ``read`` while the block runs, one each ``every`` seconds, appended as they come."""
    found: list[float] = []

    def see(_seconds: float, value: float | None) -> None:
        if value is not None:
            found.append(value)

    with watched(read, see, every=every):
        yield found


@contextmanager
def watched(read: Read, see: Callable[[float, float | None], None], *, every: float = EVERY) -> Iterator[None]:
    """Calls ``see(seconds since the beginning, reading)`` from a thread of its own while the block runs."""
    over = threading.Event()
    began = time.monotonic()

    def run() -> None:
        while not over.is_set():
            value = read()
            if not over.is_set():
                see(time.monotonic() - began, value)
            over.wait(every)

    thread = threading.Thread(target=run, name="gpu-utilisation", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_SECONDS + every)
