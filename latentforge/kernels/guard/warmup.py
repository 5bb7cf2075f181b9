"""The warm-up: each variant through its stages, its record written before and after; what runs is chosen from those.

A crash that was not contained (the guard or the host went down, and left a ``pending`` record) is reported by the next
warm-up, which does not try the variant; the one after that tries it once more; after a second crash it waits for a
person, who tries again (``again``) or lives with the fallback (``accept``).
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock

from latentforge.errors import BusyError, FailedError
from latentforge.kernels.guard import embedded, machine
from latentforge.kernels.guard.key import Key, key_of
from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.process import Outcome, run_child
from latentforge.kernels.guard.records import DamagedRecordError, Record, Records, boot_id, settle_leftover
from latentforge.kernels.guard.variants import Variant

MAX_ATTEMPTS = 2
GATE_BYTES = 24 * 2**30
GATE_SHARE = 0.2
SHARED_BYTES = {(12, 0): 101_376, (12, 1): 101_376, (8, 9): 101_376, (9, 0): 232_448}
_MEMORY_BACK = 2**30
_MEMORY_WAIT = 60.0


@dataclass(frozen=True)
class Limits:
    """Seconds a stage may take in a child, and the effort of timing."""

    compile: float = 300.0
    load: float = 60.0
    parity: float = 240.0
    cost: float = 120.0
    freeze: float = 300.0
    composite: float = 240.0
    total: float = 1800.0
    calls: int = 20
    seconds: float = 1.0

    def stages(self) -> dict[str, float]:
        """The limit of each stage of a probe."""
        return {"load": self.load, "parity": self.parity, "cost": self.cost, "freeze": self.freeze}


@dataclass(frozen=True)
class Line:
    """What the warm-up did with one variant: its record after, and what was done in this run."""

    variant: Variant
    record: Record
    did: str
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass
class WarmUp:
    """One run over variants of one machine; ``tell`` is told each variant and stage as it begins."""

    machine: Machine
    records: Records
    limits: Limits = field(default_factory=Limits)
    again: bool = False
    accept: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    tell: Callable[[Variant, str], None] = lambda variant, stage: None
    now: Callable[[], float] = time.time

    def run(self, variants: Sequence[Variant]) -> list[Line]:
        """One line a variant, in their order. BusyError where another warm-up of this host is at work."""
        self.gate(variants)
        self.records.prepare()
        lock = filelock.FileLock(self.records.folder / "lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise BusyError(
                f"another warm-up is at work on this host ({lock.lock_file} is held)",
                next="wait for it: two at once would need twice the memory of the compilers",
            ) from error
        try:
            deadline = time.monotonic() + self.limits.total
            return [self._line(variant, deadline) for variant in variants]
        finally:
            lock.release()

    def gate(self, variants: Iterable[Variant]) -> None:
        """FailedError where a CUDA device is to be used and too little memory is available."""
        if all(variant.device != "cuda" for variant in variants):
            return
        needed = min(GATE_BYTES, int(GATE_SHARE * machine.memory_total()))
        found = machine.memory_available()
        if found < needed:
            raise FailedError(
                f"{found / 2**30:.1f} GiB of memory are available, a warm-up needs {needed / 2**30:.1f} GiB",
                next="stop what holds the memory, then:  latentforge kernels warmup",
            )

    def _line(self, variant: Variant, deadline: float) -> Line:
        began = time.monotonic()
        key = key_of(variant, self.machine)
        notes: list[str] = []
        try:
            known = self.records.read(key.digest)
        except DamagedRecordError as error:
            known = None
            notes.append(str(error))
        record, did = self._decide(variant, key, known, deadline, notes)
        return Line(variant, record, did, time.monotonic() - began, tuple(notes))

    def _decide(
        self, variant: Variant, key: Key, known: Record | None, deadline: float, notes: list[str]
    ) -> tuple[Record, str]:
        """What the known record asks for: nothing, a look at the smallest shape, or the whole proof."""
        if known is not None and known.state == "pending":
            # The lock is ours, so nobody is working on it.
            known = settle_leftover(known, boot_id())
            self.records.write(known)
            if not (self.again or self.accept):
                return known, "crash found"
        if known is not None and known.state == "crashed":
            if self.accept and not known.accepted:
                known = replace(known, accepted=True)
                self.records.write(known)
            if known.accepted and not self.again:
                return known, "crash accepted"
            if known.attempts >= MAX_ATTEMPTS and not self.again:
                return known, "not retried"
        if time.monotonic() > deadline:
            record = self._new(variant, key, 0)
            detail = f"the warm-up's {self.limits.total:.0f} s were over before its turn"
            return replace(record, state="failed", reason="compile_timeout", detail=detail), "not tried"
        if known is not None and not self.again and self._may_skip(known, notes):
            if variant.op == "composite":
                return known, "known"
            return self._verify(variant, known), "verified"
        attempts = known.attempts if known is not None and known.state == "crashed" and not self.again else 0
        return self._attempt(variant, key, attempts), "proven"

    def _may_skip(self, known: Record, notes: list[str]) -> bool:
        if known.state not in ("ok", "degraded") or not known.fresh(self.now()):
            return False
        if self.machine.capability is None:
            return True
        lines = machine.kernel_log_since(self.now() - (known.finished or 0.0))
        if lines:
            notes.append(f"proven again, the kernel's log says since: {lines[-1].strip()}")
        return not lines

    def _attempt(self, variant: Variant, key: Key, attempts: int) -> Record:
        """Stages 1 to 6; the record on the disk is ``pending`` all the while."""
        record = self._new(variant, key, attempts)
        self.records.write(record)

        def entered(stage: str) -> None:
            nonlocal record
            record = replace(record, stage=stage)
            self.records.write(record)
            self.tell(variant, stage)

        if variant.op == "composite":
            limits = {"composite": self.limits.composite}
            return self._settled(record, self._child("composite", variant, limits, entered))
        entered("inspect")
        found: dict[str, Any] = self._inspect(variant)
        if found["reason"] is None and variant.compile is not None:
            found = self._child("compile_variant", variant, {"compile": self.limits.compile}, entered)
        if found["reason"] is None:
            found = _merged(found, self._child("probe", variant, self.limits.stages(), entered, quick=False))
        return self._settled(record, found)

    def _verify(self, variant: Variant, known: Record) -> Record:
        """Load and compare the smallest shape; a proof that no longer holds is replaced."""
        pending = replace(known, state="pending", reason=None, stage="load", boot=boot_id(), attempts=0)
        self.records.write(pending)
        self.tell(variant, "load")
        found = self._child("probe", variant, self.limits.stages(), lambda stage: None, quick=True, config=known.config)
        if found["reason"] is not None:
            return self._settled(pending, found)
        kept = replace(known, verified=self.now())
        self.records.write(kept)
        return kept

    def _settled(self, record: Record, found: dict[str, Any]) -> Record:
        reason = found["reason"]
        record = replace(
            record,
            state="ok" if reason is None else "degraded" if reason == "slow" else "failed",
            reason=reason,
            stage=found["stage"],
            detail=found["detail"],
            measured=found.get("measured", {}),
            config=found.get("config", {}),
            attempts=0,
            finished=self.now(),
        )
        self.records.write(record)
        return record

    def _new(self, variant: Variant, key: Key, attempts: int) -> Record:
        return Record(
            variant.name,
            key.digest,
            "pending",
            backend=variant.backend,
            parts=key.parts,
            attempts=attempts,
            host=platform.node(),
            boot=boot_id(),
            began=self.now(),
        )

    def _inspect(self, variant: Variant) -> dict[str, Any]:
        """Stage 1, for machine code that was built ahead of time; Triton's is made for the GPU at hand."""
        if variant.backend != "cuda" or self.machine.capability is None:
            return {"stage": "inspect", "reason": None, "detail": "", "measured": {}}
        said = inspect_extension(self.machine)
        return {"stage": "inspect", "reason": said.reason, "detail": said.detail, "measured": {"code": said.detail}}

    def _child(
        self,
        task: str,
        variant: Variant,
        limits: Mapping[str, float],
        entered: Callable[[str], None],
        **request: Any,
    ) -> dict[str, Any]:
        """The child's finding, or what its end means."""
        asked = {
            "task": task,
            "stages": list(limits),
            "variant": variant.as_json(),
            "effort": {"calls": self.limits.calls, "seconds": self.limits.seconds},
            "capability": self.machine.capability or (12, 1),
            "shared_bytes": SHARED_BYTES.get(self.machine.capability or (12, 1)),
            **request,
        }
        memory = machine.memory_available()
        environment = {"CUDA_DISABLE_PTX_JIT": "1", "CUDA_MODULE_LOADING": "LAZY", **self.environment}
        with tempfile.TemporaryDirectory(prefix="latentforge-warmup-") as folder:
            outcome = run_child(asked, Path(folder), limits=limits, environment=environment, entered=entered)
        if variant.device == "cuda" and self.machine.unified:
            _wait_for_memory(memory)
        return outcome.result if outcome.result is not None else finding_of(outcome)


def look_in_child(limits: Limits) -> Machine:
    """The machine, without starting CUDA here: by a child where a driver is loaded."""
    if machine.driver_version() is None:
        return machine.look()
    with tempfile.TemporaryDirectory(prefix="latentforge-warmup-") as folder:
        asked = {"task": "facts", "stages": ["load"]}
        outcome = run_child(asked, Path(folder), limits={"load": limits.load})
    if outcome.result is None:
        raise FailedError(
            f"looking at the GPU did not end well: {outcome.text}; {outcome.last_words.splitlines()[-1:]}",
            next="nvidia-smi",
        )
    return Machine.from_json(outcome.result)


def finding_of(outcome: Outcome) -> dict[str, Any]:
    """What a child's end without a result means: the closed list's reason, the end itself and its last words."""
    reason = {"signal": "crash_signal", "timeout": "hang_low_power", "exit": "load_error"}[outcome.kind]
    if outcome.stage == "compile" and outcome.kind == "timeout":
        reason = "compile_timeout"
    detail = outcome.text
    if outcome.kind == "signal" and outcome.value == 9:
        # Who killed it? The kernel's log knows, if it may be read.
        lines = machine.kernel_log_since(outcome.seconds)
        told = [line for line in lines or () if machine.OUT_OF_MEMORY.search(line)]
        if told:
            detail += f": out of memory ({told[-1].strip()})"
            reason = "compile_oom" if outcome.stage == "compile" else reason
        elif lines is None:
            detail += " (the kernel's log cannot be read: whether memory ran out is not known)"
    words = outcome.last_words.splitlines()
    return {"stage": outcome.stage, "reason": reason, "detail": detail + (f"; {words[-1]}" if words else "")}


def inspect_extension(where: Machine) -> embedded.Answer:
    """Whether the built extension carries machine code for this GPU (for GB10 where there is none)."""
    from importlib.util import find_spec

    capability = where.capability or (12, 1)
    spec = find_spec("latentforge._native")
    if spec is None or spec.origin is None:
        return embedded.Answer("no_cubin", "the extension is not built in this installation")
    program = embedded.lister()
    if program is None:
        return embedded.Answer(None, "not inspected: there is no cuobjdump here")
    return embedded.accept(embedded.list_embedded(Path(spec.origin), program), capability, where.driver_cuda)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {**second, "measured": {**first.get("measured", {}), **second.get("measured", {})}}


def _wait_for_memory(before: int) -> None:
    """A driver gives memory back some time after its process has ended; the next child must find it."""
    deadline = time.monotonic() + _MEMORY_WAIT
    while machine.memory_available() < before - _MEMORY_BACK and time.monotonic() < deadline:
        time.sleep(0.2)
