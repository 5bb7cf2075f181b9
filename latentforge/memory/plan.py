"""How much memory a run will need, term by term, before anything starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from latentforge.verdicts import Outcome

GIB = 2**30
_RUNTIME = {"cpu": int(0.46 * GIB), "cuda": 3 * GIB}
"""The interpreter with torch and transformers (on a CPU: what runs of ``tiny`` hold, whose models take 5 MiB of it); on
CUDA also the context, workspaces and loaded kernels."""


def margin(total: int) -> int:
    """Bytes to leave free on a host: min(16 GiB, 12 % of RAM). Below it the watchdog warns."""
    return min(16 * GIB, total * 12 // 100)


def kill_floor(total: int) -> int:
    """Bytes below which the watchdog stops the run: min(8 GiB, 6 % of RAM)."""
    return min(8 * GIB, total * 6 // 100)


@dataclass(frozen=True)
class Term:
    """A named part of the need, in bytes; ``elsewhere``: held by another process than the run's, on the same host."""

    name: str
    bytes: int
    elsewhere: bool = False


def runtime(device: str) -> Term:
    """What a process holds before any model, on ``device`` ``cpu`` or ``cuda``."""
    return Term("runtime", _RUNTIME["cuda" if device == "cuda" else "cpu"])


CHECKPOINT, SAVED = "checkpoint", "saved"
FIRST_ALONE = (CHECKPOINT, SAVED)
"""Terms that the first of a run's processes has alone: it writes what is kept."""


def checkpoint_term(parameters: int, *, room: int = 0) -> Term:
    """The copy of fp32 weights and Adam's two moments that is held while it is written beside the steps. Where the only
    one is that of the last step, it finds the ``room`` of what a pass holds."""
    return Term(CHECKPOINT, max(0, 12 * parameters - room))


@dataclass(frozen=True)
class MemoryVerdict:
    """Whether a host's memory is enough. ``text`` is the plan's line; it holds no reading while the answer is enough,
    so that two previews of an unchanged host are the same."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class MemoryPlan:
    """The terms of one run. ``unknown`` names what could not be counted (then the verdict cannot be a pass).

    ``load`` is what must be there while a model is loaded: its weights and the largest file that they are converted
    from, the runtime not counted. It comes before the other terms, not on top of them. ``mapped`` are the pages of the
    other files, which a process shows as its own and the kernel takes back when it wants them.
    """

    run: str
    terms: tuple[Term, ...]
    unknown: tuple[str, ...] = ()
    load: int = 0
    mapped: int = 0

    @property
    def bytes(self) -> int:
        """The sum of the terms, without the host's margin."""
        return sum(term.bytes for term in self.terms)

    @property
    def own_bytes(self) -> int:
        """The most that the run's own process is planned to hold, while it loads or afterwards."""
        steady = sum(term.bytes for term in self.terms if not term.elsewhere)
        runtime = sum(term.bytes for term in self.terms if term.name == "runtime")
        return max(steady, self.load + self.mapped + runtime if self.load else 0)

    def on(self, processes: int, *, first: bool = True) -> MemoryPlan:
        """The plan of so many processes on this host, of which this is the plan of each; with the ``first`` of all
        among them, who alone writes what is kept."""

        def of_all(term: Term) -> Term:
            count = int(first) if term.name in FIRST_ALONE else processes
            return term if term.elsewhere else replace(term, bytes=term.bytes * count)

        terms = tuple(map(of_all, self.terms))
        return replace(self, terms=terms, load=self.load * processes, mapped=self.mapped * processes)

    def line(self, total: int | None = None) -> str:
        """``teacher 1.1 + student 0.4 + … + margin 16.0 = 20.3 GiB``, the margin of a host with ``total`` bytes."""
        terms = list(self.terms) + ([Term("margin", margin(total))] if total is not None else [])
        parts = " + ".join(f"{term.name} {gib(term.bytes)}" for term in terms if term.bytes)
        return f"{parts} = {gib(sum(term.bytes for term in terms))} GiB"

    def verdict(self, total: int | None, available: int | None) -> MemoryVerdict:
        """Whether the terms and the margin fit into ``available`` bytes of a host with ``total``; None: not known.

        What could not be counted makes it unknown, but for a host that cannot even hold what was.
        """
        if self.unknown and total is not None:
            have = total if available is None else min(total, available)
            if self.bytes + margin(total) > have:
                has = f"the host has {gib(total)}" + ("" if have == total else f", {gib(have)} are free")
                text = f"not enough, even without {', '.join(self.unknown)}: {self.line(total)}, {has}"
                return MemoryVerdict(Outcome.FAIL, f"{text} ({self.run})")
        if self.unknown:
            return MemoryVerdict(Outcome.UNKNOWN, f"unknown: the size of {', '.join(self.unknown)} is not known")
        if total is None or available is None:
            return MemoryVerdict(Outcome.UNKNOWN, f"unknown: the host does not say what is free; {self.line()}")
        need = max(self.bytes, self.load) + margin(total)
        if self.load > self.bytes and need > available:
            parts = f"{gib(self.load)} + margin {gib(margin(total))} GiB"
            text = f"not enough to load it: {parts}, {gib(available)} are free"
            return MemoryVerdict(Outcome.FAIL, f"{text} ({self.run})")
        if need > total:
            text = f"not enough: {self.line(total)}, the host has {gib(total)}"
            return MemoryVerdict(Outcome.FAIL, f"{text} ({self.run})")
        if need > available:
            text = f"not enough now: {self.line(total)}, {gib(available)} of {gib(total)} are free"
            return MemoryVerdict(Outcome.FAIL, f"{text} ({self.run})")
        return MemoryVerdict(Outcome.PASS, f"enough: {self.line(total)}")


def largest(plans: Iterable[MemoryPlan]) -> MemoryPlan:
    """The plan of runs made one after the other: the largest of them, and everything of which the size is unknown."""
    plans = list(plans)
    most = max(plans, key=lambda plan: plan.bytes)
    unknown = tuple(dict.fromkeys(name for plan in plans for name in plan.unknown))
    return MemoryPlan(most.run, most.terms, unknown, max(plan.load for plan in plans), most.mapped)


def gib(count: int) -> str:
    """GiB with one decimal, with two below 0.1 and never "0.0" for something that is there."""
    value = count / GIB
    if value >= 0.095:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.005 else "0.01" if count else "0"
