"""Enrolling a host: the only moment at which a key is accepted, and the user is the one who accepts it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import paramiko
from pydantic import ValidationError

from dispatch.hosts.address import Address, resolve
from dispatch.hosts.facts import Interpreter
from dispatch.hosts.inventory import Host, Inventory, check_name, problem, short_type
from dispatch.hosts.trust import check_fingerprint, fingerprint, offered_keys, pin, pinned
from dispatch.places import Places, writing
from dispatch.preflight.rules_run import PYTHON
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.errors import LatentForgeError, RefusedError
from latentforge.verdicts import ExitCode


def enrol(
    name: str,
    wanted: Mapping[str, Any],
    places: Places,
    inventory: Inventory,
    *,
    replace: bool,
    yes: bool,
    expected: str | None,
) -> ExitCode:
    """Fetch the host's keys, have them accepted, pin them, write the inventory, and try the connection.

    Exit code 6 where the host cannot be reached, or can be but does not let us in; the pin stays in the latter case.
    """
    check_name(name)
    earlier = inventory.hosts.get(name)
    host = _described(name, wanted, earlier)
    address = resolve(host)
    keys = offered_keys(host, address)
    if expected is not None:
        keys = check_fingerprint(keys, expected)
    known = {key.sha256 for key in earlier.keys} if earlier is not None else set()
    offered = {fingerprint(key) for key in keys}
    _show(host, address, keys, known)
    if known and not offered <= known and not replace:
        raise LatentForgeError(
            f"{name} is pinned to other keys ({', '.join(sorted(known))}) than it offers "
            f"({', '.join(sorted(offered))}); nothing was changed",
            next=f"if the machine was reinstalled:  latentforge dispatch enrol {name} --replace",
            code=ExitCode.TRANSPORT,
        )
    if offered != known and not (yes or expected is not None):
        _confirm(name)
    if {fingerprint(key) for key in pinned(host, places)} != offered:
        with writing():
            host = pin(host, keys, places)
    inventory.put(host)
    print(f"pinned in {places.known_hosts(name)}")
    return _tried(host, places)


def _described(name: str, wanted: Mapping[str, Any], earlier: Host | None) -> Host:
    base = earlier.model_dump(exclude={"name"}) if earlier is not None else {"address": name}
    wanted = dict(wanted)
    if (identity := wanted.get("identity")) and not identity.startswith("~"):
        wanted["identity"] = os.path.abspath(identity)  # kept for commands that start in other folders
    try:
        return Host.model_validate({"name": name, **base, **wanted})
    except ValidationError as error:
        field, wrong = problem(error)
        said = f"--{field} {wrong.removeprefix('= ')}" if field else wrong
        raise RefusedError(said, next="latentforge dispatch enrol --help") from None


def _show(host: Host, address: Address, keys: Sequence[paramiko.PKey], known: set[str]) -> None:
    print(f"{host.name} is {address} and offers")
    for key in keys:
        mark = "  (pinned)" if fingerprint(key) in known else ""
        print(f"  {short_type(key.get_name()):<8} {fingerprint(key)}{mark}")
    gone = [old for old in host.keys if old.sha256 not in {fingerprint(key) for key in keys}]
    if gone:
        print("and does not offer what is pinned")
    for one in gone:
        print(f"  {short_type(one.type):<8} {one.sha256}  ({one.date}, enrolled by you)")


def _confirm(name: str) -> None:
    if not sys.stdin.isatty():
        raise RefusedError(
            f"the keys of {name} were not confirmed, and there is no terminal to ask on",
            next=f"latentforge dispatch enrol {name} --fingerprint SHA256:…   (or --yes)",
        )
    print("Compare with the host's own:  ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub")
    try:
        answer = input("Are these the keys of your machine? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise RefusedError(f"the keys of {name} were not confirmed; nothing was changed")


def _tried(host: Host, places: Places) -> ExitCode:
    transport = open_transport(host, places, readonly=True)
    try:
        reply = call(transport, "probe", {})
    finally:
        transport.close()
    facts, again = reply.result, f"latentforge dispatch enrol {host.name}"
    print(
        f"logged in: {facts['host'].get('hostname')}, Python {facts['python']['version']}, state root {facts['root']}"
    )
    if reply.noise.strip():
        print("note: the login shell prints text before commands; it is skipped, but quiet is safer")
    if Interpreter.model_validate(facts["python"]).numbers < PYTHON:
        print("note: that Python is too old to build with; 3.11 or newer:  " + again + " --python PATH")
    print(f"next: latentforge dispatch go smoke --host {host.name}")
    return ExitCode.PASS
