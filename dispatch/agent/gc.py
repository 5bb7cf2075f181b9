"""What on this host nobody needs any more, judged by the state of runs and never by age, and its removal.

A run goes when it has ended, its products were collected, a later one stands in for it, and no run that stays names it.
Whatever lives, waits, is reserved, holds the device, or may still be wanted, stays with all that it names. Things are
renamed out of the way under the locks of those who use them, and deleted after that: a crash leaves nothing half alive.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

from . import exitrec, locks
from .cas import PART
from .durable import read_json, sync_folder
from .paths import SHA256, Root
from .protocol import BUSY, AgentError, Arguments
from .pulling import MODEL
from .state import derive

REMOVING = ".removing-"
_ENDED = ("finished", "lost", "interrupted")


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
        self.states = {name: derive(run) for name, run in self.runs.items()}
        self.launches = {name: read_json(run.launch) or {} for name, run in self.runs.items()}
        self.staying = self._staying_runs()
        self.live = [name for name in self.staying if self.states[name]["state"] not in _ENDED]
        self.words = json.dumps([[self.launches[n].get(k) for k in ("argv", "env")] for n in self.live])
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
            if state["state"] == "reserved" and not self.wishes.uncollected:
                staying[name] = "it is reserved: a launch may be under way"
            elif state["state"] not in (*_ENDED, "reserved", "absent"):
                staying[name] = f"it is {state['state']}"
            elif name == holder:
                staying[name] = "it holds the device lease"
            elif not self._brings(name) and not self._collected(name):
                staying[name] = "what it left was not collected"
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

    def _brings(self, name: str) -> bool:
        """Whether the run passed and its product lies elsewhere: it stays as long as that."""
        return name.startswith(("build-", "pull-")) and self.states[name]["outcome"] == "pass"

    def _collected(self, name: str) -> bool:
        """Whether the caller proved that it has what the run left: by the digest that the exit record vouches for."""
        if self.wishes.uncollected:
            return True
        recorded = (exitrec.read(self.runs[name].exit) or {}).get("artifacts")
        return recorded is not None and self.wishes.collected.get(name) == recorded

    def _latest(self) -> list[str]:
        """Of each kin the runs that passed last, as many as are to be kept."""
        kins: dict[str, list[str]] = {}
        for name, state in self.states.items():
            if state["state"] == "finished" and state["outcome"] == "pass" and not self._brings(name):
                kins.setdefault(str(self.launches[name].get("kin")), []).append(name)
        latest = []
        for names in kins.values():
            names.sort(key=lambda name: (float(self.states[name]["ended"] or 0.0), name), reverse=True)
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
        spec = (read_json(self.runs[name].identity) or {}).get("spec") or {}
        if name.startswith("build-"):
            return str((spec.get("build") or {}).get("name"))
        return str((spec.get("pull") or {}).get("model")).replace("/", "--")

    # --- what runs use ---

    def _models(self) -> None:
        named: dict[str, list[str]] = {}
        prefix = re.escape(f"{self.root.models}/")
        for name, launch in self.launches.items():
            text = json.dumps([launch.get("resolved"), launch.get("argv")], ensure_ascii=False)
            for model in {*re.findall(f"{prefix}({MODEL.pattern})", text), *self._pulling(name)}:
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
        spec = (read_json(self.runs[name].identity) or {}).get("spec") or {}
        model = (spec.get("pull") or {}).get("model") if name.startswith("pull-") else None
        return [str(model).replace("/", "--")] if model else []

    def _builds_and_environments(self) -> None:
        environments: set[str] = set()
        for room, folder in (("builds", self.root.builds), ("venvs", self.root.venvs)):
            names = _names(folder, re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*"))
            made = {name: (read_json(folder / name / ".complete.json") or {}) for name in names}
            order = sorted(names, key=lambda name: (float(made[name].get("made") or 0.0), name), reverse=True)
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
        running = _running_agents(self.root.agent)
        for file in _names(self.root.agent, re.compile(r"[0-9a-f]{64}\.pyz")):
            name = file.removesuffix(".pyz")
            if name == mine:
                self._stay("agent", name, "it is this laptop's")
            elif name in running:
                self._stay("agent", name, "a process runs from it")
            else:
                self._go("agent", name, self.root.agent / file, "nothing runs from it")

    def _leavings(self) -> None:
        for room in ("runs", "builds", "venvs", "models"):
            for name in _names(getattr(self.root, room), re.compile(re.escape(REMOVING) + ".*")):
                self._go("rest", f"{room}/{name}", getattr(self.root, room) / name, "its removal was interrupted")
        for name in _names(self.root.cas, re.compile(re.escape(PART) + ".*")):
            if not locks.held(self.root.cas / name):
                self._go("rest", f"cas/{name}", self.root.cas / name, "a sending that was cut, and not taken up again")

    def _is_locked(self, folder: Path, name: str) -> bool:
        return locks.held(folder / f".lock-{name}")

    def _go(self, room: str, name: str, path: Path, why: str) -> None:
        self.items.append({"room": room, "name": name, "bytes": size_of(path), "why": why})

    def _stay(self, room: str, name: str, why: str) -> None:
        self.kept.append({"room": room, "name": name, "why": why})


def survey(root: Root, wishes: Wishes, mine: str | None) -> dict[str, Any]:
    """What can go, and what stays and why; nothing is changed."""
    return Rubbish(root, wishes, mine).as_json()


def apply(root: Root, wishes: Wishes, mine: str | None, names: list[dict[str, Any]]) -> dict[str, Any]:
    """Remove of the named things those that still can go; answers what went, what did not, and how much came free."""
    shown = {(str(one.get("room")), str(one.get("name"))) for one in names}
    guard = locks.wait_for(root.reserve_lock, 30.0) if root.locks.is_dir() else None
    if guard is None:
        raise AgentError("busy", "a reservation or a launch has been going on for 30 s", next="try again", code=BUSY)
    removed: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    graves: list[tuple[Path, dict[str, Any]]] = []
    try:
        items = {(item["room"], item["name"]): item for item in Rubbish(root, wishes, mine).items}
        skipped += [
            {"room": room, "name": name, "why": "it is needed now, or gone"}
            for room, name in sorted(shown - set(items))
        ]
        for key, item in items.items():
            if key not in shown:
                continue
            grave = _out_of_the_way(root, item)
            if grave is None:
                skipped.append({"room": item["room"], "name": item["name"], "why": "somebody uses it now"})
            else:
                graves.append((grave, item))
        for room in ("runs", "builds", "venvs", "models", "cas", "agent"):
            if (folder := getattr(root, room)).is_dir():
                sync_folder(folder)
    finally:
        locks.release(guard)
    for grave, item in graves:
        if _delete(grave):
            removed.append(item)
        else:
            skipped.append({"room": item["room"], "name": item["name"], "why": f"what is left of it lies in {grave}"})
    return {"removed": removed, "skipped": skipped, "bytes": sum(item["bytes"] for item in removed)}


def _out_of_the_way(root: Root, item: dict[str, Any]) -> Path | None:
    """Rename a thing to a name that nobody looks for, while nobody can be using it; None where somebody is."""
    room, name = item["room"], item["name"]
    if room == "rest":
        return Path(root.dir, name)
    if room in ("cas", "agent"):
        folder = Path(getattr(root, room))
        path = folder / (name if room == "cas" else f"{name}.pyz")
        return _renamed(path, folder)
    if room == "runs":
        run = root.run(name)
        try:
            lock = locks.take(run.lock, patience=0.2)
        except FileNotFoundError:
            return None
        if lock is None:
            return None
        try:
            # Every process of a run holds its lock, and a launch waits for the lock that this removal holds.
            return _renamed(run.dir, root.runs)
        finally:
            locks.release(lock)
    folder = Path(getattr(root, room))
    with open(folder / f".lock-{name}", "w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        return _renamed(folder / name, folder)


def _renamed(path: Path, folder: Path) -> Path | None:
    grave = folder / f"{REMOVING}{path.name}-{os.urandom(4).hex()}"
    try:
        os.rename(path, grave)
    except FileNotFoundError:
        return None
    return grave


def _delete(path: Path) -> bool:
    """Delete a file or a tree, folders that may not be written to as well; whether all of it is gone."""
    if path.is_dir() and not path.is_symlink():
        for parent, folders, _files in os.walk(path):
            for name in [".", *folders]:
                inside = os.path.join(parent, name)
                if not os.path.islink(inside):
                    os.chmod(inside, stat.S_IRWXU)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not os.path.lexists(path)


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


def _running_agents(folder: Path) -> set[str]:
    """The digests of the agents that processes run from, as far as this user may see."""
    found: set[str] = set()
    pattern = re.compile(re.escape(os.fsencode(f"{folder}/")) + rb"([0-9a-f]{64})\.pyz")
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found |= {one.decode() for one in pattern.findall(Path("/proc", name, "cmdline").read_bytes())}
            except OSError:
                continue
    return found
