"""What a preflight asks of the operating system: the run root's file system, memory, clock, session.

It changes nothing: even the test of writing uses a file without a name, which leaves no trace in any folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import os
import stat
import sys
from pathlib import Path
from typing import Any

from .paths import Root, filesystem_of
from .processes import look, name_of, pids

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_READ_ONLY, _NOEXEC = 1, 8  # statvfs(3): ST_RDONLY, ST_NOEXEC
_MIB = 1 << 20


def storage(root: Root) -> dict[str, Any]:
    """The state root, or the nearest folder above it that exists: its file system, space, owner, and whether it takes a
    write."""
    base = next(path for path in (root.dir, *root.dir.parents) if path.exists())
    found, space = os.stat(base), os.statvfs(base)
    home = os.path.expanduser("~")
    return {
        "root": str(root.dir),
        "exists": base == root.dir,
        "base": str(base),
        "filesystem": filesystem_of(base),
        "owner": found.st_uid,
        "uid": os.geteuid(),
        "mode": stat.S_IMODE(found.st_mode),
        "writable": os.access(base, os.W_OK | os.X_OK),
        "read_only": bool(space.f_flag & _READ_ONLY),
        "noexec": bool(space.f_flag & _NOEXEC),
        "bytes_free": space.f_bavail * space.f_frsize,
        "bytes_total": space.f_blocks * space.f_frsize,
        # Some file systems make inodes as they are needed and answer 0 of 0.
        "inodes_free": space.f_favail if space.f_files else None,
        "unnamed": _unnamed(base),
        "home": home,
        "home_writable": os.access(home, os.W_OK),
    }


def _unnamed(folder: Path) -> str:
    """`ok` when 64 KiB written to a nameless file in the folder reach the disk; else the error's name."""
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None:
        return "unsupported"
    try:
        fd = os.open(folder, flag | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        unsupported = error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)
        return "unsupported" if unsupported else errno.errorcode.get(error.errno or 0, str(error.errno))
    try:
        os.write(fd, bytes(1 << 16))
        os.fsync(fd)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    finally:
        os.close(fd)
    return "ok"


def memory() -> dict[str, Any]:
    """`/proc/meminfo` in bytes, each swap with what is used of it, and swappiness."""
    lines = _text("/proc/meminfo").splitlines()
    numbers = {}
    for line in lines:
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            numbers[name] = int(words[0]) * 1024
    swaps = []
    for line in _text("/proc/swaps").splitlines()[1:]:
        words = line.split()
        if len(words) >= 4 and words[2].isdigit() and words[3].isdigit():
            swaps.append({"name": words[0], "size": int(words[2]) * 1024, "used": int(words[3]) * 1024})
    swappiness = _text("/proc/sys/vm/swappiness").strip()
    return {"numbers": numbers, "swaps": swaps, "swappiness": int(swappiness) if swappiness.isdigit() else None}


def clock() -> dict[str, Any]:
    """Whether the kernel holds its clock for synchronised (`timedatectl` asks the same); None where it cannot say."""
    synchronised = None
    with contextlib.suppress(OSError, AttributeError):
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
        synchronised = None if state < 0 else state != _TIME_ERROR
    return {"synchronised": synchronised}


def session(user: str) -> dict[str, Any]:
    """Lingering as logind keeps it, the protection of sshd from the OOM killer, and whether jobs are watched here."""
    systemd = os.path.isdir("/run/systemd/system")
    linger = os.path.exists(f"/var/lib/systemd/linger/{user}") if systemd else None
    return {
        "systemd": systemd,
        "linger": linger,
        "sshd": _sshd(),
        "watchdog": importlib.util.find_spec(f"{__package__}.watchdog") is not None,
    }


def _sshd() -> int | None:
    """`oom_score_adj` of the server that listens: the oldest sshd. Its children, the sessions, reset it."""
    named = (look(pid) for pid in pids() if name_of(pid) == "sshd")
    servers = sorted((one.ticks, one.pid) for one in named if one is not None)
    for _ticks, pid in servers[:1]:
        text = _text(f"/proc/{pid}/oom_score_adj").strip()
        with contextlib.suppress(ValueError):
            return int(text)
    return None


def platform() -> dict[str, Any]:
    """The names of the system, as its own files give them."""
    release: dict[str, str] = {}
    for line in _text("/etc/os-release").splitlines():
        name, _, value = line.partition("=")
        release[name] = value.strip("\"' ")
    dgx: dict[str, str] = {}
    for line in _text("/etc/dgx-release").splitlines():
        name, _, value = line.partition("=")
        dgx[name] = value.strip("\"' ")
    return {
        "arch": os.uname().machine,
        "kernel": os.uname().release,
        "id": release.get("ID"),
        "version": release.get("VERSION_ID"),
        "pretty": release.get("PRETTY_NAME"),
        "dgx": dgx.get("DGX_OTA_VERSION") or dgx.get("DGX_SWBUILD_VERSION"),
        "python": sys.executable,
    }


def caches() -> list[dict[str, Any]]:
    """The folders that compilers write to: where they are, on which file system, whether they can be written."""
    found = []
    for variable, default in (
        ("TRITON_CACHE_DIR", "~/.triton"),
        ("CUDA_CACHE_PATH", "~/.nv"),
        ("FLASHINFER_WORKSPACE_BASE", "~/.cache/flashinfer"),
        ("VLLM_CACHE_ROOT", "~/.cache/vllm"),
    ):
        path = Path(os.path.expanduser(os.environ.get(variable) or default))
        base = next(one for one in (path, *path.parents) if one.exists())
        found.append(
            {
                "variable": variable,
                "path": str(path),
                "filesystem": filesystem_of(base),
                "writable": os.access(base, os.W_OK) and not os.statvfs(base).f_flag & _READ_ONLY,
            }
        )
    return found


def reboot_wanted() -> bool:
    """Whether the system says that it waits for a restart."""
    return any(os.path.exists(f"{run}/reboot-required") for run in ("/run", "/var/run"))


def link() -> list[dict[str, Any]]:
    """Each port of an RDMA card with its state, network device and MTU."""
    found = []
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        device = port.parent.parent
        names = sorted(one.name for one in device.glob("device/net/*"))
        mtu = _text(f"/sys/class/net/{names[0]}/mtu").strip() if names else ""
        found.append(
            {
                "card": device.name,
                "port": port.name,
                "state": _text(str(port / "state")).strip(),
                "net": names[0] if names else None,
                "mtu": int(mtu) if mtu.isdigit() else None,
            }
        )
    return found


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MIB)
    except OSError:
        return ""
