"""What this process holds: now, and at most since its run began, with and without what the C library keeps.

glibc gives a freed block back to the kernel where it was mapped on its own, and moves the size from which it maps to
that of the largest block that was freed (mallopt(3), M_MMAP_THRESHOLD). A training that frees large tensors so leaves
later ones in a heap with holes: resident, and used by nobody. What is resident is what a host must give; what is in use
is what a plan can count.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import torch

_LEAST_SECONDS = 0.001


class Peak(NamedTuple):
    """The most bytes that were held: ``resident``, and ``in_use``, without what was freed and kept (None: not known).

    Both with what a GPU's allocator gave out.
    """

    resident: int
    in_use: int | None

    @classmethod
    def sum(cls, peaks: Iterable[Self]) -> Self:
        """Those of several processes."""
        found = list(peaks)
        parts = [one.in_use for one in found if one.in_use is not None]
        return cls(sum(one.resident for one in found), sum(parts) if len(parts) == len(found) else None)


class _Info(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later: mallinfo(3)."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


class Heap:
    """The C library's own count of its heap."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.malloc.restype = ctypes.c_void_p
        self._library.malloc.argtypes = [ctypes.c_size_t]
        self._library.free.argtypes = [ctypes.c_void_p]

    def info(self) -> _Info | None:
        """What is used and what is free; None where the C library has no such count."""
        with contextlib.suppress(AttributeError):
            ask = self._library.mallinfo2
            ask.restype = _Info
            found: _Info = ask()
            return found
        return None

    @property
    def counts(self) -> bool:
        """Whether the count moves with what is allocated: not where another allocator was loaded before it."""
        before, wanted = self.info(), 1 << 16  # a block that is mapped and freed would move the size from which it maps
        block = self._library.malloc(wanted)
        after = self.info()
        self._library.free(block)
        if before is None or after is None:
            return False
        return bool(after.uordblks + after.hblkhd - before.uordblks - before.hblkhd >= wanted)

    def kept(self) -> int:
        """Bytes that were freed and are still held."""
        found = self.info()
        return 0 if found is None else int(found.fordblks)

    def trim(self) -> None:
        """Give back what is free."""
        with contextlib.suppress(AttributeError):
            self._library.malloc_trim(0)


class Watch:
    """What this process holds, from now until it is closed: looked at beside the work.

    ``share`` is the part of the time that is spent on looking.
    """

    def __init__(self, share: float) -> None:
        self._share, self._heap = share, Heap()
        # What was freed and is kept would be taken again, and hide as much of what the run takes.
        self._heap.trim()
        # Trimmed blocks still count as free, and are not resident.
        self._trimmed = self._heap.kept() if self._heap.counts else None
        self._earlier = self._device = self._in_use = 0
        self._closed = threading.Event()
        self.before = now()
        """Bytes that it held when the watch began."""
        _forget()
        self._thread = threading.Thread(target=self._look_on, name="memory", daemon=True)
        if self._trimmed is not None:  # else there is nothing to look at between
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        if self._trimmed is not None:
            self._thread.join()

    def peak(self) -> Peak:
        """The most since it began."""
        self._look()
        self._device = max(self._device, _device_peak())
        counted = self._trimmed is not None
        return Peak(max(self._earlier, _peak_now()), self._in_use + self._device if counted else None)

    def take(self) -> int:
        """The most resident bytes since this was last asked; the peak since it began is kept."""
        found = _peak_now()
        self._earlier, self._device = max(self._earlier, found), max(self._device, _device_peak())
        _forget()
        return found

    def _look(self) -> None:
        if self._trimmed is not None:
            self._in_use = max(self._in_use, _resident() - max(0, self._heap.kept() - self._trimmed))

    def _look_on(self) -> None:
        waiting = 0.0
        while not self._closed.wait(waiting):
            began = time.thread_time()  # what it waited for the interpreter or a core is no cost of looking
            self._look()
            waiting = max(_LEAST_SECONDS, (time.thread_time() - began) / self._share)


_watches: list[Watch] = []


@contextlib.contextmanager
def watching(share: float = 0.005) -> Iterator[Watch]:
    """Watch what this process holds while it lasts; :func:`take_peak` is of the latest watch."""
    with Watch(share) as watch:
        _watches.append(watch)
        try:
            yield watch
        finally:
            _watches.remove(watch)


def take_peak() -> int:
    """The most resident bytes since the run of this process last asked; its own peak is kept."""
    if _watches:
        return _watches[-1].take()
    found = _peak_now()
    _forget()
    return found


def now() -> int:
    """Bytes resident now (plus the GPU allocator's, where there is one)."""
    return _resident() + (torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _device_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def _forget() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak_now() -> int:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        resident = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), resident)
    return resident + _device_peak()
