"""Where a recipe computes: device, kernel backend, and batches of packed rows as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from latentforge.data.order import BatchOrder
from latentforge.data.shards import PackedShard, ShardSet
from latentforge.errors import LatentForgeError, RefusedError
from latentforge.students.causal import Padding
from latentforge.train.engines.world import World

EVALUATION_ROWS = 32
"""Sequences of a forward pass when nothing is trained."""


THREADS = "LATENTFORGE_THREADS"
SMALL_STEP_FLOPS = 20e9


def fit_threads(step_flops: float) -> int:
    """Set and return torch's threads for steps of ``step_flops``: all cores, but one where a step is small.

    Several processes of a run on this host share its cores. The environment's LATENTFORGE_THREADS wins. Small operators
    gain little from a second thread and lose a hundred times as much where another process wants its core: every
    operator then waits for a descheduled thread.
    """
    asked = os.environ.get(THREADS)
    if asked is not None and (not asked.isdigit() or int(asked) < 1):
        raise RefusedError(f"{THREADS}={asked!r} is not a number of threads", next=f"unset {THREADS}")
    cores = max(1, len(os.sched_getaffinity(0)) // World.here().local)
    torch.set_num_threads(int(asked) if asked else 1 if step_flops < SMALL_STEP_FLOPS else cores)
    return torch.get_num_threads()


def choose_device(asked: str, *, section: str = "distill") -> torch.device:
    """The device that runs: ``auto`` is the GPU where torch sees one. Refused where the asked one is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise RefusedError("device = 'cuda', but torch sees no GPU", next=f"set {section}.device = 'auto' or 'cpu'")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def choose_kernel(
    device: torch.device, dtype: torch.dtype, *, op: str = "kd_loss", also: Sequence[str] = ()
) -> tuple[str, str | None]:
    """The backend of the kernel ``op`` for a device and a precision, and the sentence to say where it is a fallback.

    On a GPU it is what the warm-up guard has proven there: refused, before step 0, where it has no record or nothing
    that is right for the loss, or for an operator of ``also``.
    """
    if device.type != "cpu":
        from latentforge.kernels.guard.ladder import require_fit

        choice = require_fit([op, *also], dtype, device.index or 0)[0]
        return str(choice.backend), None if choice.native else choice.text
    try:
        from latentforge.kernels.native import native

        native()
        return "cpu", None
    except LatentForgeError as error:
        return "reference", f"the loss runs on 'reference' (torch), which is slower: {error}"


def padding_of(data: ShardSet) -> Padding | None:
    """How the data's rows are padded; None where its documents follow each other."""
    return Padding(data.chunk, data.eos_id) if data.chunk > 1 else None


def training_batch(shard: PackedShard, order: BatchOrder, step: int, device: torch.device) -> Tensor:
    """The tokens int64 [B, L] of ``step`` (from 0)."""
    return torch.from_numpy(shard.rows(order.indices(step))).to(device)


def evaluation_batches(shard: PackedShard, device: torch.device, *, at_most: int = EVALUATION_ROWS) -> Iterator[Tensor]:
    """All rows of a shard in order, tokens int64 [b, L] of ``at_most`` rows: those of a training pass, where a model is
    measured whose logits are the most that its run holds."""
    size = min(at_most, EVALUATION_ROWS)
    for start in range(0, len(shard), size):
        rows = np.arange(start, min(start + size, len(shard)))
        yield torch.from_numpy(shard.rows(rows)).to(device)
