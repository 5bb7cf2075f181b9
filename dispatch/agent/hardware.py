"""Machine, memory, disk and GPUs as the operating system names them; what it does not tell is None, never zero."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from pathlib import Path
from typing import Any

from . import bounded
from .processes import boot_id

_GPU_FIELDS = {
    "name": str,
    "uuid": str,
    "driver_version": str,
    "compute_cap": str,
    "memory.total": float,
    "memory.used": float,
    "utilization.gpu": float,
    "temperature.gpu": float,
    "power.draw": float,
}
_GPU_SECONDS = 15
_NOTHING = (
    "",
    "n/a",
    "not supported",
    "unknown error",
    "not available",
    "not found",
    "err!",
    "insufficient permissions",
)
#: Where nvidia-smi lies when a non-interactive login has a short PATH.
PROGRAM_PATHS = "/usr/bin:/usr/local/bin:/usr/lib/wsl/lib"


def host(root: Path) -> dict[str, Any]:
    """The `host` object of a probe: sizes in bytes, GPU memory in MiB, temperatures in degrees Celsius, power in W."""
    memory = meminfo()
    disk = _disk(root)
    gpus = _gpus()
    return {
        "hostname": platform.node(),
        "arch": platform.machine(),
        "os": _os_name(),
        "system": platform.system(),
        "kernel": platform.release(),
        "product": _line("/sys/class/dmi/id/product_name"),
        "cpu": _cpu(),
        "cores": _cores(),
        "boot_id": boot_id(),
        "machine_id_sha256": _machine_id(),
        "user": user(),
        "uid": os.getuid(),
        "home": os.path.expanduser("~"),
        "mem_total": memory.get("MemTotal"),
        "mem_available": memory.get("MemAvailable"),
        "swap_total": memory.get("SwapTotal"),
        "disk_free": disk[0],
        "inodes_free": disk[1],
        "gpus": gpus,
        "driver": next((gpu["driver_version"] for gpu in gpus if gpu["driver_version"]), None),
        "gpu_processes": _gpu_processes() if gpus else [],
    }


def _line(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0 \n") or None
    except OSError:
        return None


def _os_name() -> str:
    for line in (_line("/etc/os-release") or "").splitlines():
        name, _, value = line.partition("=")
        if name == "PRETTY_NAME":
            return value.strip("\"'")
    return platform.platform(terse=True)


def _cpu() -> str | None:
    fields: dict[str, str] = {}
    for line in (_line("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        return fields["model name"]
    if "CPU implementer" in fields:
        return f"ARM implementer {fields['CPU implementer']} part {fields.get('CPU part', 'unknown')}"
    return platform.processor() or None


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _machine_id() -> str | None:
    found = _line("/etc/machine-id")
    return hashlib.sha256(found.encode()).hexdigest() if found else None


def user() -> str:
    """The login name of this user, or the number where it has none."""
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return str(os.getuid())


def meminfo() -> dict[str, int]:
    """The sizes that /proc/meminfo names, in bytes; empty where there is none."""
    found = {}
    for line in (_line("/proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        parts = value.split()
        if len(parts) == 2 and parts[1] == "kB" and parts[0].isdigit():
            found[name] = int(parts[0]) * 1024
    return found


def _disk(root: Path) -> tuple[int | None, int | None]:
    while not root.exists() and root != root.parent:
        root = root.parent
    try:
        found = os.statvfs(root)
    except OSError:
        return None, None
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None


def _query(question: str) -> list[list[str]] | None:
    """Rows of nvidia-smi's answer; None when there is no such program or it failed."""
    answer = bounded.run(["nvidia-smi", question, "--format=csv,noheader,nounits"], _GPU_SECONDS)
    if answer["code"] != 0:
        return None
    return [[cell.strip() for cell in line.split(",")] for line in answer["out"].splitlines() if line.strip()]


def _gpus() -> list[dict[str, Any]]:
    """One object a GPU; GB10 answers N/A for its memory, which stays None."""
    found = []
    for row in _query("--query-gpu=" + ",".join(_GPU_FIELDS)) or []:
        if len(row) != len(_GPU_FIELDS):
            continue
        found.append({name: _value(cell, kind) for (name, kind), cell in zip(_GPU_FIELDS.items(), row, strict=True)})
    return found


def told(cell: str) -> str | None:
    """One cell, or None for each of the ways in which nvidia-smi says that it does not know."""
    kept = cell.strip()
    lost = kept.strip("[]").lower().startswith(("gpu is lost", "gpu requires reset", "gpu access blocked"))
    return None if lost or kept.strip("[]").lower() in _NOTHING else kept


def _value(cell: str, kind: type) -> Any:
    kept = told(cell)
    return kept if kept is None or kind is str else number(kept)


def number(cell: str) -> float | None:
    """A reading of nvidia-smi; None for what is none: `[N/A]`, `[Not Supported]`, `nan`."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _gpu_processes() -> list[dict[str, Any]] | None:
    rows = _query("--query-compute-apps=pid,process_name,used_memory")
    if rows is None:
        return None
    return [
        # A program's name may hold commas.
        {"pid": int(row[0]), "name": ", ".join(row[1:-1]), "memory": _value(row[-1], float)}
        for row in rows
        if len(row) >= 3 and row[0].isdigit()
    ]
