"""How much memory a turn takes at most: of this process, and of a GPU where one computes."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

_RESET_PEAK = "5"  # proc(5), clear_refs: the resident peak of a process counts from now on


class Peak(NamedTuple):
    """Bytes: resident of this ``process``, all that was loaded before included, and allocated by torch on a ``gpu``.

    ``own`` says whether the process's is that of the turn; where the count does not begin anew, it is that of the
    process since its start.
    """

    process: int
    gpu: int | None
    own: bool

    @property
    def total(self) -> int:
        """Both together: on a machine whose GPU shares the memory, that is what it holds."""
        return self.process + (self.gpu or 0)

    @staticmethod
    def largest(peaks: Sequence[Peak]) -> Peak:
        """The largest of each."""
        gpus = [one.gpu for one in peaks if one.gpu is not None]
        return Peak(max(one.process for one in peaks), max(gpus, default=None), all(one.own for one in peaks))


class Meter:
    """Peaks of turns on ``device``, and of the process as a whole.

    With ``anew`` false the process's peak is never counted anew, for the sake of somebody else who counts it.
    """

    def __init__(self, device: torch.device, *, anew: bool = True) -> None:
        self._device, self._anew = device, anew
        self._own = False
        self._before = _process_peak()

    def begin(self) -> None:
        """Count from now on."""
        self._before = max(self._before, _process_peak())
        self._own = self._anew and _begin_anew()
        if self._anew and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self) -> Peak:
        """The peaks since ``begin``."""
        gpu = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        return Peak(_process_peak(), gpu, self._own)

    @property
    def process(self) -> int:
        """The process's largest peak since it began, in bytes."""
        return max(self._before, _process_peak())


def _begin_anew() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _process_peak() -> int:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
