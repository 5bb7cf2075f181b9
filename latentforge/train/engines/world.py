"""The processes of one run: which one this is, its share of each batch, and sums over all of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Given = TypeVar("Given")


@dataclass(frozen=True)
class World:
    """The process ``rank`` of the ``size`` that train one student together. Collective calls are made by all of them,
    in the same order."""

    rank: int = 0
    size: int = 1
    local: int = 1
    """Of them on this host."""

    @classmethod
    def here(cls) -> World:
        """The world that this process has joined; one process alone where it has joined none."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes: events, log, checkpoints, products."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Which rows of a batch of ``rows`` are this process's: all that there are, each of one process, in their
        order; the first processes have one more where they cannot be shared out evenly."""
        each, left = divmod(rows, self.size)
        begin = self.rank * each + min(self.rank, left)
        return slice(begin, begin + each + (self.rank < left))

    def passes(self, rows: int, micro_batch_size: int | None) -> int:
        """Forward passes that each process makes for a batch of ``rows``: those of the largest share. A process that
        has fewer makes empty ones, since the others would wait for it in their collective calls."""
        largest = -(-rows // self.size)
        return -(-largest // (micro_batch_size or largest))

    def rows(self, batch: int, micro_batch_size: int | None) -> int:
        """Rows of the largest pass over a batch of so many: what a run's memory is planned by, held-out passes too."""
        share = -(-batch // self.size)
        return min(share, micro_batch_size or share)

    def padded(self, given: Iterable[Given], passes: int) -> Iterator[Given | None]:
        """What is ``given`` to this process for its passes, and None for each further one that others make."""
        count = 0
        for one in given:
            count += 1
            yield one
        for _ in range(passes - count if self.size > 1 else 0):
            yield None

    def sums(self, *values: float) -> list[float]:
        """The sum of each value over all processes, fp64: whole numbers below 2^53 are exact. Collective."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found)
        return [float(value) for value in found]

    def any(self, here: bool) -> bool:
        """Whether it is so in any of the processes. Collective."""
        return here if self.size == 1 else self.sums(float(here))[0] > 0

    def signal(self, asked: str | None) -> str | None:
        """The signal that told any of the processes to stop: they all stop after the same step. Collective."""
        if self.size == 1:
            return asked
        number = torch.tensor(0 if asked is None else int(signal.Signals[asked]))
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None

    @property
    def one_disk(self) -> bool:
        """Whether all processes are on one host, so that each finds what the first has written."""
        return self.local == self.size

    def given(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """What the first process has, in all of them: CPU tensors by name, bit for bit. Collective."""
        known = [None if tensors is None else {name: (one.shape, one.dtype) for name, one in tensors.items()}]
        dist.broadcast_object_list(known)
        shapes = known[0]
        assert shapes is not None
        found = {}
        for name, (shape, dtype) in shapes.items():
            there = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name].contiguous()
            # As bytes: not every backend moves every type.
            dist.broadcast(there.view(-1).view(torch.uint8), 0)
            found[name] = there
        return found

    def barrier(self) -> None:
        """Wait for all processes. Collective."""
        if self.size > 1:
            dist.barrier()
