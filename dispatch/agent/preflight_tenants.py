"""Who else uses the device: the driver's list, the holders of its files, and model servers in the process table.

On a GB10 the driver's list may be empty while a server sits on the memory, so no single answer is believed.
"""

from __future__ import annotations

import os
import pwd
import re
from typing import Any

from . import locks
from .paths import Root
from .processes import boot_clock, descendants, look, name_of, table

_SHOWN = 160
_SERVERS = re.compile(
    r"(^|[/:\s.-])(EngineCore\S*|ollama|llama-server|sglang(::\S+)?|vllm(::\S+)?|tritonserver|trtllm-serve|"
    r"text-generation-(server|launcher|router)|lmdeploy|koboldcpp)($|[\s.])",
    re.IGNORECASE,
)
_INTERPRETERS = re.compile(r"^(python[\d.]*|pypy[\d.]*|bash|sh|uv|node)$")
_SECRET = re.compile(r"(?i)((?:key|token|secret|password|passwd|credential)s?[= ])\S+")


def tenants(root: Root) -> dict[str, Any]:
    """Every process that has a device file open or is a model server, with owner, age and command; and how many
    processes could not be looked into."""
    processes = table()
    holder = locks.holder(root.device_lock)
    ours = {os.getpid(), os.getppid()}
    if holder and isinstance(holder.get("pid"), int):
        ours |= {holder["pid"]} | descendants(holder["pid"], processes)
    found, unseen = [], 0
    for pid in sorted(processes):
        if pid in ours or not processes[pid].alive:
            continue
        why = []
        devices = _devices(pid)
        if devices is None:
            unseen += 1
        elif devices:
            why.append("holds " + ", ".join(devices[:3]))
        words = _words(pid)
        if _is_server(words):
            why.append("is a model server")
        if why:
            found.append({**describe(pid), "why": why})
    return {
        "processes": found,
        "unseen": unseen,
        "devices": any(name.startswith("nvidia") and name[6:].isdigit() for name in _listed("/dev")),
        "lease": holder,
        "ours": sorted(ours),
    }


def describe(pid: int) -> dict[str, Any]:
    """One process for a reader: owner, age in seconds, and its command with what looks like a secret masked."""
    words = _words(pid)
    process = look(pid)
    try:
        uid: int | None = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        uid = None
    age = None
    if process is not None:
        age = max(0.0, boot_clock() - process.ticks / os.sysconf("SC_CLK_TCK"))
    command = _SECRET.sub(r"\1***", " ".join(words)) or f"[{name_of(pid) or 'gone, or in another namespace'}]"
    return {"pid": pid, "uid": uid, "owner": _user(uid), "age": age, "command": command[:_SHOWN], "name": name_of(pid)}


def _devices(pid: int) -> list[str] | None:
    """The GPU's device files that a process has open; None where it may not be looked into."""
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        return None
    except OSError:
        return []
    held = set()
    for fd in fds:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("/dev/nvidia"):
            held.add(target)
    return sorted(held)


def _is_server(words: list[str]) -> bool:
    """Whether a command line starts a model server; a mention of one further along (an editor, a search) does not."""
    if not words:
        return False
    if _SERVERS.search(words[0].rpartition("/")[2]):
        return True
    if not _INTERPRETERS.match(words[0].rpartition("/")[2].split(" ")[0]):
        return False
    rest = words[1:]
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        if rest[0] == "-c":
            return False
        rest = rest[1:]
    if rest[:1] == ["-m"]:
        return bool(rest[1:] and _SERVERS.search(rest[1]))
    return bool(rest and _SERVERS.search(rest[0].rpartition("/")[2]))


def _words(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [word.decode("utf-8", "replace") for word in file.read(4096).split(b"\0") if word]
    except OSError:
        return []


def _user(uid: int | None) -> str | None:
    if uid is None:
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
