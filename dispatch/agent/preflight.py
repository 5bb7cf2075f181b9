"""The facts of a preflight, gathered in one call: groups side by side, each external program under a deadline.

A group that fails answers with its error, which the laptop reads as "unknown"; it never takes the others with it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from . import bounded, locks, preflight_host, preflight_stack, preflight_tenants
from .hardware import user
from .paths import Root
from .preflight_stack import Interpreter
from .protocol import AgentError, Arguments

SECONDS = 45.0
ACTION_SECONDS = 160.0
GPU_FIELDS = (
    "name,uuid,compute_cap,driver_version,temperature.gpu,clocks.sm,clocks.max.sm,power.draw,pstate,"
    "utilization.gpu,memory.total,memory.used"
)
#: What is run, by the name under which it is answered. Nothing of it comes from the laptop.
COMMANDS: dict[str, tuple[list[str], float]] = {
    "gpu": (["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"], 20.0),
    "apps": (
        ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"],
        20.0,
    ),
    "banner": (["nvidia-smi"], 20.0),
    "nvcc": (["nvcc", "--version"], 10.0),
    "nvcc-targets": (["nvcc", "--list-gpu-code"], 10.0),
    "journal": (
        # The boot before this one: what it ended in is still in its kernel log.
        ["journalctl", "-k", "-b", "-1", "-q", "-n", "20000", "-o", "short-iso", "--no-pager"],
        20.0,
    ),
    "firmware": (["fwupdmgr", "get-updates", "--json"], 20.0),
}
#: Of a long answer, the lines that count; the first is kept too, and shows that there was something to read.
LINES = {"journal": re.compile(rb"NV_ERR_NO_MEMORY|\bXid\b|\bDOE\b|oom-kill|Out of memory: Killed")}
_GB10 = ("banner", "nvcc", "nvcc-targets", "journal", "firmware")
_GB10_ACTIONS = frozenset({"power", "torch", "nvrtc"})
ACTIONS = frozenset({"write", "drop-caches", "power", "torch", "nvrtc", "teacher-server"})


class Collection:
    """A preflight's facts, being gathered from its making on; `result()` waits for them."""

    def __init__(self, root: Root, question: dict[str, Any], *, may_act: bool) -> None:
        self._received = time.time()
        self._root = root
        args = Arguments("preflight", question)
        self._declared, self._groups = args.flag("gb10"), frozenset(args.texts("groups"))
        self._models, self._actions = args.texts("models"), args.texts("actions")
        python, build, venv = args.optional_text("python"), args.optional_text("build"), args.optional_text("venv")
        self._server = args.table("server")
        args.done()
        for action in self._actions:
            if action not in ACTIONS:
                raise AgentError("protocol", f"preflight: action {action!r} is not one of {', '.join(sorted(ACTIONS))}")
        if self._actions and not may_act:
            raise AgentError("refused", f"a probe only reads; it does not do {', '.join(self._actions)}")
        self._interpreter = Interpreter.of(root, python, build, venv)
        self._found: dict[str, Any] = {"commands": {}, "did": {}}
        self._whole = threading.Thread(target=self._gather, daemon=True)
        self._whole.start()

    def result(self) -> dict[str, Any]:
        """Everything that was found in time; a group that was not is answered as an error."""
        self._whole.join(SECONDS + ACTION_SECONDS * len(self._actions))
        return {**self._found, "received": self._received, "answered": time.time()}

    def _gather(self) -> None:
        """First what says whether this is a GB10, then all that depends on it; side by side, under one deadline."""
        deadline = time.monotonic() + SECONDS
        host = preflight_host
        self._wait(
            [
                self._command("gpu"),
                self._command("apps"),
                self._start("storage", lambda: host.storage(self._root)),
                self._start("memory", host.memory),
                self._start("clock", host.clock),
                self._start("session", lambda: host.session(user())),
                self._start("platform", host.platform),
                self._start("tenants", lambda: preflight_tenants.tenants(self._root)),
                self._start("capabilities", lambda: preflight_stack.capabilities(self._interpreter)),
                self._start("models", lambda: {path: preflight_stack.model(path, self._root) for path in self._models}),
            ],
            deadline,
        )
        self._describe_listed()
        gb10 = self._declared or "GB10" in str(self._found["commands"]["gpu"].get("out"))
        if gb10:
            self._wait(
                [
                    *(self._command(name) for name in _GB10),
                    self._start("caches", host.caches),
                    self._start("reboot", host.reboot_wanted),
                    self._start("link", host.link),
                    self._start("triton", lambda: preflight_stack.triton(self._interpreter, assemble=True)),
                    self._start("binaries", lambda: preflight_stack.binaries(self._interpreter)),
                ],
                deadline,
            )
        for action in self._actions:  # one after the other: each may load the machine
            if action in _GB10_ACTIONS and not gb10:
                continue  # their checks do not apply, so the device is not loaded for them
            thread = _into(self._found["did"], action, partial(self._act, action))
            self._wait([thread], time.monotonic() + ACTION_SECONDS)

    def _describe_listed(self) -> None:
        """Owner, age and command of the processes on the driver's list that were not found otherwise."""
        tenants, answer = self._found.get("tenants"), self._found["commands"].get("apps") or {}
        if not tenants or "processes" not in tenants:
            return
        known = {one["pid"] for one in tenants["processes"]} | set(tenants["ours"])
        first = (line.partition(",")[0].strip() for line in str(answer.get("out", "")).splitlines())
        for pid in sorted({int(word) for word in first if word.isdigit()} - known):
            about = {**preflight_tenants.describe(pid), "why": ["is on the driver's list"]}
            tenants["processes"].append(about)

    @staticmethod
    def _wait(threads: list[threading.Thread | None], deadline: float) -> None:
        for thread in threads:
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _command(self, name: str) -> threading.Thread | None:
        if self._groups and name not in self._groups and name != "gpu":
            return None
        argv, seconds = COMMANDS[name]
        return _into(self._found["commands"], name, lambda: bounded.run(argv, seconds, lines=LINES.get(name)))

    def _start(self, name: str, gather: Callable[[], Any]) -> threading.Thread | None:
        if self._groups and name not in self._groups:
            return None
        return _into(self._found, name, gather)

    def _act(self, action: str) -> dict[str, Any]:
        from . import preflight_actions  # an HTTP client comes with it: a sixth of the start of every probe

        if action == "write":
            base = next(path for path in (self._root.dir, *self._root.dir.parents) if path.exists())
            return preflight_actions.write(base)
        if action == "drop-caches":
            return preflight_actions.drop_caches(self._root)
        if action == "teacher-server":
            server = Arguments("preflight", self._server)
            url, k = server.text("url"), server.number("k", 20, low=1, high=262_144)
            server.done()
            return preflight_actions.teacher_server(url, int(k))
        do = {"power": preflight_actions.power, "torch": preflight_actions.torch, "nvrtc": preflight_actions.nvrtc}
        # Beside a run it would measure that run, and slow it down; a run that comes now waits for the lease.
        lease = locks.take(self._root.device_lock) if self._root.locks.is_dir() else -1
        if lease is None:
            holder = (locks.holder(self._root.device_lock) or {}).get("run") or "a run"
            return {"status": "busy", "answer": None, "said": f"the device is leased to {holder}"}
        try:
            if lease >= 0:
                locks.note_holder(lease, {"run": f"a preflight ({action})", "pid": os.getpid()})
            return do[action](self._interpreter)
        finally:
            if lease >= 0:
                locks.release(lease)


def _into(found: dict[str, Any], name: str, gather: Callable[[], Any]) -> threading.Thread:
    """A running thread that puts what it gathers, or the error that it met, into `found` under `name`."""
    found[name] = {"error": "no answer in time"}

    def guarded() -> None:
        try:
            found[name] = gather()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread
