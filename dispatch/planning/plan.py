"""The plan: a pure function from what is asked and what was seen to the ordered steps that lead from one to the other.

A plan holds judgements ("memory: enough"), not readings, so two previews of an unchanged host are byte-identical, and
``apply`` has something definite to compare.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dispatch.building.build import BuildChoice
from dispatch.building.warmup import WarmUp
from dispatch.following.limits import Limits
from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import short_type
from dispatch.planning.ask import Ask
from dispatch.planning.choice import ChosenRun
from dispatch.planning.memory import Judgement
from dispatch.planning.runner import RunnerChoice, choose_runner
from dispatch.preflight.check import Report
from dispatch.preflight.judge import is_gb10, judge
from latentforge.spec.canonical import canonical_sha256
from latentforge.verdicts import ExitCode

if TYPE_CHECKING:
    from dispatch.pulling.pull import PullChoice

Will = Literal["keep", "check", "send", "run", "follow", "ended", "skip", "write", "refuse"]


@dataclass(frozen=True)
class Step:
    """One idempotent action of a plan, and the reason to do it or to leave it."""

    name: str
    will: Will
    because: str
    run: str | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a plan cannot be applied, what to do about it, and the exit code."""

    why: str
    next: str | None
    code: ExitCode = ExitCode.REFUSED


@dataclass(frozen=True)
class Plan:
    """The steps, the runs that they are about, and what a reader should know beside them."""

    host: str
    machine: str
    steps: tuple[Step, ...]
    runs: tuple[ChosenRun, ...]
    build: BuildChoice | None
    warmup: WarmUp | None
    pulls: tuple[PullChoice, ...]
    memory: Judgement
    runner: RunnerChoice
    notes: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    busy: str | None = None
    """Who holds the device lease that a run of this plan would have to wait for."""
    beside: Plan | None = None
    """The part of a second host in a run over both; its steps, refusals and notes are among these."""

    @property
    def final(self) -> ChosenRun:
        """The run that the plan is for: the last, or the first that ended without passing."""
        return next((run for run in self.runs if run.will == "ended"), self.runs[-1])

    @property
    def chain(self) -> tuple[ChosenRun, ...]:
        """The runs that are to be started or followed, in order."""
        return tuple(run for run in self.runs if run.will in ("run", "follow"))

    @property
    def starts_something(self) -> bool:
        """Whether a process is to be started on a host: a build or a run; following one that goes on is none."""
        own = any(run.will == "run" for run in self.runs) or (self.build is not None and self.build.will == "run")
        return own or (self.beside is not None and self.beside.starts_something)

    @property
    def changes_nothing(self) -> bool:
        """Whether each step keeps what is there."""
        return all(step.will in ("keep", "check", "ended", "skip") for step in self.steps)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the judgements: what ``apply`` compares."""
        steps = [[step.name, step.will, step.run or ""] for step in self.steps]
        told = {"schema": 1, "host": self.host, "steps": steps, "memory": self.memory.ok is not False}
        if self.beside is not None:
            told["beside"] = self.beside.digest
        return canonical_sha256(told)

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            **({"beside": self.beside.as_json()} if self.beside is not None else {}),
            "plan": self.digest,
            "host": self.host,
            "machine": self.machine,
            "steps": [{"name": s.name, "will": s.will, "because": s.because, "run": s.run} for s in self.steps],
            "runs": [
                {"kind": r.kind, "run": r.run, "will": r.will, "inputs": r.resolved, "predecessor": r.predecessor}
                for r in self.runs
            ],
            "memory": self.memory.text,
            "runner": {
                "name": self.runner.name,
                "why": self.runner.why,
                "warn_below_bytes": self.runner.floors.warn,
                "kill_below_bytes": self.runner.floors.kill,
            },
            "notes": list(self.notes),
            "refusals": [{"why": r.why, "next": r.next, "code": int(r.code)} for r in self.refusals],
        }


def make_plan(
    ask: Ask,
    facts: HostFacts,
    runs: Sequence[ChosenRun],
    *,
    build: BuildChoice | None,
    warmup: WarmUp | None = None,
    pulls: Sequence[PullChoice] = (),
    memory: Judgement,
    copied: frozenset[str] = frozenset(),
) -> Plan:
    """The plan that a request, the facts of its host and the copies on the laptop (``copied``: run ids) lead to."""
    report = judge(facts, ask, waived=dict(ask.waived))
    starts = any(run.will == "run" for run in runs)
    runner = choose_runner(ask.host, facts)
    refusals: list[Refusal] = []
    lane = [Step("lane", "keep", ask.lane.text)] if ask.lane is not None else []
    first = [*lane, _trust(ask), _preflight(ask, report, starts, refusals)]
    steps = [*first, *_code_and_build(ask, build, refusals)]
    if warmup is not None:
        steps.append(Step("warmup", warmup.will, warmup.because, warmup.run))
    for number, pull in enumerate(pulls, start=1):
        name = "pull" if number == 1 else f"pull {number}"
        steps.append(Step(name, pull.will, pull.told, pull.run))
    chain = [run for run in runs if run.will in ("run", "follow")]
    busy = _lease_held(facts, chain)
    for run in runs:
        because = run.because
        if run.will == "run" and run is chain[-1]:
            because += f"; {runner.words}, " + (f"device lease held by {busy}" if busy else "device lease free")
        shown = run.run if run.will != "skip" else "-"
        steps.append(Step(run.kind, run.will, f"{shown}  {because}", run.run))
    if busy and any(run.will == "run" for run in chain) and not ask.wait:
        refusals.append(
            Refusal(f"the device lease of {ask.host.name} is held by {busy}", f"{ask.command} --wait", ExitCode.BUSY)
        )
    if ask.no_secrets is not None and any(run.will == "run" for run in chain):
        refusals.append(Refusal(ask.no_secrets, f"set it in this shell, then:  {ask.command}"))
    if runner.obstacle is not None and any(run.will == "run" for run in chain):
        refusals.append(
            Refusal(
                f"runner = 'systemd' cannot work on {ask.host.name}: {runner.obstacle}",
                "put that right there, or set runner = 'auto' in hosts.toml",
                ExitCode.FAIL,
            )
        )
    final = next((run for run in runs if run.will == "ended"), runs[-1])
    steps += _aftermath(final, bool(chain), final.run in copied, ask.spec.profile)
    return Plan(
        host=ask.host.name,
        machine=_machine(ask, facts),
        steps=tuple(steps),
        runs=tuple(runs),
        build=build,
        warmup=warmup,
        pulls=tuple(pulls),
        memory=memory,
        runner=runner,
        notes=ask.notes,
        refusals=tuple(refusals),
        busy=busy if any(run.will == "run" for run in chain) else None,
    )


def _machine(ask: Ask, facts: HostFacts) -> str:
    host = facts.host
    words = ["GB10"] if is_gb10(ask.host, facts) else []
    words += [host.cpu or host.arch, f"{host.cores} cores"] if host.cores else [host.arch]
    if host.driver:
        words.append(f"driver {host.driver}")
    return ", ".join(words)


def _trust(ask: Ask) -> Step:
    if ask.host.is_local:
        return Step("trust", "keep", "this machine")
    key = ask.host.keys[0]
    return Step("trust", "keep", f"host key {short_type(key.type)} {key.sha256[:18]}… pinned {key.date}")


def _preflight(ask: Ask, report: Report, starts: bool, refusals: list[Refusal]) -> Step:
    """The checks in numbers. A failure stops a launch; where nothing is to be started there is nothing to stop."""
    to_read = f"latentforge dispatch preflight {ask.host.name} --for {shlex.quote(ask.recipe)}"
    waived = "".join(f"; {one.id} waived: {one.waived}" for one in report.checks if one.waived)
    stopping = report.stopping if starts else ()
    for one in stopping:
        refusals.append(Refusal(f"preflight: {one.measured}", one.remedy, ExitCode.FAIL))
    if stopping:
        return Step("preflight", "refuse", "; ".join(f"{one.id}: {one.measured}" for one in stopping))
    return Step("preflight", "check", f"{report.counted()}   ({to_read} to read them){waived}")


def _code_and_build(ask: Ask, build: BuildChoice | None, refusals: list[Refusal]) -> list[Step]:
    if build is None:
        code = Step("code", "keep", f"{ask.code_label}, in place")
        if ask.unfit is None:
            return [code, Step("build", "keep", "the running interpreter has this code")]
        refusals.append(Refusal(ask.unfit, f"make setup, and with .venv/bin on the PATH:  {ask.command}"))
        return [code, Step("build", "refuse", ask.unfit)]
    size = f"{ask.bundle.size / 1e6:.1f} MB" if ask.bundle else ""
    sent = build.will == "keep" or build.bundle_there
    code = Step("code", "keep" if sent else "send", f"{ask.code_label}" + (f", {size}" if not sent else ", there"))
    return [code, Step("build", build.will, build.because, build.run)]


def _lease_held(facts: HostFacts, chain: Sequence[ChosenRun]) -> str | None:
    holder = facts.lease_holder
    if holder is None or holder.run in {run.run for run in chain}:
        return None
    return holder.run or "a process that is not ours"


def _aftermath(final: ChosenRun, goes_on: bool, copied: bool, profile: str) -> list[Step]:
    if goes_on:
        limits = Limits.of({"profile": profile}, final.kind)
        return [
            Step("follow", "follow", f"{limits.told()}; Ctrl-C detaches, the run goes on"),
            Step("collect", "run", "what the run leaves, each file by its digest"),
            Step("evidence", "write", f"{final.run}/manifest.json"),
        ]
    if copied:
        return [
            Step("follow", "keep", "nothing goes on"),
            Step("collect", "keep", "already here"),
            Step("evidence", "keep", f"{final.run}/manifest.json"),
        ]
    return [
        Step("follow", "keep", "nothing goes on"),
        Step("collect", "run", "finished there, not yet here"),
        Step("evidence", "write", f"{final.run}/manifest.json"),
    ]
