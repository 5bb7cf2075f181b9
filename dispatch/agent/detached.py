"""The detached runner: a supervisor forked twice into a session of its own, with the run's locks open."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any

# How long to wait for a new supervisor to start its first run.
PATIENCE = 15.0


def spawn(root: str, program: str, chain: list[tuple[str, int]], lease: int | None) -> dict[str, Any]:
    """Execute the installed agent as a supervisor of `chain` (run ids with their locks); its first word.

    An empty word: it is slow, not dead. A word with `error`: nothing goes on.
    """
    config = {"root": root, "chain": [list(pair) for pair in chain], "lease": lease, "runner": "detached"}
    config_read, config_write = os.pipe()
    os.write(config_write, json.dumps(config).encode())
    os.close(config_write)
    ready_read, ready_write = os.pipe()
    keep = sorted([fd for _, fd in chain] + ([] if lease is None else [lease]))
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                _become_supervisor(program, chain[0][0], config_read, ready_write, keep)
        finally:
            os._exit(0)
    os.close(config_read)
    os.close(ready_write)
    os.waitpid(child, 0)
    try:
        return hear(ready_read)
    finally:
        os.close(ready_read)


def _become_supervisor(program: str, first: str, config_read: int, ready_write: int, keep: list[int]) -> None:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(config_read, 0)
        os.dup2(null, 1)
        os.dup2(ready_write, 2)
        # A descriptor of the SSH session left open here would keep that session from ending.
        position = 3
        for fd in keep:
            os.closerange(position, fd)
            os.set_inheritable(fd, True)
            position = fd + 1
        os.closerange(position, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", program, "supervise", first])
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def hear(ready_read: int) -> dict[str, Any]:
    """The first word of a supervisor on `ready_read`; `error` with what came when it ended without one."""
    deadline = time.monotonic() + PATIENCE
    heard = b""
    poll = select.poll()
    poll.register(ready_read, select.POLLIN | select.POLLHUP)
    while (left := deadline - time.monotonic()) > 0 and not heard.endswith(b"\n\0"):
        if poll.poll(left * 1000):
            chunk = os.read(ready_read, 65536)
            if not chunk:
                break
            heard += chunk
    if heard.endswith(b"\n\0"):
        document: dict[str, Any] = json.loads(heard[: heard.rindex(b"\n\0")].rpartition(b"\n")[2])
        return document
    if left <= 0:
        return {}  # slow, not dead: the states in the reply say how far it is
    return {"error": heard.decode("utf-8", "replace")[-2000:] or "it ended without a word"}
