"""Contestants take turns at the same work, so that a busy minute of the machine falls on all of them."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

ROUNDS = 5
# Torch's chunked formulas are given several numbers of rows at a time; the best counts.
Action = Callable[[], object]


@dataclass
class Line:
    """One contestant's result; times in milliseconds, ``note`` says why there is none, or what is odd about it.

    ``role`` is ``ours``, ``definition``, ``eager``, ``compile``, ``peer`` or ``floor``. ``chunks`` holds the tried
    numbers of rows at a time with the milliseconds of one turn each (None: could not run).
    """

    backend: str
    role: str
    milliseconds: list[float] = field(default_factory=list)
    error: float | None = None
    note: str | None = None
    chunks: dict[int, float | None] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Median of the turns, in milliseconds."""
        return statistics.median(self.milliseconds) if self.milliseconds else None


@dataclass
class _Contestant:
    line: Line
    action: Action
    prepare: Action
    turns: int


class Contest:
    """A number of rounds in which everybody has one turn; ``tell`` hears who is at work.

    A contestant's first turn, in which it may compile, is not counted; what it computed there is judged.
    """

    def __init__(self, device: torch.device, *, rounds: int = ROUNDS, tell: Callable[[str], None] = print) -> None:
        self._device = device
        self._rounds = rounds
        self._tell = tell
        self._contestants: list[_Contestant] = []

    def enter(
        self,
        line: Line,
        action: Action,
        *,
        prepare: Action = lambda: None,
        judge: Callable[[], float] | None = None,
        turns: int | None = None,
    ) -> bool:
        """Let a contestant warm up; False, with a note on its line, where it cannot do the work."""
        self._tell(f"{line.backend}: first turn")
        try:
            self._turn(action, prepare)
            if judge is not None:
                line.error = judge()
        except Exception as error:
            # torch.compile without a C++ compiler, or an internal error of it: said, not hidden.
            line.note = why(error)
            return False
        self._contestants.append(_Contestant(line, action, prepare, self._rounds if turns is None else turns))
        return True

    def enter_best(
        self,
        line: Line,
        actions: dict[int, Action],
        *,
        prepare: Action = lambda: None,
        judge: Callable[[], float] | None = None,
    ) -> None:
        """Try the same work in several chunks, keep the fastest and say which were tried."""
        notes = []
        for rows, action in actions.items():
            tried = Line(f"{line.backend}, {rows} rows", line.role)
            if not self.enter(tried, action, prepare=prepare, judge=judge):
                notes.append(f"{rows} rows: {tried.note}")
                line.chunks[rows] = None
                continue
            contestant = self._contestants.pop()
            line.chunks[rows] = self._turn(action, prepare)
            times = [time for time in line.chunks.values() if time is not None]
            if line.chunks[rows] == min(times):
                best, line.error, shown = contestant, tried.error, tried.backend
        line.note = "; ".join(notes) or None
        if any(time is not None for time in line.chunks.values()):
            line.backend = shown
            self._contestants.append(_Contestant(line, best.action, prepare, self._rounds))

    def run(self) -> None:
        """All rounds; each second one in the opposite order, so that nobody always follows the same neighbour."""
        for number in range(self._rounds):
            order = self._contestants if number % 2 == 0 else self._contestants[::-1]
            for contestant in order:
                if len(contestant.line.milliseconds) < contestant.turns:
                    self._tell(f"{contestant.line.backend}: round {number + 1} of {self._rounds}")
                    contestant.line.milliseconds.append(self._turn(contestant.action, contestant.prepare))

    def _turn(self, action: Action, prepare: Action) -> float:
        prepare()
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return (time.perf_counter() - start) * 1e3

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def why(error: Exception) -> str:
    """An exception in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}".rstrip(": ")


def keep_large_blocks() -> None:
    """Let malloc keep what torch frees: returning and faulting in its temporaries can cost it more than its work."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back to the system
    except (OSError, AttributeError):
        pass
