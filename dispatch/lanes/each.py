"""One piece of work on each of several hosts at once: a connection a host, and every result a value."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dispatch.conclude import worst
from dispatch.hosts.inventory import Host
from latentforge.errors import LatentForgeError
from latentforge.verdicts import ExitCode

Value = TypeVar("Value")

AT_ONCE = 8
"""Hosts that are worked on at the same time; the others wait for their turn."""


@dataclass(frozen=True)
class HostResult(Generic[Value]):
    """What came of the work on one host: a value, or the error that stands for it; never an exception of another's."""

    host: str
    value: Value | None
    error: LatentForgeError | None
    seconds: float

    @property
    def code(self) -> ExitCode:
        """The exit code of this host alone: that of its error, or of a value that has one of its own."""
        if self.error is not None:
            return self.error.code
        return ExitCode(getattr(self.value, "code", ExitCode.PASS))


def each(
    hosts: Sequence[Host],
    work: Callable[[Host], Value],
    *,
    tell: Callable[[HostResult[Value]], None] = lambda _: None,
) -> dict[str, HostResult[Value]]:
    """Do the work on every host; ``tell`` hears of each as it ends. The results are in the order of the hosts.

    A host that fails, or is slow, holds up no other. Ctrl-C passes through at once: the threads are left to the end of
    the process.
    """
    ended: queue.SimpleQueue[HostResult[Value]] = queue.SimpleQueue()
    turns = threading.BoundedSemaphore(AT_ONCE)

    def one(host: Host) -> None:
        with turns:
            begin = time.monotonic()
            value, error = None, None
            try:
                value = work(host)
            except LatentForgeError as failed:
                error = failed
            except BaseException as failed:
                what = f"{host.name}: unexpected {type(failed).__name__}: {failed}"
                error = LatentForgeError(what, code=ExitCode.CRASHED)
            ended.put(HostResult(host.name, value, error, time.monotonic() - begin))

    for host in hosts:
        threading.Thread(target=one, args=(host,), name=f"host {host.name}", daemon=True).start()
    found: dict[str, HostResult[Value]] = {}
    for _ in hosts:
        result = ended.get()
        found[result.host] = result
        tell(result)
    return {host.name: found[host.name] for host in hosts}


def worst_code(results: Mapping[str, HostResult[Any]]) -> ExitCode:
    """The exit code of a command that asked several hosts: the worst of theirs."""
    return worst([result.code for result in results.values()])


def results_json(results: Mapping[str, HostResult[Any]], value: Callable[[Any], Any]) -> dict[str, Any]:
    """The results for programs, keyed by host."""
    told: dict[str, Any] = {}
    for host, one in results.items():
        told[host] = {"code": int(one.code), "seconds": round(one.seconds, 3)}
        if one.error is not None:
            told[host] |= {"error": str(one.error), "next": one.error.next}
        else:
            told[host]["value"] = value(one.value)
    return {"hosts": told, "code": int(worst_code(results))}


def results_table(results: Mapping[str, HostResult[Any]], row: Callable[[Any], str]) -> list[str]:
    """The results for people, a host a line; what to do next stands below the host that needs it."""
    width = max(len(host) for host in results)
    lines = []
    for host, one in results.items():
        if one.error is None:
            lines += [
                f"{host if number == 0 else '':<{width}}  {line}"
                for number, line in enumerate(row(one.value).splitlines() or [""])
            ]
            continue
        first, *more = str(one.error).splitlines() or [""]
        lines += [f"{host:<{width}}  error: {first}", *(f"{'':<{width}}  {line}" for line in more)]
        follow, *others = (one.error.next or "").splitlines() or [""]
        lines += [f"{'':<{width}}    next: {follow}"] if follow else []
        lines += [f"{'':<{width}}          {line}" for line in others]
    return lines
