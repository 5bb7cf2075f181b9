"""A build by itself, before any pipeline wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dispatch.apply import build
from dispatch.building.build import BuildChoice
from dispatch.following.follow import Follower
from dispatch.hosts.facts import HostFacts
from dispatch.planning.ask import Ask
from dispatch.planning.survey import survey_build
from dispatch.preflight.judge import judge
from dispatch.transport.call import Transport
from latentforge.errors import FailedError, LatentForgeError, RefusedError
from latentforge.verdicts import ExitCode

# Gates that are about running a pipeline: a build meets neither its memory nor the others on the device.
_OF_RUNS = frozenset({"memory", "tenants", "capabilities"})


@dataclass(frozen=True)
class Built:
    """The build of a host: its name, what was or would be done for it, and why."""

    build: str | None
    run: str | None
    will: str
    because: str

    def line(self) -> str:
        """The build on a line."""
        return f"{self.will:<6}  {self.build or '-'}  {self.because}"


def build_request(ask: Ask) -> Ask:
    """The request with the command that repeats a build, instead of a pipeline's."""
    return replace(ask, command=f"latentforge dispatch build --host {ask.host.name}")


def build_only(
    transport: Transport, ask: Ask, follower: Follower, *, dry_run: bool, say: Callable[[str], None]
) -> Built:
    """Make sure that a host has the build of this code; on ``local`` the running interpreter is it.

    Errors are those of the build step of ``go``: refused for an unfit host, 1 or 5 for a build that failed.
    """
    if ask.bundle is None:
        if ask.unfit is not None:
            raise RefusedError(ask.unfit, next="make setup")
        return Built(None, None, "keep", "the running interpreter has this code")
    choice, facts = survey_build(transport, ask)
    if choice.will == "run":
        _refuse_unfit(ask, facts)
    if choice.will == "ended":
        raise FailedError(
            f"the build {choice.run} on {ask.host.name} ended: {choice.because}", next=f"{ask.command} --attempt next"
        )
    shown = Built(choice.names.build, choice.run, choice.will, choice.because)
    if dry_run or choice.will == "keep":
        return shown
    transport.install()
    build(choice, ask, facts, transport, follower, plan=None, say=say)
    return replace(shown, because=_made(choice))


def _made(choice: BuildChoice) -> str:
    return f"made by {choice.run}" if choice.will == "run" else f"{choice.run} made it"


def _refuse_unfit(ask: Ask, facts: HostFacts) -> None:
    for one in judge(facts, ask, waived=dict(ask.waived)).stopping:
        if one.id not in _OF_RUNS:
            raise LatentForgeError(f"preflight: {one.measured}", next=one.remedy, code=ExitCode.FAIL)
