"""The facts of a host, read without creating or changing anything on it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from . import folders, hardware, journal, locks, pulling, runner, wire
from .durable import read_json
from .paths import NAME, Root, expand, filesystem_of
from .preflight import Collection
from .protocol import AgentError, Arguments
from .state import clock, derive


def probe(root: Root, args: Arguments, agent: str | None = None, *, may_act: bool = False) -> dict[str, Any]:
    """Facts of the host, and the state of every run, path, build, environment and object that the plan asks about.

    `preflight` asks for the facts of a preflight too; only with `may_act` for what writes or loads the machine.
    """
    runs, kins, paths = args.rows("runs"), args.texts("kins"), args.rows("paths")
    builds, venvs, objects = args.texts("builds"), args.texts("venvs"), args.texts("cas")
    asks_runner, models = args.flag("runner"), args.texts("models")
    rubbish = args.table("gc") if args.has("gc") else None
    asked, link = args.table("preflight"), args.optional_text("link")
    args.done()
    gathering = Collection(root, asked, may_act=may_act) if asked else None
    states = {}
    for row in runs:
        run = root.run(row.get("id"))
        states[run.id] = derive(run)
    facts = {
        "root": str(root.dir),
        "root_exists": root.dir.is_dir(),
        "host": hardware.host(root.dir),
        "python": {"executable": sys.executable, "version": ".".join(str(part) for part in sys.version_info[:3])},
        "runs": states,
        "kin_runs": _kin(root, sorted({*kins, *(str(row["kin"]) for row in runs if row.get("kin"))})),
        "paths": {str(row.get("path")): _path(root, row) for row in paths},
        "builds": {name: _build(root.builds / _name(name)) for name in builds},
        "venvs": {name: _venv(root, name) for name in venvs},
        "cas": {sha256: root.object(sha256).is_file() for sha256 in objects},
        "models": {name: pulling.look(root, name) for name in models},
        **({"rsync": shutil.which("rsync")} if models else {}),
        **({"gc": _rubbish(root, rubbish, agent)} if rubbish is not None else {}),
        "lease": {"device": locks.holder(root.device_lock)},
        "state_filesystem": filesystem_of(root.dir),
        **({"runner": runner.facts(root)} if asks_runner else {}),
        **({"link": wire.wire(link)} if link is not None else {}),
        "clock": clock(),
    }
    return {**facts, "preflight": gathering.result()} if gathering is not None else facts


def _kin(root: Root, kins: list[str]) -> dict[str, list[dict[str, Any]]]:
    """For each kin (a run's identity without its code) the runs of it that this host holds."""
    found: dict[str, list[dict[str, Any]]] = {kin: [] for kin in kins}
    if not kins:
        return found
    for run in root.runs_present():
        kin = (read_json(run.launch) or {}).get("kin")
        if kin not in found:
            continue
        identity, state, launch = read_json(run.identity) or {}, derive(run), read_json(run.launch) or {}
        found[kin].append(
            {
                "id": run.id,
                "state": state["state"],
                "outcome": state["outcome"],
                "code": state["code"],
                "exit": state["exit"],
                "code_sha256": identity.get("code"),
                "attempt": identity.get("attempt"),
                "ended": state["ended"],
                # Under which boot and driver it ran: a canary vouches for no other.
                "boot_id": (journal.read(run).started or {}).get("boot_id"),
                "driver": (launch.get("host") or {}).get("driver"),
                # The hosts that it was launched over, where there are several.
                "hosts": (launch.get("world") or {}).get("hosts") or [],
            }
        )
    return found


def _rubbish(root: Root, asked: dict[str, Any], agent: str | None) -> dict[str, Any]:
    from .rubbish import Rubbish, Wishes

    wanted = Arguments("probe.gc", asked)
    wishes = Wishes.of(wanted)
    wanted.done()
    return Rubbish(root, wishes, agent).as_json()


def _path(root: Root, row: dict[str, Any]) -> dict[str, Any]:
    path, purpose, like = row.get("path"), row.get("purpose"), row.get("like")
    model, like_model = row.get("model"), row.get("like_model")
    if like_model is not None and pulling.look(root, like_model)["complete"]:
        like = str(pulling.files_of(root, like_model))
    if model is not None:
        found = pulling.look(root, model)
        if not found["complete"]:
            return {"ok": False, "reason": found["why"], "absent": True, "location": found["path"]}
        report = folders.inspect(
            found["path"], str(purpose), like, known=(found["sha256"], found["files"], found["bytes"])
        )
        return {**report, "location": found["path"]}
    if not isinstance(path, str) or not isinstance(purpose, str):
        raise AgentError("protocol", f"probe: paths holds {row!r}, which has no path and purpose")
    if like is not None and not isinstance(like, str):
        raise AgentError("protocol", f"probe: paths holds {row!r}, whose like is not a path")
    return folders.inspect(path, purpose, like)


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise AgentError("refused", f"{name!r} is not a plain name")
    return name


def _build(build: Path) -> bool:
    """Whether a build is there as it was marked: another file in the place of a compiled one makes it none."""
    made = read_json(build / ".complete.json")
    if made is None:
        return False
    for name, sha256 in (made.get("binaries") or {}).items():
        try:
            with open(build / "site" / name, "rb") as file:
                if folders.hash_stream(file, lambda: None)[0] != sha256:
                    return False
        except OSError:
            return False
    return True


def _venv(root: Root, name: str) -> bool:
    if name.startswith(("/", "~")):
        return os.access(expand(name, "venv") / "bin" / "python", os.X_OK)
    return (root.venvs / _name(name) / ".complete.json").is_file()
