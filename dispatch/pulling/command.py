"""``latentforge dispatch pull``: one model to one host, shown before it is done, told as a typed result."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatch.following.follow import Follower
from dispatch.following.watching import PlainObserver
from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.lanes.streams import host_stream
from dispatch.places import Places
from dispatch.pulling.folder import LocalFolder, list_folder
from dispatch.pulling.listing import Catalogue, endpoint_of
from dispatch.pulling.pull import PullChoice, Source, choose_pull, keep, perform, probe_models
from dispatch.pulling.refs import ModelRef, looks_like_path, parse_ref
from dispatch.session import Session
from dispatch.transport.call import Transport
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.errors import LatentForgeError, RefusedError
from latentforge.verdicts import ExitCode


@dataclass(frozen=True)
class Wanted:
    """What a user asks to be pulled: a model of a hub at a revision, or a folder of this laptop under a name."""

    ref: ModelRef | None
    folder: LocalFolder | None

    @classmethod
    def of(cls, source: str, name: str | None) -> Wanted:
        """Understand the words of the command line."""
        if looks_like_path(source):
            if name is None:
                raise RefusedError(
                    f"the folder {source} needs a name for its model on hosts",
                    next=f"latentforge dispatch pull {source} --name NAME",
                )
            return cls(None, LocalFolder(Path(source).expanduser(), name))
        if name is not None:
            raise RefusedError(f"--name {name!r} is for folders; {source!r} has its name from its hub")
        return cls(parse_ref(source), None)


def find(
    wanted: Wanted, transport: Transport, env: Mapping[str, str], say: Callable[[str], None]
) -> tuple[PullChoice, HostFacts]:
    """What is to be done on a host, with as few questions as it takes: none to the hub where the host has it all."""
    if wanted.folder is not None:
        source = Source(list_folder(wanted.folder), folder=wanted.folder)
        facts = probe_models(transport, [source.listing.ref], [source])
        return choose_pull(source, facts), facts
    ref = wanted.ref
    assert ref is not None
    if ref.pinned:
        facts = probe_models(transport, [ref], [])
        if facts.models[ref.folder].complete:
            return keep(ref, facts.models[ref.folder]), facts
    endpoint = endpoint_of(env)
    catalogue = Catalogue(endpoint, tell=say)
    ref = catalogue.pinned(ref)
    facts = probe_models(transport, [ref], [])
    if facts.models[ref.folder].complete:
        return keep(ref, facts.models[ref.folder]), facts
    source = Source(catalogue.files_of(ref), endpoint=endpoint)
    facts = probe_models(transport, [ref], [source])
    return choose_pull(source, facts), facts


@dataclass(frozen=True)
class Pulled:
    """A model as it is on a host after a pull: where, which bytes, and how many of them moved."""

    host: str
    choice: PullChoice
    dry_run: bool
    moved: int = 0
    detached: bool = False

    def line(self) -> str:
        """The result for people."""
        one = self.choice
        if self.dry_run:
            return f"{one.ref}  would {one.will}: {one.because}"
        if self.detached:
            return _left(one, "launched; it goes on by itself.")
        what = "no changes: nothing moved" if one.will == "keep" else f"{_size(self.moved)} moved"
        return f"{one.ref} is complete, {one.files} files, {_size(one.bytes)}; {what}\n  {one.path}"

    def as_json(self) -> dict[str, Any]:
        """The result for programs."""
        state = {"host": self.host, "dry_run": self.dry_run, "moved": self.moved}
        complete = not self.dry_run and not self.detached
        return {**self.choice.as_json(), **state, "complete": complete or self.choice.will == "keep"}


def pull_one(
    wanted: Wanted,
    transport: Transport,
    places: Places,
    env: Mapping[str, str],
    follower: Follower,
    *,
    dry_run: bool,
    say: Callable[[str], None],
    detach: bool = False,
) -> Pulled:
    """Show what would be pulled, and pull it unless that is all that was asked."""
    choice, facts = find(wanted, transport, env, say)
    name = transport.host.name
    for line in shown(choice, wanted, name):
        say(line)
    if dry_run or choice.will == "keep":
        return Pulled(name, choice, dry_run)
    state = perform(choice, facts, transport, places, follower, say=say, detach=detach)
    moved = _moved(choice, transport) if state is not None else 0
    return Pulled(name, choice, dry_run, moved, detached=state is None)


def pull_here(
    host: Host,
    wanted: Wanted,
    places: Places,
    env: Mapping[str, str],
    *,
    dry_run: bool,
    as_json: bool,
    detach: bool = False,
) -> ExitCode:
    """Pull to one host, followed in the terminal; Ctrl-C leaves the pull alone."""
    transport = open_transport(host, places, readonly=dry_run)
    session = Session(transport, places, json=as_json)
    try:
        done = pull_one(
            wanted, transport, places, env, session.follower, dry_run=dry_run, say=session.say, detach=detach
        )
    except KeyboardInterrupt:
        session.observer.close()
        run = session.follower.goal
        if run is None:
            session.say("\nstopped before the pull was launched; what was sent is found and kept by the same command")
        else:
            session.say(_where(run, "\ndetached; the pull goes on."))
        return ExitCode.DETACHED
    finally:
        session.observer.close()
        transport.close()
    session.say(done.line())
    if dry_run:
        session.say("nothing was changed (dry run).")
    if as_json:
        print(json.dumps(done.as_json(), indent=2))
    return ExitCode.PASS


def pulling(
    hosts: Sequence[Host], wanted: Wanted, places: Places, env: Mapping[str, str], *, dry_run: bool
) -> Callable[[Host], Pulled]:
    """The work that pulls to each of several hosts, its lines prefixed with the host's name."""
    width = max(len(host.name) for host in hosts)

    def work(host: Host) -> Pulled:
        stream = host_stream(host.name, sys.stderr, width)
        transport = open_transport(host, places, readonly=dry_run)
        try:
            follower = Follower(transport, places, PlainObserver(host.name, stream))
            say = functools.partial(print, file=stream)
            return pull_one(wanted, transport, places, env, follower, dry_run=dry_run, say=say)
        finally:
            transport.close()

    return work


def _left(choice: PullChoice, how: str) -> str:
    return _where(str(choice.run), how)


def _where(run: str, how: str) -> str:
    return f"{how}   back:  latentforge dispatch watch {run}     stop:  latentforge dispatch cancel {run}"


def shown(choice: PullChoice, wanted: Wanted, host: str) -> list[str]:
    """The choice for people: the commit that a branch was resolved to, and what would move."""
    lines = []
    if wanted.ref is not None and not wanted.ref.pinned:
        lines.append(f"{wanted.ref} is commit {choice.ref.revision} now; in a pipeline:  {choice.ref}")
    elif wanted.folder is not None:
        lines.append(f"{wanted.folder.path} is {choice.ref}; in a pipeline:  {choice.ref}")
    lines.append(f"  model  {choice.ref}  {choice.files} files, {_size(choice.bytes)}")
    if choice.source is not None and choice.source.listing.left_out:
        listing = choice.source.listing
        lines.append(f"         left out: {listing.left_out} files, {_size(listing.left_out_bytes)}, of other formats")
    lines.append(f"  host   {host}  {choice.path}")
    moves = f", {_size(choice.missing)} to move" if choice.will != "keep" else ""
    lines.append(f"  pull   {choice.will:<6}  {choice.because}{moves}")
    return lines


def _size(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _moved(choice: PullChoice, transport: Transport) -> int:
    """The bytes that the pull moved, by its own account; none where it left no account."""
    try:
        reply = call(transport, "fetch", {"run": choice.run, "path": "out/pulled.json"})
        content: dict[str, Any] = json.loads(reply.payload)
        return int(content["moved"])
    except (LatentForgeError, ValueError, KeyError):
        return 0
