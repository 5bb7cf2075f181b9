"""How things stand: hosts, runs, and the end of one that is cancelled."""

from __future__ import annotations

import getpass
import json
from collections.abc import Sequence

from dispatch.agent.cancelling import LONGEST_GRACE
from dispatch.conclude import earned_code
from dispatch.following.view import duration
from dispatch.hosts.facts import RunState
from dispatch.hosts.inventory import LOCAL, Inventory, short_type
from dispatch.places import Places
from dispatch.planning.choice import told_end
from dispatch.records import Record
from dispatch.transport.call import Transport
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.errors import LatentForgeError, RefusedError, UnknownOutcomeError
from latentforge.verdicts import ExitCode


def print_hosts(inventory: Inventory, *, as_json: bool) -> ExitCode:
    """List the inventory; asks no host."""
    if as_json:
        print(
            json.dumps({name: host.model_dump(mode="json") for name, host in sorted(inventory.hosts.items())}, indent=2)
        )
        return ExitCode.PASS
    rows = [(LOCAL, "this machine", "")]
    for name, host in sorted(inventory.hosts.items()):
        where = (f"{host.user}@" if host.user else "") + host.address + (f":{host.port}" if host.port else "")
        keys = ", ".join(f"{short_type(key.type)} {key.sha256} pinned {key.date}" for key in host.keys[:1])
        where += (" GB10" if host.gb10 else "") + (f" link {host.link}" if host.link else "")
        rows.append((name, where, keys or "no key pinned"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for row in rows:
        mark = "  (default)" if row[0] == inventory.default else ""
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}{mark}".rstrip())
    for lane, names in inventory.lanes.items():
        print(f"--lanes {lane}  {', '.join(names)}")
    return ExitCode.PASS


def print_standing(places: Places, records: Sequence[Record], *, as_json: bool, single: bool = False) -> ExitCode:
    """Ask each host once for the states of its runs; a host that does not answer is told, and hides no other."""
    inventory = Inventory.load(places)
    states: dict[str, RunState] = {}
    silent: dict[str, str] = {}
    hosts = {(one.host, one.root, one.user): one for one in records}
    for (name, root, user), sample in hosts.items():
        mine = [one.run for one in records if (one.host, one.root, one.user) == (name, root, user)]
        try:
            transport = open_transport(sample.at_host(inventory.get(name)), places, readonly=True)
            try:
                found = call(transport, "status", {"runs": mine}).result
            finally:
                transport.close()
            states |= {run: RunState.model_validate(state) for run, state in found.items()}
        except LatentForgeError as error:
            silent |= {run: str(error).splitlines()[0] for run in mine}
    if as_json:
        known = {run: state.model_dump(mode="json") for run, state in states.items()}
        print(json.dumps({"runs": known, "unreachable": silent}, indent=2))
    else:
        for one in records:
            print(_line(one, states.get(one.run), silent.get(one.run)))
        if not records:
            print("no run was dispatched from this laptop yet.   next:  latentforge dispatch go smoke")
    if silent:
        return ExitCode.UNKNOWN
    if not single:
        return ExitCode.PASS
    state = states[records[0].run]
    if not (state.going_on or state.has_ended):
        return ExitCode.UNKNOWN  # absent, or reserved and never started: it earned nothing, and nobody crashed
    return ExitCode.PASS if state.going_on else earned_code(state)


def _line(record: Record, state: RunState | None, silent: str | None) -> str:
    head = f"{record.run:<30}  {record.host:<10}"
    if state is None:
        return f"{head}  UNKNOWN  {silent}"
    if state.has_ended:
        return f"{head}  {told_end(state)}" + (f"  {duration(state.seconds)}" if state.seconds is not None else "")
    took = f"  {duration(state.seconds)}" if state.seconds is not None else ""
    return f"{head}  {state.state}{took}" + (f"  ({why})" if (why := state.reason or state.warning) else "")


def cancel_run(transport: Transport, run: str, *, grace: float | None, known: bool = True) -> ExitCode:
    """Cancel a run and say what is left of it; exit code 0 once nothing of it is alive.

    Without ``grace`` it has the seconds that it was promised. One that is not there is refused where it is ``known`` to
    have been.
    """
    transport.install()
    args = {"run": run, "by": getpass.getuser(), **({} if grace is None else {"grace": grace})}
    done = call(transport, "cancel", args, timeout=(LONGEST_GRACE if grace is None else grace) + 60.0).result
    state = RunState.model_validate(done["state"])
    if known and state.state == "absent" and done["did"] == "nothing":
        raise RefusedError(
            f"{run} is not on {transport.host.name}: it never was, or was cleaned up; nothing was ended",
            next="latentforge dispatch status   lists the runs that this laptop knows",
        )
    if done["survivors"] or state.going_on:
        raise UnknownOutcomeError(
            f"{run} is still {state.state}: processes {done['survivors']} did not end by TERM, a grace and KILL",
            next=f"latentforge dispatch cancel {run}",
        )
    words = {"nothing": "there was nothing to end", "removed": "it was taken out before it started", "ended": "ended"}
    end = f" ({told_end(state)})" if state.has_ended else ""
    print(f"{run}  {words.get(done['did'], done['did'])}{end}")
    return ExitCode.PASS
