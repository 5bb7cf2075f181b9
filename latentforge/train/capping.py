"""The cap of a run's allocator on a GPU: a run that takes more than it was planned to take fails by itself, and alone.

On one pool for GPU and host, what an allocator takes beyond its plan is taken from everything that runs there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from latentforge.errors import FailedError
from latentforge.events import EventLog
from latentforge.memory import MemoryPlan, margin
from latentforge.memory.plan import FIRST_ALONE, gib
from latentforge.spec.run import RunDir
from latentforge.train import effective
from latentforge.train.engines.world import World


def each_planned(plan: MemoryPlan | None, processes: int = 1) -> int | None:
    """Bytes that each of a run's ``processes`` on a host is planned to hold at most, with what the first has alone;
    None where that is not known."""
    if plan is None or plan.unknown:
        return None
    alone = sum(term.bytes for term in plan.terms if term.name in FIRST_ALONE)
    return (plan.own_bytes - alone) // processes + alone


@contextmanager
def capped(run: RunDir, log: EventLog, planned: int | None) -> Iterator[None]:
    """Keep what is computed here under a cap: the ``planned`` bytes of this process and the device's margin, and never
    more than is free there. Recorded and said by the first process; nothing is set on a CPU, nor without a plan.

    FailedError where the allocator refuses to go beyond it. Afterwards there is no cap.
    """
    cap = None if planned is None or not _on_gpu(run) else _set(planned, log)
    if World.here().first:
        effective.record(run, memory={"allocator_cap_bytes": cap})
    try:
        yield
    except torch.OutOfMemoryError as error:
        if planned is None or cap is None:
            raise
        said = ". ".join(str(error).split(". ")[:2])  # that it is out of memory, and for how much
        raise FailedError(
            f"this run wants more than the {gib(cap)} GiB that its allocator is capped at; {gib(planned)} GiB were "
            f"planned: {said}",
            next="set a smaller micro_batch_size, or activation_checkpointing = true; latentforge memory SPEC shows "
            "each term",
        ) from error
    finally:
        if cap is not None:  # another run of this process has a plan of its own
            torch.cuda.set_per_process_memory_fraction(1.0)


def _on_gpu(run: RunDir) -> bool:
    identity = run.load_identity()
    return torch.cuda.is_available() and identity.spec.get(identity.kind, {}).get("device") != "cpu"


def _set(planned: int, log: EventLog) -> int:
    free, total = torch.cuda.mem_get_info()
    # What this process's allocator holds already is no one else's.
    cap = min(planned + margin(total), free + torch.cuda.memory_reserved())
    torch.cuda.set_per_process_memory_fraction(cap / total)
    log.say(f"allocator capped at {gib(cap)} of {gib(total)} GiB: the {gib(planned)} GiB planned, and the margin")
    return cap
