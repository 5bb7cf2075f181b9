"""What runs on a GPU: for each operator and precision the best rung of which everything was proven on this machine.

Read before step 0 and then held: a kernel that was not proven here is not loaded, and nothing changes inside a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from latentforge.errors import FailedError, RefusedError
from latentforge.kernels.guard.key import key_of
from latentforge.kernels.guard.machine import Machine, look
from latentforge.kernels.guard.reasons import REASONS
from latentforge.kernels.guard.records import DamagedRecordError, Record, Records
from latentforge.kernels.guard.table import table
from latentforge.kernels.guard.variants import RUNGS, Variant

WARM_UP = "latentforge kernels warmup"


@dataclass(frozen=True)
class Choice:
    """The rung that was taken for an operator and a precision, and why those above it were not.

    ``rung`` None means that none is left: the host is unfit. ``passed_over`` holds (variant, reason, detail).
    """

    op: str
    dtype: str
    rung: str | None
    passed_over: tuple[tuple[str, str, str], ...] = ()

    @property
    def backend(self) -> str | None:
        """The backend of the rung."""
        return None if self.rung is None else self.rung.partition(":")[0]

    @property
    def native(self) -> bool:
        """Whether it is the first rung."""
        return self.rung is not None and not self.passed_over

    @property
    def text(self) -> str:
        """The choice and what was passed over, in one line."""
        shown = [f"{name}: {REASONS.get(reason, reason)}" for name, reason, _ in self.passed_over[:2]]
        more = [f"{len(self.passed_over) - 2} more"] if len(self.passed_over) > 2 else []
        over = "; ".join(shown + more)
        taken = (
            f"{self.op} {self.dtype} runs on {self.rung}" if self.rung else f"no {self.op} {self.dtype} is right here"
        )
        return taken + (f" ({over})" if over else "")


def choose(op: str, dtype: str, variants: Iterable[Variant], states: dict[str, Record]) -> Choice:
    """The first rung of which every variant is ``ok``; where there is none, the first that is right but slow.

    ``states`` are records by variant name. RefusedError where a rung that would be looked at has a variant without one,
    or with one that is still pending: not tried is not failed.
    """
    ours = [v for v in variants if (v.op, v.dtype) == (op, dtype)]
    over: list[tuple[str, str, str]] = []
    slow: str | None = None
    for rung in RUNGS:
        of_rung = [v for v in ours if v.rung == rung]
        if not of_rung:
            continue
        missing = [v.name for v in of_rung if v.name not in states or states[v.name].state == "pending"]
        if missing:
            raise RefusedError(
                f"there is no record of {missing[0]} on this machine (build, driver and libraries as they are now)",
                next=WARM_UP,
            )
        found = [states[v.name] for v in of_rung]
        bad = [record for record in found if record.state in ("failed", "crashed")]
        late = [record for record in found if record.state == "degraded"]
        if not bad and not late:
            return Choice(op, dtype, rung, tuple(over))
        if not bad and slow is None:
            slow = rung
        over += [(record.variant, str(record.reason), record.detail) for record in bad + late]
    return Choice(op, dtype, slow, tuple(over))


def chosen(op: str, dtype: Any, device_index: int = 0) -> str:
    """The backend for ``auto`` on a CUDA device: ``dtype`` a torch dtype. Looked up once a process.

    RefusedError naming the warm-up where there is no record; FailedError where nothing that is right is left.
    """
    return _chosen(op, _name(dtype), device_index)


def require_fit(ops: Sequence[str], dtype: Any, device_index: int = 0) -> list[Choice]:
    """The choices for several operators before step 0; raises as :func:`chosen` does.

    FailedError too where these kernels, each of them right, have failed together in the warm-up's micro-step.
    """
    name = _name(dtype)
    choices = [_fit(op, name, device_index) for op in ops]
    _refuse_failed_together(name, device_index)
    return choices


def _refuse_failed_together(dtype: str, device_index: int) -> None:
    """A micro-step of other choices, or none (a warm-up of some operators alone), says nothing of these."""
    from latentforge.kernels.guard.composite import OPS, composites

    machine = look(device_index)
    try:
        choices = [_choice(op, dtype, machine) for op in OPS]
    except RefusedError:
        return
    together = composites(machine, choices)
    for record in read_states(together, machine, Records()).values():
        if record.state == "pending":
            raise RefusedError(f"the trial of {record.variant} has not ended, or took its host down", next=WARM_UP)
        if record.state in ("failed", "crashed"):
            raise FailedError(
                f"this host is unfit: {record.variant}: the kernels are right one by one and fail together "
                f"({record.reason}: {record.detail})",
                next=f"{WARM_UP} --again",
            )


@cache
def _chosen(op: str, dtype: str, device_index: int) -> str:
    return str(_fit(op, dtype, device_index).backend)


def _fit(op: str, dtype: str, device_index: int) -> Choice:
    choice = _choice(op, dtype, look(device_index))
    if choice.rung is None:
        raise FailedError(f"this host is unfit: {choice.text}", next=f"{WARM_UP} --again --only {op}")
    return choice


def _choice(op: str, dtype: str, machine: Machine) -> Choice:
    variants = [v for v in table(machine) if (v.op, v.dtype) == (op, dtype)]
    return choose(op, dtype, variants, read_states(variants, machine, Records()))


def read_states(variants: Iterable[Variant], machine: Machine, records: Records) -> dict[str, Record]:
    """The records that hold on this machine now, by variant name. A damaged record is none."""
    found: dict[str, Record] = {}
    for variant in variants:
        try:
            record = records.read(key_of(variant, machine).digest)
        except DamagedRecordError:
            continue
        # One that is too old is still what runs: age asks for a new proof, it does not take the kernel away.
        if record is not None and record.variant == variant.name:
            found[variant.name] = record
    return found


def _name(dtype: Any) -> str:
    name = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(str(dtype), str(dtype))
    if name not in ("bf16", "fp32"):
        raise RefusedError(f"no kernel for {dtype} tensors on a GPU", next="pass backend='reference'")
    return name
