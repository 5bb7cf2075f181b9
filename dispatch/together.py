"""Several runs followed at once: one connection a host, each run's end a value that hides no other's."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dispatch.conclude import worst
from dispatch.following.limits import Limits
from dispatch.following.view import short
from dispatch.following.watching import PlainObserver
from dispatch.hosts.inventory import Host
from dispatch.places import Places
from dispatch.records import Record
from dispatch.session import Session
from dispatch.transport.call import Transport
from dispatch.transport.open import open_transport
from latentforge.errors import LatentForgeError
from latentforge.verdicts import ExitCode

if TYPE_CHECKING:
    from dispatch.following.live import Screen

CHANNELS = 8
"""Runs that share a connection: a server allows ten sessions on one, and each run may need a second for a moment."""


@dataclass(frozen=True)
class Target:
    """A run and the host that holds it."""

    record: Record
    host: Host


def watch_together(
    targets: Sequence[Target], places: Places, *, adjust: Callable[[Limits], Limits] = lambda limits: limits
) -> ExitCode:
    """Follow every run to its end; the exit code is the worst of theirs, in the order of ``worst``."""
    plain = not sys.stdout.isatty() or os.environ.get("TERM") == "dumb"
    screen = None if plain else _screen()
    turns = threading.Lock()

    def tell(text: str) -> None:
        # Whole lines, one speaker at a time, above whatever stands on the screen.
        with turns:
            if screen is None:
                print(text, flush=True)
            else:
                screen.console.print(text, markup=False)

    transports = _transports(targets, places)
    codes: dict[str, ExitCode] = {}

    def follow(target: Target, transport: Transport) -> None:
        run = target.record.run
        whose = f"{short(run)}  "
        host = target.host.name
        observer = PlainObserver(host, prefix=whose) if screen is None else screen.observer(host)
        session = Session(
            transport, places, adjust=adjust, observer=observer, tell=lambda text: tell(_prefixed(whose, text))
        )
        try:
            codes[run] = session.watch(run, list(target.record.chain), target.record.context)
        except LatentForgeError as error:
            codes[run] = error.code
            tell(_prefixed(whose, f"error: {error}" + (f"\n  next: {error.next}" if error.next else "")))
        except Exception as error:
            codes[run] = ExitCode.CRASHED
            tell(_prefixed(whose, f"error: unexpected {type(error).__name__}: {error}"))

    threads = [
        threading.Thread(target=follow, args=(target, transport), daemon=True)
        for target, transport in zip(targets, transports, strict=True)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # in pieces: a join without an end would not hear Ctrl-C
    except KeyboardInterrupt:
        if screen is not None:
            screen.stop()
        left = [target.record.run for target in targets if target.record.run not in codes]
        print(f"\ndetached; {len(left)} runs go on.   back:  latentforge dispatch watch {' '.join(left)}", flush=True)
        return ExitCode.DETACHED
    finally:
        if screen is not None:
            screen.stop()
        for transport in {id(one): one for one in transports}.values():
            transport.close()
    for target in targets:
        run = target.record.run
        tell(f"{run}  {target.host.name}  exit {int(codes[run])} ({codes[run].name.lower()})")
    return worst(list(codes.values()))


def _screen() -> Screen:
    from dispatch.following.live import Screen  # rich is slow to import, and not needed in a pipe

    return Screen()


def _transports(targets: Sequence[Target], places: Places) -> list[Transport]:
    """A transport for each target: one for each host as it is reached, a further one for every eight runs there."""
    opened: dict[tuple[Host, int], Transport] = {}
    counts: dict[Host, int] = {}
    found = []
    for target in targets:
        number = counts.get(target.host, 0)
        counts[target.host] = number + 1
        key = (target.host, number // CHANNELS)
        if key not in opened:
            opened[key] = open_transport(target.host, places)
        found.append(opened[key])
    return found


def _prefixed(whose: str, text: str) -> str:
    return "\n".join(f"{whose}{line}" for line in text.splitlines())
