"""What on this host nobody needs any more, judged by the state of runs and never by age; nothing is changed here.

A run goes when it has ended, its products were collected, a later one stands in for it, and no run that stays names it.
Whatever lives, waits, is reserved, holds the device, or may still be wanted, stays with all that it names. What cannot
be read is never taken for unneeded: a record that is damaged makes everything stay that it might have named.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from . import exitrec, journal, locks
from .cas import PART
from .durable import read_json
from .paths import SHA256, Root, RunPaths
from .processes import boot_id, is_alive
from .protocol import Arguments
from .pulling import MODEL
from .state import derive

REMOVING, BUILDING = ".removing-", ".building-"
_ENDED = ("finished", "lost", "interrupted")
# As builds and environments are named. Another folder beside them is not ours, whatever root somebody has set.
_BUILD, _VENV = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}"), re.compile(r"[0-9a-f]{16}")
_ROOMS = ("runs", "builds", "venvs", "models", "cas", "agent")


class Wishes:
    """What a caller wants kept, and what it can prove to have collected: run id → digest of its inventory."""

    def __init__(self, keep: int, uncollected: bool, collected: dict[str, Any]) -> None:
        self.keep = keep
        self.uncollected = uncollected
        self.collected = collected

    @classmethod
    def of(cls, args: Arguments) -> Wishes:
        """Take them from a request."""
        keep = int(args.number("keep", 1, low=0, high=1_000_000))
        return cls(keep, args.flag("uncollected"), args.table("collected"))


class Rubbish:
    """The verdict on everything under a root: what can go, and what stays, each with the reason."""

    def __init__(self, root: Root, wishes: Wishes, mine: str | None) -> None:
        self.root = root
        self.wishes = wishes
        self.items: list[dict[str, Any]] = []
        self.kept: list[dict[str, Any]] = []
        self.runs = {run.id: run for run in root.runs_present()}
        self.states = {name: _state_of(run) for name, run in self.runs.items()}
        damaged = {name for name, run in self.runs.items() if not _is_launch(read_json(run.launch))}
        self.launches = {
            name: {} if name in damaged else read_json(run.launch) or {} for name, run in self.runs.items()
        }
        self.staying = self._staying_runs()
        self.live = [name for name in self.staying if self.states[name]["state"] not in _ENDED]
        self.words = json.dumps([[self.launches[n].get(k) for k in ("argv", "env")] for n in self.live])
        self.blind = sorted(damaged & set(self.staying))
        self._models()
        self._builds_and_environments()
        self._runs()
        self._objects()
        self._agents(mine)
        self._leavings()

    def as_json(self) -> dict[str, Any]:
        """The verdict for the wire."""
        return {"items": self.items, "kept": self.kept, "bytes": sum(item["bytes"] for item in self.items)}

    # --- runs ---

    def _staying_runs(self) -> dict[str, str]:
        """Each run that stays whatever becomes of its products, and why; then those that it names."""
        holder = (locks.holder(self.root.device_lock) or {}).get("run")
        staying: dict[str, str] = {}
        for name, state in self.states.items():
            why = self._why_it_stays(name, state)
            if why is None and name == holder:
                why = "it holds the device lease"
            if why is None and not self._brings(name) and not self._follows(name):
                why = self._why_not_collected(name)
                if why is None and self.wishes.keep and state["state"] in _ENDED and not self._has_successor(name):
                    why = "it did not pass, and no later run of its kind and meaning did"
            if why is not None:
                staying[name] = why
        for name in self._latest():
            staying.setdefault(name, "it is the last that passed of its kind and meaning")
        todo = list(staying)
        while todo:
            name = todo.pop()
            for other in self._named_by(name):
                if other in self.runs and other not in staying:
                    staying[other] = f"{name}, which stays, names it"
                    todo.append(other)
        return staying

    def _why_it_stays(self, name: str, state: dict[str, Any]) -> str | None:
        """Why a run stays for what is going on with it, whatever was collected; None where nothing is."""
        run, what = self.runs[name], state["state"]
        if what == "unreadable":
            return f"its records cannot be read ({state['reason']})"
        if what == "reserved" and not self.wishes.uncollected:
            return "it is reserved: a launch may be under way"
        if what not in (*_ENDED, "reserved", "absent"):
            return f"it is {what}"
        if locks.held(run.lock):
            return "a process holds its lock"
        started = journal.read(run).started or {}
        if started.get("boot_id") == boot_id() and is_alive(started.get("pid"), started.get("ticks")):
            return f"its process {started['pid']} is alive"
        return None

    def _brings(self, name: str) -> bool:
        """Whether the run passed and its product lies elsewhere: it stays as long as that."""
        return name.startswith(("build-", "pull-")) and self.states[name]["outcome"] == "pass"

    def _follows(self, name: str) -> bool:
        """Whether the run took part in one of another host: its leader has all that came of it, it a mirror at most."""
        return name.startswith("follow-") and self.states[name]["state"] in _ENDED

    def _why_not_collected(self, name: str) -> str | None:
        """Why the caller cannot have all that a run left; None where it proved by digest that it has."""
        if self.wishes.uncollected:
            return None
        recorded = (exitrec.read(self.runs[name].exit) or {}).get("artifacts")
        if recorded is None or self.wishes.collected.get(name) != recorded:
            return "what it left was not collected"
        skipped = (read_json(self.runs[name].artifacts) or {}).get("skipped") or []
        return f"{len(skipped)} of its files could not be collected" if skipped else None

    def _has_successor(self, name: str) -> bool:
        """Whether the run passed itself (its kin decides then), or one of its kin passed after it had ended."""
        if self._passed(name):
            return True
        kin, end = self.launches[name].get("kin"), _time_of(self.states[name])
        return kin is not None and any(
            self._passed(other) and _time_of(self.states[other]) > end and self.launches[other].get("kin") == kin
            for other in self.states
        )

    def _passed(self, name: str) -> bool:
        state = self.states[name]
        return bool(state["state"] == "finished" and state["outcome"] == "pass")

    def _latest(self) -> list[str]:
        """Of each kin the runs that passed last, as many as are to be kept."""
        kins: dict[str, list[str]] = {}
        for name in self.states:
            if self._passed(name) and not self._brings(name) and not self._follows(name):
                kins.setdefault(str(self.launches[name].get("kin") or name), []).append(name)
        latest = []
        for names in kins.values():
            names.sort(key=lambda name: (_time_of(self.states[name]), name), reverse=True)
            latest += names[: self.wishes.keep]
        return latest

    def _named_by(self, name: str) -> set[str]:
        launch = self.launches[name]
        refs = [ref for ref in (launch.get("resolved") or {}).values() if isinstance(ref, dict)]
        return {str(ref["run"]) for ref in refs if "run" in ref} | {str(launch.get("predecessor") or "")}

    def _runs(self) -> None:
        products = {(item["room"], item["name"]) for item in self.items}
        kept_products = {item["name"] for item in self.kept if item["room"] in ("builds", "models")}
        for name, run in self.runs.items():
            brought = self._product(name)
            if name in self.staying:
                self._stay("runs", name, self.staying[name])
            elif brought is not None and brought in kept_products:
                self._stay("runs", name, f"{brought}, which stays, is its product")
            else:
                state = self.states[name]
                gone = "its product goes" if ("builds", brought) in products else "its product is gone"
                why = gone if brought else f"{state['state']}, {state['outcome'] or 'never started'}"
                why += "" if brought else "; collected" if name in self.wishes.collected else "; not collected"
                self._go("runs", name, run.dir, why)

    def _product(self, name: str) -> str | None:
        """The build or the model that a run brought."""
        if not self._brings(name):
            return None
        if name.startswith("build-"):
            return self._asked(name, "build", "name")
        return self._asked(name, "pull", "model")

    def _asked(self, name: str, what: str, field: str) -> str | None:
        """A field of what a run of our own kinds was asked for, as the name of its folder."""
        found: Any = read_json(self.runs[name].identity) or {}
        for key in ("spec", what, field):
            found = found.get(key) if isinstance(found, dict) else None
        return found.replace("/", "--") if isinstance(found, str) else None

    # --- what runs use ---

    def _models(self) -> None:
        named: dict[str, list[str]] = {}
        for name, launch in self.launches.items():
            text = json.dumps([launch.get(k) for k in ("resolved", "argv", "env")], ensure_ascii=False)
            # By its own name, whatever the root was called by whoever reserved the run.
            for model in {*re.findall(f"/({MODEL.pattern})(?![0-9A-Za-z])", text), *self._pulling(name)}:
                named.setdefault(model, []).append(name)
        for model in _names(self.root.models, MODEL):
            users = [name for name in named.get(model, []) if name in self.staying]
            trained = [name for name in named.get(model, []) if not name.startswith("pull-")]
            if users:
                self._stay("models", model, f"{users[0]}, which stays, names it")
            elif not trained and self.wishes.keep:
                self._stay("models", model, "no run has used it yet")
            else:
                self._go("models", model, self.root.models / model, "no run that stays names it")

    def _pulling(self, name: str) -> list[str]:
        """The model of a pull that is reserved or goes on."""
        model = self._asked(name, "pull", "model") if name.startswith("pull-") else None
        return [model] if model else []

    def _builds_and_environments(self) -> None:
        environments: set[str] = set()
        for room, folder, pattern in (("builds", self.root.builds, _BUILD), ("venvs", self.root.venvs, _VENV)):
            names = _names(folder, pattern)
            made = {name: (read_json(folder / name / ".complete.json") or {}) for name in names}
            order = sorted(names, key=lambda name: (_number(made[name].get("made")), name), reverse=True)
            latest = [name for name in order if made[name]][: self.wishes.keep]
            for name in names:
                if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", self.words):
                    why = "a run that is to start or goes on names it"
                elif name in latest:
                    why = "it was made last"
                elif name in environments:
                    why = "a build that stays needs it"
                elif self._is_locked(folder, name):
                    why = "it is being made"
                else:
                    self._go(room, name, folder / name, "no run needs it" if made[name] else "it was never finished")
                    continue
                self._stay(room, name, why)
                environments.add(Path(str(made[name].get("venv") or "")).name)

    def _objects(self) -> None:
        wanted = set(re.findall("[0-9a-f]{64}", self.words))
        for name in self.live:
            if name.startswith("pull-"):
                for sha256 in sorted(wanted):  # the list of a pull names the pieces that it is put together from
                    listed = self.root.object(sha256)
                    if listed.is_file() and listed.stat().st_size < 64 << 20:
                        wanted |= {one.decode() for one in re.findall(rb"[0-9a-f]{64}", listed.read_bytes())}
        for name in _names(self.root.cas, SHA256):
            if name in wanted:
                self._stay("cas", name, "a run that is to start or goes on names it")
            else:
                self._go("cas", name, self.root.cas / name, "no run needs it")

    def _agents(self, mine: str | None) -> None:
        running = _running_agents()
        for file in _names(self.root.agent, re.compile(r"[0-9a-f]{64}\.pyz")):
            name = file.removesuffix(".pyz")
            if name == mine:
                self._stay("agent", name, "it is this laptop's")
            elif name in running:
                self._stay("agent", name, "a process runs from it")
            else:
                self._go("agent", name, self.root.agent / file, "nothing runs from it")

    def _leavings(self) -> None:
        for room in _ROOMS:
            for name in _names(getattr(self.root, room), re.compile(re.escape(REMOVING) + ".*")):
                self._go("rest", f"{room}/{name}", getattr(self.root, room) / name, "its removal was interrupted")
        for name in _names(self.root.builds, re.compile(re.escape(BUILDING) + _BUILD.pattern)):
            if not self._is_locked(self.root.builds, name.removeprefix(BUILDING)):
                self._go("rest", f"builds/{name}", self.root.builds / name, "its build did not come to its end")
        for name in _names(self.root.cas, re.compile(re.escape(PART) + ".*")):
            if not locks.held(self.root.cas / name):
                self._go("rest", f"cas/{name}", self.root.cas / name, "a sending that was cut, and not taken up again")

    def _is_locked(self, folder: Path, name: str) -> bool:
        return locks.held(folder / f".lock-{name}")

    def _go(self, room: str, name: str, path: Path, why: str) -> None:
        blind = [run for run in self.blind if room in ("runs", "models") or run in self.live]
        owner = _owner(path)
        if blind and room not in ("agent", "rest"):
            self._stay(room, name, f"{blind[0]}, which stays, might name it: its launch.json cannot be read")
        elif owner not in (None, os.geteuid()):
            self._stay(room, name, f"it belongs to uid {owner}")
        else:
            self.items.append({"room": room, "name": name, "bytes": size_of(path), "why": why})

    def _stay(self, room: str, name: str, why: str) -> None:
        self.kept.append({"room": room, "name": name, "why": why})


def _state_of(run: RunPaths) -> dict[str, Any]:
    """The run's state; ``unreadable`` where what is there of it makes no sense."""
    try:
        return derive(run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {"state": "unreadable", "outcome": None, "ended": None, "started": None, "reason": repr(error)}


def _is_launch(launch: dict[str, Any] | None) -> bool:
    """Whether a launch description says what its run needs, as every one does that was reserved."""
    if launch is None or not isinstance(launch.get("resolved", {}), dict):
        return False
    return isinstance(launch.get("argv"), list) and isinstance(launch.get("env"), dict)


def _time_of(state: dict[str, Any]) -> float:
    return _number(state["ended"]) or _number(state["started"])


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _owner(path: Path) -> int | None:
    try:
        return os.lstat(path).st_uid
    except OSError:
        return None


def size_of(path: Path) -> int:
    """The bytes that a file or a tree takes up on its disk."""
    total = 0
    for parent, folders, names in os.walk(path):
        for name in [*names, *folders]:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:
                continue
    try:
        return total + os.lstat(path).st_blocks * 512
    except OSError:
        return total


def _names(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if pattern.fullmatch(name))
    except OSError:
        return []


def _running_agents() -> set[str]:
    """The digests of the agents that processes run from, as far as this user may see."""
    found: set[str] = set()
    # By whatever name of the root: another laptop may reach it through a link.
    pattern = re.compile(rb"/agent/([0-9a-f]{64})\.pyz")
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found |= {one.decode() for one in pattern.findall(Path("/proc", name, "cmdline").read_bytes())}
            except OSError:
                continue
    return found
