"""Reservations: a run directory appears whole or not at all; only one that never started may be changed or removed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from . import exitrec, journal, locks
from .durable import read_json, sync_folder, write_file
from .paths import Root, RunPaths
from .protocol import AgentError

_LARGEST_ARGUMENT = 128 * 1024 - 1  # MAX_ARG_STRLEN of Linux, with its final NUL
_RESERVING = ".reserving-"
_REMOVING = ".removing-"


def reserve(
    root: Root, run_id: str, identity: str, launch: dict[str, Any], secrets: dict[str, Any] | None = None
) -> bool:
    """Make the run directory, or bring its launch up to date while it has not started; True when it was made now."""
    run = root.run(run_id)
    data = check_identity(run.id, identity)
    check_launch(run.id, launch)
    given = check_secrets(run.id, launch, secrets or {})
    root.create()
    guard = locks.wait_for(root.reserve_lock, 30.0)
    if guard is None:
        raise AgentError("busy", "another reservation has been going on for 30 s", next="try again", code=7)
    try:
        _sweep(root.runs)
        if run.dir.exists():
            _update(run, data, launch, given)
            return False
        try:
            _make(root.runs, run, data, launch, given)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise AgentError(
                    "disk-full",
                    f"no space on {root.dir} for the run directory of {run.id}",
                    next="free some space on the host",
                ) from None
            raise
        return True
    finally:
        locks.release(guard)


def check_identity(run_id: str, identity: str) -> bytes:
    """The identity's bytes, when their digest is the one in the run id and they name its kind; refused otherwise."""
    try:
        data = identity.encode("utf-8")
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AgentError("refused", f"identity of {run_id} is not JSON in UTF-8: {error}") from None
    kind, _, digest = run_id.rpartition("-")
    found = hashlib.sha256(data).hexdigest()
    if found[: len(digest)] != digest:
        raise AgentError("refused", f"identity of {run_id} has sha256 {found[:20]}…, which is another run's id")
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise AgentError("refused", f"identity of {run_id} does not say kind={kind!r}")
    return data


def check_launch(run_id: str, launch: dict[str, Any]) -> None:
    """Refuse a launch description that could not be executed exactly as it is written."""
    if launch.get("run") != run_id:
        raise AgentError("refused", f"launch.json names run={launch.get('run')!r}, not {run_id}")
    argv, env, lease = launch.get("argv"), launch.get("env"), launch.get("lease", [])
    if not isinstance(argv, list) or not argv or not all(isinstance(item, str) for item in argv) or not argv[0]:
        raise AgentError("refused", f"argv={argv!r} of {run_id} is not a list of strings that begins with a program")
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise AgentError("refused", f"env={env!r} of {run_id} does not map names to strings")
    for name in env:
        if not name or "=" in name:
            raise AgentError("refused", f"env of {run_id} has the impossible name {name!r}")
    for text in [*argv, *(f"{name}={value}" for name, value in env.items())]:
        if "\0" in text:
            raise AgentError("refused", f"{text!r} of {run_id} contains a NUL character, which no program can be given")
        if len(os.fsencode(text)) > _LARGEST_ARGUMENT:
            raise AgentError("refused", f"{text[:40]!r}… of {run_id} is longer than {_LARGEST_ARGUMENT} bytes")
    if not isinstance(lease, list) or any(name != "device" for name in lease):
        raise AgentError("refused", f"lease={lease!r} of {run_id} is not [] or ['device']")
    restarts = launch.get("restarts", 0)
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise AgentError("refused", f"restarts={restarts!r} of {run_id} is not a number of restarts")
    for name in ("memory_floors", "disk_floors"):
        _check_floors(run_id, name, launch.get(name))


def _check_floors(run_id: str, name: str, floors: Any) -> None:
    if floors is None:
        return
    if not isinstance(floors, dict) or not set(floors) <= {"warn", "kill"}:
        raise AgentError("refused", f"{name}={floors!r} of {run_id} is not an object with warn and kill")
    for key, value in floors.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise AgentError("refused", f"{name}.{key}={value!r} of {run_id} is not a number of bytes (0: never)")


def check_secrets(run_id: str, launch: dict[str, Any], secrets: dict[str, Any]) -> bytes | None:
    """The secrets as they will lie beside the run; refused, without a value in the message, where they do not fit."""
    names = launch.get("secrets", [])
    if not isinstance(names, list) or sorted(names) != sorted(secrets):
        raise AgentError("refused", f"{run_id} names the secrets {names!r}, but was given {sorted(secrets)!r}")
    if not secrets:
        return None
    for name, value in secrets.items():
        if not name or "=" in name or "\0" in name or name in launch["env"]:
            raise AgentError("refused", f"secret {name!r} of {run_id} cannot be the name of one more variable")
        if not isinstance(value, str) or not value or "\0" in value or len(os.fsencode(value)) > _LARGEST_ARGUMENT - 64:
            raise AgentError("refused", f"the value of secret {name!r} of {run_id} can be given to no program")
    return json.dumps(secrets, sort_keys=True).encode() + b"\n"


def never_started(run: RunPaths) -> bool:
    """Whether no process of this run has ever existed; meaningful to whoever holds its lock."""
    return journal.read(run).started is None and exitrec.read(run.exit) is None


def remove(run: RunPaths) -> None:
    """Take a reservation away in one step; the caller holds its lock and has seen that it never started."""
    grave = run.dir.with_name(f"{_REMOVING}{run.id}-{os.urandom(4).hex()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(run.dir, grave)
        sync_folder(grave.parent)
        shutil.rmtree(grave, ignore_errors=True)


def _make(runs: Path, run: RunPaths, identity: bytes, launch: dict[str, Any], secrets: bytes | None) -> None:
    cradle = runs / f"{_RESERVING}{run.id}-{os.urandom(4).hex()}"
    cradle.mkdir(mode=0o700)
    try:
        write_file(cradle / run.identity.name, identity, mode=0o400)
        write_file(cradle / run.launch.name, _launch_bytes(launch))
        if secrets is not None:
            write_file(cradle / run.secrets.name, secrets, mode=0o600)
        (cradle / run.lock.name).touch(mode=0o600)
        for name in (run.exit.name, run.beat.name):
            exitrec.preallocate(cradle / name)
        (cradle / run.out.name).mkdir(mode=0o700)
        sync_folder(cradle)
        os.rename(cradle, run.dir)
        sync_folder(runs)
    except BaseException:
        shutil.rmtree(cradle, ignore_errors=True)
        raise


def _update(run: RunPaths, identity: bytes, launch: dict[str, Any], secrets: bytes | None) -> None:
    if run.identity.read_bytes() != identity:
        raise AgentError(
            "refused",
            f"{run.id} on this host has another identity with the same first 20 digits",
            next="compare the two identity.json files",
        )
    if read_json(run.launch) == launch and secrets is None:
        return
    lock = locks.take(run.lock)
    if lock is None:
        return  # queued or running: what it was launched with stays
    try:
        if never_started(run):
            write_file(run.launch, _launch_bytes(launch))
            if secrets is not None:
                write_file(run.secrets, secrets, mode=0o600)
    finally:
        locks.release(lock)


def _launch_bytes(launch: dict[str, Any]) -> bytes:
    return json.dumps(launch, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _sweep(runs: Path) -> None:
    """Finish removals and drop half-made reservations of agents that died; the reserve lock keeps the living out."""
    for name in os.listdir(runs):
        if name.startswith((_RESERVING, _REMOVING)):
            shutil.rmtree(runs / name, ignore_errors=True)
