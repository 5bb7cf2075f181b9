"""External programs under a deadline that holds even when the program hangs inside a driver and cannot be killed."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from typing import Any

_KEPT = 256 << 10
_AFTER_KILL = 1.0
# A session without a login has a short PATH; what a look at a GPU host needs lies here.
_ALSO = ("/usr/local/cuda/bin", "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin", "/usr/lib/wsl/lib")


def find(program: str) -> str | None:
    """Where a program lies: by PATH first, then in the usual places; a path is taken as it is."""
    if "/" in program:
        return program if os.access(program, os.X_OK) else None
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(_ALSO))


class _Kept:
    """What is kept of a stream: its beginning; or its first line and each that matches, so that no end is cut off."""

    def __init__(self, wanted: re.Pattern[bytes] | None) -> None:
        self.bytes = bytearray()
        self._wanted, self._open, self._any = wanted, bytearray(), False

    def take(self, chunk: bytes) -> None:
        """More of the stream; empty at its end."""
        if self._wanted is None:
            self._keep(chunk)
            return
        *whole, rest = (bytes(self._open) + chunk).split(b"\n")
        self._open = bytearray(rest[:_KEPT])
        if not chunk and rest:
            whole, self._open = [rest], bytearray()
        for line in whole:
            if not self._any or self._wanted.search(line):
                self._any = True
                self._keep(line + b"\n")

    def _keep(self, more: bytes) -> None:
        self.bytes += more[: max(0, _KEPT - len(self.bytes))]


def run(
    argv: list[str], seconds: float, *, env: dict[str, str] | None = None, lines: re.Pattern[bytes] | None = None
) -> dict[str, Any]:
    """What became of a program: `status` is `ended`, `missing`, `timeout` or `failed`; at most 256 KiB a stream.

    With `lines`, its output is the first line and each that matches, however much there was between them.
    A program that outlives its deadline is killed with everything it started. If even that does not end it (it hangs in
    the kernel), it is left behind: a probe must answer.
    """
    begin = time.monotonic()
    program = find(argv[0])
    if program is None:
        return {"status": "missing", "code": None, "out": "", "err": "", "seconds": 0.0}
    try:
        process = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            start_new_session=True,
        )
    except OSError as error:
        return {"status": "failed", "code": None, "out": "", "err": str(error), "seconds": 0.0}
    out, err, ended = _read(process, begin + seconds, lines)
    if not ended:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_AFTER_KILL)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    return {
        "status": "ended" if ended else "timeout",
        "code": process.returncode if ended else None,
        "out": out.decode("utf-8", "replace"),
        "err": err.decode("utf-8", "replace"),
        "seconds": round(time.monotonic() - begin, 3),
    }


def _read(
    process: subprocess.Popen[bytes], deadline: float, lines: re.Pattern[bytes] | None
) -> tuple[bytes, bytes, bool]:
    """Both streams up to the deadline, and whether the program ended before it."""
    assert process.stdout is not None
    assert process.stderr is not None
    kept = {process.stdout.fileno(): _Kept(lines), process.stderr.fileno(): _Kept(None)}
    with selectors.DefaultSelector() as selector:
        for fd in kept:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _events in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                kept[key.fd].take(chunk)
    out, err = (bytes(part.bytes) for part in kept.values())
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return out, err, False
    return out, err, True
