"""Executable checks of contracts/dispatching.yaml and contracts/exit-status.yaml, with the agent on this machine."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from dispatch.agent import exitrec, journal
from dispatch.agent.paths import Root, RunPaths
from dispatch.agent.reserving import reserve
from dispatch.agent.state import derive
from dispatch.hosts.inventory import LOCAL, Host
from dispatch.transport.local import LocalTransport
from dispatch.transport.retry import call
from latentforge.contracts.finding import Finding

_SECONDS = 120.0  # for a program that takes none


class _Place:
    """A state root of its own on this machine, asked as a laptop asks a host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, Root(str(folder / "state"))
        self._transport = LocalTransport(Host(name=LOCAL, root=str(folder / "state"), runner="detached"))
        self._reserved: list[str] = []

    def reserve(self, name: str, argv: list[str]) -> str:
        """The id of a run that is meant by ``name``; the same name is the same run."""
        run, identity = _identity(name)
        launch = {"run": run, "kin": "kin", "argv": argv, "env": {}, "lease": []}
        self._ask("reserve", {"run": run, "identity": identity, "launch": launch, "secrets": {}})
        self._reserved.append(run)
        return run

    def launch(self, run: str) -> None:
        """Start it unless that has happened."""
        self._ask("launch", {"chain": [run], "runner": "detached"})

    def ended(self, run: str) -> dict[str, Any]:
        """Its state once it has ended."""
        until = time.monotonic() + _SECONDS
        while (state := derive(self.root.run(run)))["state"] != "finished":
            if time.monotonic() > until:
                raise TimeoutError(f"{run} is {state['state']} after {_SECONDS:.0f} s")
            time.sleep(0.02)
        return state

    def close(self) -> None:
        """End what still runs, where a check was left early."""
        for run in dict.fromkeys(self._reserved):
            if derive(self.root.run(run))["state"] not in ("finished", "absent", "reserved"):
                self._ask("cancel", {"run": run, "grace": 0, "by": "check"})
        self._transport.close()

    def _ask(self, verb: str, args: dict[str, Any]) -> None:
        call(self._transport, verb, args, timeout=_SECONDS)


@contextmanager
def _place() -> Iterator[_Place]:
    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as folder:
        place = _Place(Path(folder))
        try:
            yield place
        finally:
            place.close()


def _identity(name: str) -> tuple[str, str]:
    identity = json.dumps({"schema": 1, "kind": "data", "code": "c0de", "attempt": 1, "spec": {"name": name}})
    return f"data-{hashlib.sha256(identity.encode()).hexdigest()[:20]}", identity


def a_run_is_started_once(*, mutant: str | None = None) -> Finding:
    """A run that is reserved and launched four times, three of them at once and one after its end, executes once.

    Mutant ``nameless``: each launch is a run of its own, as for a dispatcher whose runs have no identity.
    """
    if mutant not in (None, "nameless"):
        raise ValueError(f"unknown mutant {mutant!r}")
    with _place() as place:
        starts = place.folder / "starts"
        program = f"open({str(starts)!r}, 'a').write('x')"
        argv = [sys.executable, "-I", "-S", "-c", program]
        runs = [place.reserve(f"run {number if mutant else 0}", argv) for number in range(4)]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(place.launch, runs[:3]))
        first = [place.ended(run) for run in runs[:3]]
        place.launch(runs[3])
        again = place.ended(runs[3])
        count = starts.stat().st_size
    same = all(one == again for one in first)
    text = (
        f"4 launches executed the program {count} time{'s' * (count != 1)}, the answers are {'' if same else 'not '}one"
    )
    return Finding(count == 1 and same, text, {"launches": 4, "starts": count, "same": same})


_ENDS: dict[str, tuple[str, str, int]] = {
    "exit 0": ("pass", "pass", 0),
    "exit 1": ("raise SystemExit(1)", "fail", 1),
    "exit 3": ("raise SystemExit(3)", "unknown", 3),
    "exit 101": ("raise SystemExit(101)", "crashed", 5),
    "SIGKILL": ("import os; os.kill(os.getpid(), 9)", "killed", 5),
}
"""How a program ends: its text, the outcome that this means, and the exit code of the command line."""


def an_end_is_told_as_it_was(*, mutant: str | None = None) -> Finding:
    """Programs that end in each way are told so by the agent's supervisor, and only exit status 0 is a pass.

    Mutant ``piped``: the program's output goes through a pipe, whose last command ends well whatever the first did.
    """
    if mutant not in (None, "piped"):
        raise ValueError(f"unknown mutant {mutant!r}")
    found: dict[str, tuple[str, int]] = {}
    with _place() as place:
        runs = {}
        for name, (program, _, _) in _ENDS.items():
            argv = [sys.executable, "-I", "-S", "-c", program]
            if mutant:
                argv = ["/bin/sh", "-c", f"{shlex.join(argv)} | cat"]
            runs[name] = place.reserve(name, argv)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(place.launch, runs.values()))
        for name, run in runs.items():
            state = place.ended(run)
            found[name] = (state["outcome"], state["exit"])
    wrong = [f"{name} told as {found[name][0]}" for name, (_, *told) in _ENDS.items() if found[name] != tuple(told)]
    text = f"{len(_ENDS) - len(wrong)} of {len(_ENDS)} ends told as they were"
    return Finding(not wrong, text + (f"; {wrong[0]}" if wrong else ""), {"ends": found, "wrong": wrong})


def a_damaged_record_is_never_green(*, mutant: str | None = None) -> Finding:
    """A passed run's exit record with one bit flipped, cut short, emptied or of another run is no outcome of its run.

    Mutant ``unchecked``: a reader that takes the JSON of a record without looking at its digest.
    """
    if mutant not in (None, "unchecked"):
        raise ValueError(f"unknown mutant {mutant!r}")
    reader = mock.patch.object(exitrec, "decode", _unchecked) if mutant else nullcontext()
    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as folder:
        run = _reserved(Root(folder), "one")
        other = _reserved(Root(folder), "other")
        passed = {"run": run.id, "code": 0, "signal": None, "outcome": "pass"}
        journal.record(run, "started", pid=1)
        whole = exitrec.encode(passed)
        run.exit.write_bytes(whole)
        if derive(run)["outcome"] != "pass":
            return Finding(False, "a whole record is not read", {"whole": False})
        head = len(whole.rstrip(b"\0"))
        places = [*range(0, head, 3), head, len(whole) // 2, len(whole) - 1]
        damaged = [whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :] for at in places]
        damaged += [whole[:size] for size in (0, 1, head, len(whole) - 1)] + [bytes(len(whole)), whole + b"\0"]
        damaged.append(exitrec.encode({**passed, "run": other.id}))
        green = 0
        with reader:
            for content in damaged:
                run.exit.write_bytes(content)
                green += derive(run)["outcome"] not in (None, "unknown")
    text = f"{green} of {len(damaged)} damaged, cut and foreign records read as an outcome"
    return Finding(green == 0, text, {"records": len(damaged), "green": green})


def _unchecked(data: bytes) -> dict[str, Any] | None:
    start = data.find(b"{")
    try:
        document = json.JSONDecoder().raw_decode(data[start:].decode("utf-8", "replace"))[0] if start >= 0 else None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _reserved(root: Root, name: str) -> RunPaths:
    run, identity = _identity(name)
    reserve(root, run, identity, {"run": run, "argv": ["true"], "env": {}, "lease": []})
    return root.run(run)
