"""The keeper: a process between us and what we start, that lets nothing of it outlive us. Run as a file of its own.

It is two processes, outer and inner, of a session that the outer leads. Each adopts the orphans below it (subreaper),
so everything that was started is among the descendants of both. The inner ends the tree when it is told to, when the
starter or the outer dies in whatever way, and when the started process ends by itself. Nobody but `kill -9` can end it
first: then the started process dies with it, and the outer, which has adopted the rest, ends that. So the
starter and one of the two may die at once; where both die, the starter finds what is left by the session
(:mod:`latentforge.teachers.serving.processes`).

Standard library only. Its argument is JSON: ``command``, ``log`` (a path), ``parent`` (a pid), ``grace`` (seconds from
asking to killing) and perhaps ``stdin`` and ``stdout``, inherited descriptors for the started process. It writes JSON
lines: ``{"started": pid}``, then ``{"ended": {"code", "signal", "asked"}}`` when nothing is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SECONDS_TO_DIE = 60.0


def main(argument: str) -> int:
    """Be the outer: start the inner, pass on what asks to stop, end what the inner leaves if it is killed."""
    request = json.loads(argument)
    wake = _catch_signals()
    outer = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    parent, here = _open(request["parent"]), _open(outer)
    if parent is None or here is None or os.getppid() != request["parent"]:
        return 1
    inner = os.fork()
    if inner == 0:
        code = 1
        try:
            # A signal that came before the fork is the outer's to pass on; the pipe that would tell it is shared.
            os.close(wake)
            code = _keep(request, libc, [parent, here])
        finally:
            os._exit(code)
    _close_given(request)
    asked = False
    while True:
        pid, status = os.waitpid(inner, os.WNOHANG)
        if pid:
            break
        if select.select([wake], [], [], 5.0)[0] and any(number in _STOPPING for number in os.read(wake, 64)):
            asked = True
            os.kill(inner, signal.SIGTERM)
    _kill_descendants()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # without a word; the started process died with it
        _say(ended={"code": None, "signal": int(signal.SIGKILL), "asked": asked})
    return max(code, 0)


def _keep(request: dict[str, Any], libc: ctypes.CDLL, above: list[int]) -> int:
    """Be the inner: start, wait for a reason to end, end the whole tree. ``above`` are pidfds whose end is a reason."""
    wake = _catch_signals()
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def die_with_the_keeper() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    with open(request["log"], "ab", buffering=0) as log:
        try:
            child = subprocess.Popen(
                request["command"],
                stdin=request.get("stdin", subprocess.DEVNULL),
                stdout=request.get("stdout", log),
                stderr=log,
                preexec_fn=die_with_the_keeper,
            )
        except OSError as error:
            _say(failed=f"{request['command'][0]}: {error.strerror}")
            return 1
    _close_given(request)
    _say(started=child.pid)
    asked = False
    while child.poll() is None:
        readable, _, _ = select.select([wake, *above], [], [], 5.0)
        if wake in readable:
            received = os.read(wake, 64)
            asked = any(number in _STOPPING for number in received)
        if asked or any(one in readable for one in above):
            _end(child, float(request["grace"]))
            break
    with contextlib.suppress(OSError):
        child.kill()
    status = child.wait()
    _kill_descendants()
    _say(ended={"code": status if status >= 0 else None, "signal": -status if status < 0 else None, "asked": asked})
    return 0


def _close_given(request: dict[str, Any]) -> None:
    for name in ("stdin", "stdout"):
        if name in request:
            os.close(request[name])


def _catch_signals() -> int:
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (*_STOPPING, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return reading


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _say(**line: Any) -> None:
    # The reader may be dead: that is one of the reasons for being here.
    with contextlib.suppress(OSError):
        os.write(1, (json.dumps(line) + "\n").encode())


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the started process, which knows its own helpers, to end; after ``grace`` seconds it is not asked again."""
    with contextlib.suppress(OSError):
        child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace)


def _kill_descendants() -> None:
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while time.monotonic() < deadline:
        found = _descendants()
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        time.sleep(0.01)


def _descendants() -> set[int]:
    """The living below this process, however deep."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                # One whose first thread has ended lives as long as another one does: proc_pid_stat(5), num_threads.
                if fields[0] not in (b"Z", b"X") or int(fields[17]) > 1:
                    children.setdefault(int(fields[1]), []).append(int(name))
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        for pid in children.get(todo.pop(), []):
            if pid not in found:
                found.add(pid)
                todo.append(pid)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
