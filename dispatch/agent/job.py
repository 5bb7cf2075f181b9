"""One job of a run: start it exactly as described, keep watch, clean up after it, and write down how it ended."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from . import collecting, ending, exitrec, journal, memory_evidence
from .disk_watch import DiskWatch
from .durable import read_json
from .paths import RunPaths
from .processes import (
    MARK,
    Process,
    boot_clock,
    boot_id,
    descendants,
    look,
    no_core_files,
    own_children,
    send,
    table,
)
from .stopping import Stop
from .telemetry import Telemetry, total_memory
from .watchdog import Floors, Watchdog

BEAT_SECONDS = 5.0
_SWEEP_SECONDS = 10.0
_LEFTOVER_GRACE = 0.25
_LOOK_MILLISECONDS = 200
_HUNT_SECONDS = 0.1
# fmt: off
_HOST_ENVIRONMENT = frozenset({
    "PATH", "HOME", "LANG", "USER", "LOGNAME",
    "TMPDIR", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH",
    "CUDACXX", "LATENTFORGE_CUDA",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
    "http_proxy", "https_proxy", "no_proxy", "all_proxy",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
})
# fmt: on
"""What a job takes over from its host: where things lie there, how the host reaches its package index, and with which
CUDA compiler it builds, if with any."""
_HOST_PREFIXES = ("PIP_",)


def passes_to_jobs(name: str) -> bool:
    """Whether a job takes this environment name over from its host."""
    return name in _HOST_ENVIRONMENT or name.startswith(_HOST_PREFIXES)


def forget_secrets(run: RunPaths) -> None:
    """Take the run's secrets off the disk, and what a killed writer left of them; the caller holds the run's lock."""
    for path in (run.secrets, *run.dir.glob(f".tmp-{run.secrets.name}-*")):
        path.unlink(missing_ok=True)


class Job:
    """The leader process of a run and everything that descends from it."""

    def __init__(
        self,
        run: RunPaths,
        lock: int,
        lease: int | None,
        *,
        started: Callable[[int], None],
        idle: Callable[[], None],
        runner: str = "detached",
    ) -> None:
        self.run = run
        self._runner = runner
        self._inherited = [lock] if lease is None else [lock, lease]
        self._on_started = started
        self._on_idle = idle
        self._beats = 0
        self._last_beat = 0.0
        self._wall = time.time()
        self._clock = boot_clock()
        self._monotonic = time.monotonic()
        self._leader: int | None = None
        self._telemetry = Telemetry()
        self._given: dict[str, str] = {}
        self.stop = Stop(self._members)

    def execute(self, before_exit: Callable[[RunPaths, str], None]) -> str:
        """Start, wait, sweep, take inventory, write the exit record; returns the outcome."""
        run = self.run
        before = memory_evidence.counters()
        exitrec.preallocate(run.exit)
        restarted = 0
        while True:
            ended, failure, left = self._once(restarted)
            cancel = read_json(run.cancel)
            oom, evidence = memory_evidence.judge(
                ended["signal"],
                before,
                memory_evidence.counters(),
                self._kernel_line if failure is None else lambda: None,
            )
            outcome, kind, reason = ending.judge(
                ended["code"],
                ended["signal"],
                failure=failure,
                cancelled=cancel is not None,
                stopped=self.stop.why,
                oom=oom,
                evidence=evidence,
            )
            if left <= 0 or self.stop.why is not None or not ending.may_begin_again(kind, ended["code"]):
                break
            restarted += 1
            journal.record(run, "restarting", restarted=restarted, left=left - 1, outcome=outcome, **ended)
        artifacts = None
        try:
            artifacts = collecting.take_inventory(run, self._beat)
        except OSError as error:
            problem = f"artifacts.json could not be written: {error.strerror or error}"
            reason = problem if reason is None else f"{reason}; {problem}"
            if outcome == "pass":
                outcome = "unknown"  # nobody can verify what it left
        before_exit(run, outcome)
        record = {
            "schema": 1,
            "run": run.id,
            "runner": self._runner,
            **ended,
            "restarts": restarted,
            "outcome": outcome,
            "class": kind,
            "reason": None if reason is None else reason[: ending.LONGEST_REASON],
            "oom": oom,
            "oom_evidence": None if evidence is None else evidence[: ending.LONGEST_REASON],
            "cancel": None if cancel is None else {key: cancel.get(key) for key in ("by", "wall", "grace")},
            "started": self._wall,
            "ended": time.time(),
            "seconds": boot_clock() - self._clock,
            "boot_id": boot_id(),
            "artifacts": artifacts,
        }
        with contextlib.suppress(OSError):
            journal.record(
                run,
                "ended",
                **{"class": kind},
                outcome=outcome,
                code=ended["code"],
                signal=ended["signal"],
                reason=reason,
            )
        exitrec.write(run.exit, record)
        return outcome

    def _once(self, restarted: int) -> tuple[dict[str, Any], str | None, int]:
        """Start and wait: how it ended, why it could not be started, and how often it may still be begun again."""
        run, left = self.run, 0
        ended: dict[str, Any] = {"code": None, "signal": None, "leftovers": 0, "survivors": [], "usage": None}
        try:
            launch = read_json(run.launch)
            if launch is None:
                raise OSError(errno.EINVAL, "launch.json does not parse")
            left = int(launch.get("restarts", 0)) - restarted
            journal.record(run, "launching", supervisor=os.getpid())
            exitrec.preallocate(run.beat)
            pid = self._spawn(launch, {"LATENTFORGE_RESTARTED": restarted, "LATENTFORGE_RESTARTS_LEFT": left})
        except OSError as error:
            with contextlib.suppress(OSError):
                forget_secrets(run)
            why = f"it could not be started: {error.strerror or error}"
            return ended, why + (f": {error.filename}" if error.filename else ""), left
        self._watch(pid, launch)
        return self._clean_up(pid), None, left

    def _watch(self, pid: int, launch: dict[str, Any]) -> None:
        """Wait for the end of the leader with the watchdog beside it."""
        tell = functools.partial(journal.record, self.run)
        dog = Watchdog(Floors.of(launch, total_memory()), self.stop, tell)
        disk = DiskWatch(self.run.dir, launch, self.stop, tell)
        dog.start()
        try:
            self._wait(pid, disk)
        finally:
            dog.finish()
            self._telemetry.close()

    def _kernel_line(self) -> str | None:
        return None if self._leader is None else memory_evidence.kernel_line(self._leader, self._monotonic)

    def _members(self) -> list[Process]:
        """The living processes of the job: what descends from here or from its leader's session."""
        assert self._leader is not None
        processes = table()
        mine = descendants(os.getpid(), processes)
        mine |= {process.pid for process in processes.values() if process.session == self._leader}
        mine -= {os.getpid(), self._telemetry.gpu.pid or -1}
        return [processes[pid] for pid in mine if processes[pid].alive]

    def _spawn(self, launch: dict[str, Any], restarts: dict[str, int]) -> int:
        """Fork the leader behind a gate that opens when `started` is on disk; its pid, or OSError if it cannot run."""
        run = self.run
        environment = {name: value for name, value in os.environ.items() if passes_to_jobs(name)}
        environment["LATENTFORGE_STATE"] = str(run.dir.parent.parent)  # what a job keeps of this host lies there too
        environment.update(launch["env"])
        environment.update({name: str(count) for name, count in restarts.items() if any(restarts.values())})
        environment.update(self._secrets(launch))
        environment[MARK] = mark = os.urandom(16).hex()
        log = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        gate_read, gate_write = os.pipe()
        word_read, word_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate_write)
            self._become_job(launch["argv"], environment, log, gate_read, word_write)
        for fd in (log, gate_read, word_write):
            os.close(fd)
        try:
            leader = look(pid)
            if self._leader is None:
                self._wall, self._clock = time.time(), boot_clock()
            self._leader, self._monotonic = pid, time.monotonic()
            ticks = None if leader is None else leader.ticks
            journal.record(run, "started", pid=pid, ticks=ticks, mark=mark, argv=launch["argv"])
            self._beat()
            os.write(gate_write, b"1")
        except OSError:
            os.close(gate_write)
            os.close(word_read)
            os.waitpid(pid, 0)  # the gate stayed shut: it ends by itself without having run anything
            raise
        os.close(gate_write)
        with os.fdopen(word_read, "rb") as words:
            failure = words.read()
        if failure:
            os.waitpid(pid, 0)
            number, name = json.loads(failure)
            raise OSError(number, os.strerror(number), name)
        self._on_started(pid)
        return pid

    def _secrets(self, launch: dict[str, Any]) -> dict[str, str]:
        """The secrets that the run was given; from here on they are nowhere but in this process and in the job's."""
        names = launch.get("secrets", [])
        if names:
            no_core_files()  # what it is given must not lie about in one, of this process or of the job
        secrets = self._given or ((read_json(self.run.secrets) or {}) if names else {})
        forget_secrets(self.run)
        if sorted(secrets) != sorted(names):
            raise OSError(errno.ENOENT, "its secrets are gone; dispatch it again", self.run.secrets.name)
        self._given = secrets  # for when it is begun again
        return secrets

    def _become_job(self, argv: list[str], environment: dict[str, str], log: int, gate: int, word: int) -> None:
        try:
            os.setsid()
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                with contextlib.suppress(OSError):
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("300")  # if memory runs out, the job goes before the supervisor that records it
            if os.read(gate, 1) != b"1":
                os._exit(125)
            os.chdir(self.run.dir)
            for fd in self._inherited:
                os.set_inheritable(fd, True)
            os.execvpe(argv[0], argv, environment)
        except OSError as error:
            os.write(word, json.dumps([error.errno or errno.EIO, argv[0]]).encode())
        finally:
            os._exit(127)

    def _wait(self, pid: int, disk: DiskWatch) -> None:
        """Return when the leader has ended but is not yet reaped, so that its pid still means it."""
        fd = None
        with contextlib.suppress(AttributeError, OSError):
            fd = os.pidfd_open(pid)
        poll = select.poll()
        if fd is not None:
            poll.register(fd, select.POLLIN)
        try:
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                poll.poll(_LOOK_MILLISECONDS if fd is not None else 50)
                # Whatever a host that runs out of things refuses here, the end of the job is still to be recorded.
                with contextlib.suppress(OSError):
                    if boot_clock() - self._last_beat >= BEAT_SECONDS:
                        self._beat()
                        self._reap(table())
                    disk.look()
                    if self.stop.why is not None:
                        self.stop.advance()
                    self._on_idle()
        finally:
            if fd is not None:
                os.close(fd)

    def _beat(self) -> None:
        if self._beats and boot_clock() - self._last_beat < BEAT_SECONDS:
            return
        self._beats += 1
        self._last_beat = boot_clock()
        with contextlib.suppress(OSError):
            size = self.run.log.stat().st_size
            exitrec.write(
                self.run.beat,
                {
                    "count": self._beats,
                    "clock": boot_clock(),
                    "wall": time.time(),
                    "log": size,
                    **self._telemetry.read(self._leader),
                },
                sync=False,
            )

    def _clean_up(self, leader: int) -> dict[str, Any]:
        """Kill and reap whatever the leader left behind, then the leader; a subreaper is parent to all of it."""
        killed: set[int] = set()
        begun = boot_clock()
        while True:
            left = [process.pid for process in self._members() if process.pid != leader]
            self._reap(table())  # after the look: whatever it found dead can be reaped now
            left = left or self._children(leader)
            if not left or boot_clock() - begun > _SWEEP_SECONDS:
                break
            # A moment of their own first: Python's resource tracker, for one, ends after its parent, tidying up.
            if boot_clock() - begun > _LEFTOVER_GRACE:
                for process in self._members():
                    if process.pid != leader and send(process, signal.SIGKILL):
                        killed.add(process.pid)
                killed |= self._hunt(leader)
            time.sleep(0.01)
        _, status, usage = os.wait4(leader, 0)
        signalled = os.WIFSIGNALED(status)
        return {
            "code": None if signalled else os.WEXITSTATUS(status),
            "signal": os.WTERMSIG(status) if signalled else None,
            "leftovers": len(killed),
            "survivors": sorted(left)[:20],
            "usage": {"user": usage.ru_utime, "system": usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024},
        }

    def _children(self, leader: int) -> list[int]:
        """What is a child of this process beside the leader and a question to the GPU; empty is final."""
        return sorted((own_children() or set()) - {leader, self._telemetry.gpu.pid or -1})

    def _hunt(self, leader: int) -> set[int]:
        """Kill and reap children as fast as they come: what forks and dies at once is never caught by a slow look.

        The pid of a child that was not reaped is nobody else's, so it may be killed by its number.
        """
        killed: set[int] = set()
        until = boot_clock() + _HUNT_SECONDS
        while boot_clock() < until and (children := self._children(leader)):
            for pid in children:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    _, status = os.waitpid(pid, os.WNOHANG)
                    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                        killed.add(pid)
        return killed

    def _reap(self, processes: dict[int, Process]) -> None:
        """Take leave of adopted orphans; the leader keeps its pid to the end, and a question to the GPU is heard."""
        kept = (self._leader, self._telemetry.gpu.pid)
        for process in processes.values():
            if process.parent == os.getpid() and not process.alive and process.pid not in kept:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
