"""The one question of a preflight: which facts, which actions; and the answer as facts, with the clocks compared."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from typing import Any

from dispatch.building.build import BuildNames
from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.planning.ask import Ask
from dispatch.preflight.facts import PreflightFacts
from dispatch.preflight.judge import GROUPS, IDS, RULES
from dispatch.transport.call import Transport
from dispatch.transport.link import LinkLostError
from dispatch.transport.retry import call
from latentforge.errors import RefusedError

SECONDS = 75.0
_ACTION_SECONDS = 180.0


def check_ids(names: Iterable[str]) -> frozenset[str]:
    """The ids of checks that were named; an unknown one is refused with the nearest."""
    import difflib

    for name in names:
        if name not in IDS:
            close = difflib.get_close_matches(name, IDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(IDS)
            raise RefusedError(f"there is no check {name!r}", next=hint)
    return frozenset(names)


def check_waivers(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """``CHECK=WHY`` of the command line; a check that is not there, or that has no reason, is refused."""
    waived = []
    for text in texts:
        name, _, why = text.partition("=")
        check_ids([name.strip()])
        if not why.strip():
            raise RefusedError(f"--waive {text!r} gives no reason", next=f"--waive {name.strip()}='why it may stay'")
        waived.append((name.strip(), why.strip()))
    return tuple(waived)


def question(
    host: Host,
    ask: Ask | None = None,
    *,
    only: frozenset[str] = frozenset(),
    also: frozenset[str] = frozenset(),
    act: bool = False,
) -> dict[str, Any]:
    """What to ask of the agent: all that only reads, or what ``only`` names, and what ``also`` names beside it.

    ``act`` permits what writes (verb ``preflight``, never ``probe``).
    """
    named = only | also
    rules = [rule for rule in RULES if not only or rule.id in named]
    groups = sorted({group for rule in rules for group in rule.groups}) if only else list(GROUPS)
    asked: dict[str, Any] = {"gb10": host.gb10}
    if act:
        actions = [rule.action for rule in rules if rule.action and (rule.scope == "every" or rule.id in named)]
        asked["actions"] = sorted(set(actions))
    if host.is_local:
        asked["python"] = sys.executable
    if ask is not None:
        spec = ask.spec
        asked["models"] = [one for one in (spec.teacher.model, spec.distill.student.init) if one is not None]
        if ask.bundle is None:
            groups = [group for group in groups if group != "capabilities"]  # the interpreter that runs this command
        else:
            names = BuildNames.of(ask)
            asked |= {"build": names.build, "venv": names.venv}
    # The agent takes an empty list for everything.
    return asked | {"groups": groups or ["none"]}


def seconds_for(asked: dict[str, Any]) -> float:
    """How long an answer may take."""
    return SECONDS + _ACTION_SECONDS * len(asked.get("actions", ()))


def facts_of(transport: Transport, verb: str, args: dict[str, Any], *, timeout: float) -> HostFacts:
    """Ask, and read the answer as facts, with the laptop's clock before and after."""
    with contextlib.suppress(LinkLostError):  # then the question itself connects, and says what is wrong
        transport.open()  # else the clocks would be compared over the time that logging in takes
    asked = time.time()
    answer = dict(call(transport, verb, args, timeout=timeout).result)
    heard = time.time()
    found = answer.pop("preflight", None)
    preflight = PreflightFacts.of(found, asked=asked, heard=heard) if found is not None else None
    return HostFacts.model_validate({**answer, "preflight": preflight})
