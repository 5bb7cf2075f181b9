"""The memory line of a plan: the nucleus's closed-form arithmetic, judged against the host."""

from __future__ import annotations

from dataclasses import dataclass

from dispatch.hosts.facts import HostFacts
from dispatch.planning.ask import Ask
from dispatch.preflight.need import memory_need
from latentforge.verdicts import Outcome

_OK = {Outcome.PASS: True, Outcome.FAIL: False, Outcome.UNKNOWN: None}


@dataclass(frozen=True)
class Judgement:
    """What was judged, whether it is enough (None: not known), and the sentence for a reader, without readings."""

    name: str
    ok: bool | None
    text: str


def judge_memory(ask: Ask, facts: HostFacts) -> Judgement:
    """Whether the host's memory holds what the pipeline needs at its largest moment."""
    plan, _notes = memory_need(ask, facts)
    verdict = plan.verdict(facts.host.mem_total, facts.host.mem_available)
    return Judgement("memory", _OK[verdict.outcome], f"memory: {verdict.text}")
