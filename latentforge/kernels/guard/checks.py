"""Executable checks of what the warm-up guard claims; contracts name these functions and plant their faults."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentforge.contracts import Finding


def every_call_is_compared(*, mutant: str | None = None) -> Finding:
    """A kernel that is right once and wrong afterwards is not proven. ``mutant`` "first" compares one call alone."""
    import torch

    from latentforge.contracts import Finding
    from latentforge.kernels.guard import parity
    from latentforge.kernels.guard.trials import KDTrial, reference_rows
    from latentforge.kernels.guard.variants import Variant

    calls = count(1)

    def right_once(student: torch.Tensor, *rest: Any, **named: Any) -> Any:
        rows = reference_rows(student, *rest, **named)
        if next(calls) > 1:
            student *= 1.5
        return rows

    variant = Variant("kd_loss", "fp32", "cpu", "planted:right_once", device="cpu")
    kept = parity.CALLS
    try:
        parity.CALLS = 1 if mutant == "first" else kept
        found = parity.prove(
            right_once,
            ((2, 33),),
            lambda shape, seed: _with_gradient_only(KDTrial(variant, shape, torch.device("cpu"), seed)),
        )
    finally:
        parity.CALLS = kept
    caught = found.reason == "mismatch_later_call"
    return Finding(caught, f"right on call 1, wrong on call 2: {found.reason or 'proven'}", {"reason": found.reason})


def _with_gradient_only(trial: Any) -> Any:
    trial.read_only = lambda entry, **options: None
    return trial


def a_leftover_is_a_crash(*, mutant: str | None = None) -> Finding:
    """A proof that did not come back is a crash and no proof. ``mutant`` "early" writes ``ok`` before it has ended."""
    import time

    from latentforge.contracts import Finding
    from latentforge.kernels.guard.key import key_of
    from latentforge.kernels.guard.machine import Machine
    from latentforge.kernels.guard.records import Records
    from latentforge.kernels.guard.variants import Variant
    from latentforge.kernels.guard.warmup import Limits, WarmUp

    class HostDownError(BaseException):
        """Stands for the moment at which nothing runs any more."""

    def down(variant: Variant, stage: str) -> None:
        if stage == "inspect":
            raise HostDownError

    machine = Machine(None, 0, "none", "none", "none", "0", "0", "0", "0")
    entry = "latentforge.kernels.guard.trials:reference_rows"
    variant = Variant("kd_loss", "fp32", "cpu", entry, device="cpu", shapes=((2, 33),))
    with tempfile.TemporaryDirectory(prefix="latentforge-") as folder:
        records = Records(Path(folder))
        with suppress(HostDownError):
            WarmUp(machine, records, tell=down).run([variant])
        left = records.read(key_of(variant, machine).digest)
        if mutant == "early" and left is not None:
            records.write(replace(left, state="ok", finished=time.time()))
        (line,) = WarmUp(machine, records, Limits(calls=1, seconds=0.0)).run([variant])
    crashed = left is not None and left.state == "pending" and line.record.state == "crashed"
    said = f"left {left.state if left else 'nothing'}; the next warm-up said {line.record.state} ({line.did})"
    return Finding(crashed, said, {"state": line.record.state, "did": line.did})
