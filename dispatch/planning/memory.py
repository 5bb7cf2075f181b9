"""The memory line of a plan: the nucleus's closed-form arithmetic, judged against the host."""

from __future__ import annotations

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.preflight import Judgement
from dispatch.planning.ask import Ask
from latentforge.memory import pipeline_peak
from latentforge.verdicts import Outcome

_OK = {Outcome.PASS: True, Outcome.FAIL: False, Outcome.UNKNOWN: None}


def judge_memory(ask: Ask, facts: HostFacts) -> Judgement:
    """Whether the host's memory holds what the pipeline needs at its largest moment."""
    device = "cuda" if facts.host.gpus else "cpu"
    verdict = pipeline_peak(ask.spec, device=device).verdict(facts.host.mem_total, facts.host.mem_available)
    return Judgement(
        "memory",
        _OK[verdict.outcome],
        f"memory: {verdict.text}",
        "free memory there, or make it smaller: --set distill.micro_batch_size=…, --set teacher.batch_size=…",
    )
