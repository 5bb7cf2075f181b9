"""The memory line of a plan: the nucleus's closed-form arithmetic, judged against the host."""

from __future__ import annotations

from dispatch.ask import Ask
from dispatch.facts import HostFacts
from dispatch.preflight import Judgement


def judge_memory(ask: Ask, facts: HostFacts) -> Judgement:
    """Whether the host's memory holds what the pipeline needs at its largest moment."""
    return Judgement("memory", None, "memory: not estimated")
