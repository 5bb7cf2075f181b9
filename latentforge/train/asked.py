"""What asking a remote teacher comes to, told in the log of the run that asks."""

from __future__ import annotations

import time
from typing import Any

from latentforge.events import EventLog
from latentforge.targets.continuations import ContinuationStore
from latentforge.targets.store import Coverage, TargetStore
from latentforge.teachers.http.flow import FlowControl, flow_of

_SECONDS_BETWEEN_METRICS = 60.0
_SECONDS_BETWEEN_PROGRESS = 1.0


class AskedLog:
    """Progress, rate limits and counts of a run that asks for rows, named ``what``; of a teacher in this process only
    the progress."""

    def __init__(self, log: EventLog, teacher: Any, what: str = "score") -> None:
        self.log = log
        self.what = what
        self.teacher = teacher
        self.flow: FlowControl | None = flow_of(teacher)
        self._told = self._measured = time.monotonic()

    def progress(self, done: int, total: int) -> None:
        """How far it is: at most once a second, and at the end."""
        self.notes()
        now = time.monotonic()
        if done == total or now - self._told >= _SECONDS_BETWEEN_PROGRESS:
            self._told = now
            self.log.progress(self.what, done, total)
        if now - self._measured >= _SECONDS_BETWEEN_METRICS:
            self.metrics(done)

    def notes(self) -> None:
        """What the gate had to say since it was last asked."""
        while self.flow is not None and self.flow.notes:
            self.log.warning(self.flow.notes.popleft())

    def metrics(self, done: int, *, kept: Coverage | None = None) -> None:
        """One event with everything that was counted, each name with ``teacher_`` before it.

        ``kept`` is what a store of the run's own had before: those rows count as not asked for.
        """
        self._measured = time.monotonic()
        counted = self.teacher.metrics() if self.flow is not None else {}
        if not counted:
            return
        if kept is not None:
            counted |= {"rows_from_store": kept.present, "hit_rate": kept.fraction if kept.total else 0.0}
        fields = {f"teacher_{name}": value for name, value in counted.items()}
        self.log.emit("metric", name="teacher", value=counted["requests"], step=done, split=self.what, **fields)
        speed = counted["tokens_per_s"]
        self.log.say(
            f"teacher: {counted['requests']} requests, {counted['retries']} of them again, "
            f"{counted['rate_limit_events']} rate limits, k = {counted['k_now']}"
            + (f", p50 {counted['p50_s']:.3f} s, p95 {counted['p95_s']:.3f} s" if counted["p50_s"] is not None else "")
            + (f", {speed:.0f} tokens/s" if speed else "")
            + (f", {counted['rows_from_store']} sequences from the cache" if counted["rows_from_store"] else "")
        )

    def lost(self, reached: Any, store: TargetStore | ContinuationStore) -> None:
        """The teacher is gone: what is kept, before the run ends with its failure."""
        self.notes()
        self.metrics(reached.present)
        self.log.warning(f"the teacher was lost; kept in {store.path.name}: {reached}")
