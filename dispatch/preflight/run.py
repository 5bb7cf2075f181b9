"""`dispatch preflight`: one host or several at once, each asked once; a host that cannot be reached is a value too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dispatch.building.build import BuildNames
from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.places import Places
from dispatch.planning.ask import Ask
from dispatch.preflight.asking import facts_of, question, seconds_for
from dispatch.preflight.check import Report
from dispatch.preflight.judge import judge
from dispatch.preflight.show import render
from dispatch.transport.open import open_transport
from latentforge.errors import LatentForgeError
from latentforge.spec.pipeline import external_paths
from latentforge.verdicts import ExitCode


@dataclass(frozen=True)
class Wanted:
    """What is asked of every host: a pipeline (made into a request for each), checks by name, a server to try."""

    ask: Callable[[Host], Ask] | None = None
    only: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    """Checks that are done beside the others although they load the machine."""
    server: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """One host's report and facts, or the error that stood before it."""

    host: str
    report: Report | None
    facts: HostFacts | None
    error: LatentForgeError | None
    seconds: float

    @property
    def code(self) -> ExitCode:
        """The report's code, or the error's."""
        return self.report.code if self.report is not None else self.error.code if self.error else ExitCode.UNKNOWN

    def as_json(self) -> dict[str, Any]:
        """The answer for programs."""
        about = {"host": self.host, "seconds": round(self.seconds, 3), "code": int(self.code)}
        if self.report is not None:
            return self.report.as_json() | about
        assert self.error is not None
        return about | {"error": str(self.error), "next": self.error.next}


def preflight(host: Host, places: Places, wanted: Wanted) -> Answer:
    """Ask one host and judge what it answers. Beside facts, the root is written to; nothing stays."""
    begin = time.monotonic()
    try:
        ask = wanted.ask(host) if wanted.ask is not None else None
        asked = question(host, ask, only=wanted.only, also=wanted.also, act=True)
        if wanted.server is not None:
            asked["server"] = wanted.server
        args: dict[str, Any] = {"preflight": asked}
        if ask is not None and ask.bundle is not None:
            names = BuildNames.of(ask)
            args |= {"builds": [names.build], "venvs": [names.venv]}
        transport = open_transport(host, places)
        try:
            facts = facts_of(transport, "preflight", args, timeout=seconds_for(asked))
        finally:
            transport.close()
        if ask is not None and any("@" in one.path for one in external_paths(ask.spec)):
            from dispatch.pulling.pipeline import shapes_at_hub  # what speaks to hubs is slow to import

            facts = shapes_at_hub(external_paths(ask.spec), facts)
        named = wanted.only | wanted.also
        report = judge(facts, ask or host, asked=named)
        if wanted.only:
            report = report.only(named)
        return Answer(host.name, report, facts, None, time.monotonic() - begin)
    except LatentForgeError as error:
        return Answer(host.name, None, None, error, time.monotonic() - begin)


def preflight_all(hosts: Sequence[Host], places: Places, wanted: Wanted, *, as_json: bool) -> ExitCode:
    """Ask every host at once, print the answers in the order of the hosts, and give the gravest code."""
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        answers = list(pool.map(lambda host: preflight(host, places, wanted), hosts))
    if as_json:
        documents = [answer.as_json() for answer in answers]
        print(json.dumps(documents[0] if len(hosts) == 1 else {"hosts": documents}, indent=2))
    for answer in answers:
        if answer.report is not None and answer.facts is not None and not as_json:
            print(render(answer.report, answer.facts, seconds=answer.seconds))
        elif answer.error is not None and (len(hosts) > 1 or as_json):
            print(f"error: {answer.error}", file=sys.stderr)
        if len(hosts) > 1 and not as_json:
            print()
    if len(hosts) == 1 and answers[0].error is not None and not as_json:
        raise answers[0].error
    # 4 to 6 outrank 1: a host that was not reached is not a host that is unfit.
    return max((answer.code for answer in answers), key=int)
