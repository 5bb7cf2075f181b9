"""A kept process from outside: started under its keeper, ended with everything below it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import CrashedError, RefusedError

_KEEPER = Path(__file__).parent / "keeper.py"
_SECONDS_TO_START = 30.0
_SECONDS_TO_SWEEP = 60.0


@dataclass(frozen=True)
class Ended:
    """How a kept process ended: its exit code or the signal, and whether we had asked; both None where unknown."""

    code: int | None
    signal: int | None
    asked: bool

    def __str__(self) -> str:
        if self.signal is not None:
            return f"was ended by {signal.Signals(self.signal).name}"
        return "ended in an unknown way" if self.code is None else f"ended with exit code {self.code}"


class KeptProcess:
    """A process and its descendants, below a keeper (:mod:`latentforge.teachers.serving.keeper`).

    All of them are of the keeper's session: that mark outlives the keeper, and no later process can get the number
    while one of them lives. (An environment variable would not do: vLLM's engine overwrites its own.)
    """

    def __init__(self, keeper: subprocess.Popen[bytes], pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._keeper = keeper
        self._ended: Ended | None = None
        self._said = b""

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        grace: float = 20.0,
        stdin: int | None = None,
        stdout: int | None = None,
    ) -> KeptProcess:
        """Start ``command`` with its output appended to ``log``; ``stdin`` and ``stdout`` are descriptors for it."""
        request: dict[str, Any] = {
            "command": list(command),
            "log": str(log),
            "parent": os.getpid(),
            "grace": grace,
            **({} if stdin is None else {"stdin": stdin}),
            **({} if stdout is None else {"stdout": stdout}),
        }
        keeper: Future[subprocess.Popen[bytes]] = Future()

        def start_keeper() -> None:
            try:
                with open(log, "ab") as errors:
                    started = subprocess.Popen(
                        [sys.executable, "-I", str(_KEEPER), json.dumps(request)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        env=dict(environment),
                        start_new_session=True,
                        pass_fds=[fd for fd in (stdin, stdout) if fd is not None],
                    )
            except BaseException as error:
                keeper.set_exception(error)
            else:
                keeper.set_result(started)

        # What a signal raises comes to the main thread: there it could lose a process between its fork and its name.
        try:
            threading.Thread(target=start_keeper).start()
            kept = cls(keeper.result(), 0, log)
            first = kept._line(_SECONDS_TO_START)
        except BaseException:  # the keeper would see to it when we are gone; nothing of it is left before that
            with contextlib.suppress(TimeoutError):  # no thread could be started
                if keeper.exception(_SECONDS_TO_START) is None:
                    cls(keeper.result(), 0, log).stop()
            raise
        if first is None or "started" not in first:
            kept.stop()
            reason = (first or {}).get("failed") or "its keeper ended; " + (last_lines(log, 1) or ["no word why"])[0]
            raise RefusedError(f"{command[0]} was not started: {reason}")
        kept.pid = int(first["started"])
        return kept

    @property
    def session(self) -> int:
        """The session of everything below the keeper."""
        return self._keeper.pid

    def ended(self) -> Ended | None:
        """How it ended; None while it runs."""
        self._look(0.0)
        return self._ended

    def wait(self, seconds: float | None = None) -> Ended | None:
        """Wait for its end, at most ``seconds``."""
        self._look(seconds)
        return self._ended

    def stop(self) -> Ended:
        """End the whole tree and return when nothing of it is left; CrashedError where something will not go."""
        with contextlib.suppress(ProcessLookupError):
            self._keeper.send_signal(signal.SIGTERM)
        self._look(None)
        self._keeper.wait()
        left = sweep(self.session)
        if left:
            raise CrashedError(
                f"processes {', '.join(map(str, left))} of {self.log.name} cannot be ended: they hold their memory",
                next="look at the kernel's log (dmesg); a process that no signal ends needs a restart of the machine",
            )
        assert self._ended is not None
        return self._ended

    def _look(self, seconds: float | None) -> None:
        while self._ended is None:
            line = self._line(seconds)
            if line is None and self._keeper.poll() is None and seconds is not None:
                return
            if line is None:  # the keeper is gone without a word: kill -9
                self._keeper.wait()
                sweep(self.session)
                self._ended = Ended(None, None, False)
            elif "ended" in line:
                self._ended = Ended(**line["ended"])

    def _line(self, seconds: float | None) -> dict[str, Any] | None:
        """The keeper's next line; None where none comes in time, or ever again."""
        assert self._keeper.stdout is not None
        fd = self._keeper.stdout.fileno()
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._said:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([fd], [], [], left)[0]:
                return None
            block = os.read(fd, 4096)
            if not block:
                return None
            self._said += block
        line, _, self._said = self._said.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        return value


def members(session: int) -> list[int]:
    """The living processes of a session; one whose first thread has ended lives as long as another thread does."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            # The first thread may have ended before another one: proc_pid_stat(5), num_threads.
            alive = fields[0] not in (b"Z", b"X") or int(fields[17]) > 1
            if int(fields[3]) == session and alive:
                found.append(int(name))
    return found


def sweep(session: int, *, seconds: float = _SECONDS_TO_SWEEP) -> list[int]:
    """Kill what is left of a session, each through a descriptor that no later process can take; returns what stays."""
    deadline = time.monotonic() + seconds
    while left := members(session):
        for pid in left:
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(pid)
                try:
                    if pid in members(session):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                finally:
                    os.close(fd)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log, for an error message; empty where there is none."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-count:]


def quoted_end(log: Path) -> str:
    """The last twelve lines of a log as an error message quotes them, each cut at 300 characters."""
    return "\n".join(f"  | {line[:300]}" for line in last_lines(log, 12)) or "  (its log is empty)"


def default_log(name: str, env: Mapping[str, str]) -> Path:
    """Where a vLLM of our own writes unless it is told: ``latentforge/teachers`` of the state folder."""
    state = env.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "latentforge" / "teachers" / f"{name.replace('/', '-')}-{os.getpid()}.log"


def prepare_log(log: Path) -> None:
    """Make a log and what is missing of the folders above it; RefusedError where that cannot be done.

    They are made for their owner alone: a host's state root takes no run while others may read there.
    """
    try:
        for folder in reversed(log.absolute().parents):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
        log.open("ab").close()
    except OSError as error:
        raise RefusedError(f"log {log} cannot be written: {error.strerror}", next="name another:  --log FILE") from None
