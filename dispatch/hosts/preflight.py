"""Judgements about a host: enough or not, each with what to do about it. Readings stay out of the plan."""

from __future__ import annotations

from dataclasses import dataclass

from dispatch.hosts.facts import HostFacts
from dispatch.planning.ask import Ask

_PYTHON = (3, 11)
DISK_FLOOR = 2 * 2**30
"""Bytes that must be free in the state root: a virtual environment with CPU torch takes about 1.2 GiB."""


@dataclass(frozen=True)
class Judgement:
    """What was judged, whether it is fit (None: not known), and the sentence for a reader."""

    name: str
    ok: bool | None
    text: str
    next: str | None = None


def judge(ask: Ask, facts: HostFacts, memory: Judgement) -> list[Judgement]:
    """The judgements that a run needs. GB10 checks apply to GB10 hosts only."""
    return [_python(ask, facts), _disk(ask, facts), memory]


def _python(ask: Ask, facts: HostFacts) -> Judgement:
    if facts.python.numbers >= _PYTHON:
        return Judgement("python", True, "Python is new enough")
    needed = ".".join(str(part) for part in _PYTHON)
    return Judgement(
        "python",
        False,
        f"{facts.python.executable} on {ask.host.name} is Python {facts.python.version}; {needed} is needed",
        f"install a newer Python there, then:  latentforge dispatch enrol {ask.host.name} --python PATH --replace",
    )


def _disk(ask: Ask, facts: HostFacts) -> Judgement:
    free = facts.host.disk_free
    if free is None:
        return Judgement("disk", None, "disk: free space is not known")
    if free >= DISK_FLOOR:
        return Judgement("disk", True, "disk: enough")
    return Judgement(
        "disk",
        False,
        f"disk: less than {DISK_FLOOR / 2**30:.0f} GiB free in {facts.root} on {ask.host.name}",
        "free some space there, or name another state root with GX10_REPO_PATH",
    )
