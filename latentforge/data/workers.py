"""Documents to ids on several cores: the same arrays in the same order, however many processes there are."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import numpy.typing as npt

from latentforge.data.corpus import Entry, read_all
from latentforge.data.encoding import Encoded
from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import CrashedError

BYTES_WORTH_A_PROCESS = 32_000_000
"""A process begins in a second or two; less text than this is sooner encoded without it."""

_BATCH_BYTES = 1 << 21
_BATCHES_A_PROCESS = 2


def processes_for(size: int) -> int:
    """How many processes ``size`` bytes of text are worth on this machine; one is this process itself."""
    return max(1, min(len(os.sched_getaffinity(0)), size // BYTES_WORTH_A_PROCESS))


@dataclass(frozen=True)
class Encoding:
    """How documents become ids: ``tokenizer``, the BOS that begins each or None, and in how many processes."""

    tokenizer: Tokenizer
    bos_id: int | None
    processes: int

    def __call__(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Encoded]]:
        """Each document with its (UTF-8 bytes, ids ending in EOS), in the order of ``entries``; read as they come."""
        if self.processes == 1:
            for batch in _batches(entries):
                yield from zip(batch, _encode(self.tokenizer, self.bos_id, batch), strict=True)
            return
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.processes, spawn, _begin, (self.tokenizer.folder, self.bos_id))
        # So many batches are under way at once: memory is bounded, and no process waits for its next batch.
        under_way: deque[tuple[list[Entry], Future[_Encoded]]] = deque()
        batches = _batches(entries)
        try:
            while True:
                for batch in islice(batches, self.processes * _BATCHES_A_PROCESS - len(under_way)):
                    under_way.append((batch, pool.submit(_work, batch)))
                if not under_way:
                    return
                batch, future = under_way.popleft()
                yield from zip(batch, future.result().documents(), strict=True)
        except BrokenProcessPool:
            raise CrashedError(
                f"one of {self.processes} processes that tokenize was ended from outside",
                next="look whether the host ran out of memory, then run again",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Encoded:
    """Documents on their way between processes: bytes and ids of each, the ids of all in one array."""

    sizes: list[int]
    counts: list[int]
    ids: npt.NDArray[np.uint32]

    def documents(self) -> Iterator[Encoded]:
        end = 0
        for size, count in zip(self.sizes, self.counts, strict=True):
            begin, end = end, end + count
            yield size, self.ids[begin:end]


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += entry.length
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, bos_id: int | None, batch: list[Entry]) -> Iterator[Encoded]:
    return tokenizer.encode((document.text for document in read_all(batch)), bos_id=bos_id)


# --- in a worker ---------------------------------------------------------------------------------------------------

_mine: tuple[Tokenizer, int | None]


def _begin(folder: Path, bos_id: int | None) -> None:
    global _mine
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are shared out already
    _mine = Tokenizer.open(folder), bos_id


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(batch: list[Entry]) -> _Encoded:
    sizes, ids = zip(*_encode(*_mine, batch), strict=True)
    return _Encoded(list(sizes), [len(one) for one in ids], np.concatenate(ids))
