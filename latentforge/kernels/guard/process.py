"""Running a child that may hang, crash or be killed: its own process group, files for what it says, a deadline a stage.

The child writes JSON lines to its standard output: ``{"stage": name}`` before it enters a stage, which it does when it
has read a line from its standard input (the guard's record names the stage by then), and, last, ``{"result": …}``. How
it ended is one of four different things: a result, an exit code, a signal, a deadline.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CHILD = "latentforge.kernels.guard.child"
_LOOK_EVERY = 0.02
_LAST_WORDS = 2000


@dataclass(frozen=True)
class Outcome:
    """How a child ended: ``value`` is the exit code or the signal's number, ``result`` what it found."""

    kind: Literal["result", "exit", "signal", "timeout"]
    stage: str
    value: int = 0
    result: dict[str, Any] | None = None
    last_words: str = ""
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The end of a child without a result, in words."""
        if self.kind == "signal":
            name = signal.Signals(self.value).name if self.value in set(signal.Signals) else str(self.value)
            return f"{'killed' if self.value == signal.SIGKILL else 'ended'} by {name} in stage {self.stage}"
        if self.kind == "timeout":
            return f"did not end stage {self.stage} within {self.value} s; its process group was killed"
        return f"exited with {self.value} in stage {self.stage} without a result"


def run_child(
    request: Mapping[str, Any],
    folder: Path,
    *,
    limits: Mapping[str, float],
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = (sys.executable, "-m", CHILD),
    entered: Callable[[str], None] = lambda stage: None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run a fresh interpreter on ``request``; ``limits`` are the seconds that each stage may take.

    ``folder`` receives ``request.json``, ``stdout`` and ``stderr``; ``entered`` is told each stage once. Whatever the
    child started dies with it, on a deadline and after a result alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = folder / "request.json"
    asked.write_text(json.dumps({**request, "guard": os.getpid()}), encoding="utf-8")
    began = clock()
    with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
        child = subprocess.Popen(
            [*command, str(asked)],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    try:
        stage, timed_out = _watch(child, folder / "stdout", limits, entered, clock)
    finally:
        # Before it is reaped: until then nobody else can have its number. Compilers are grandchildren.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        assert child.stdin is not None
        child.stdin.close()
    result = _result(folder / "stdout")
    words = (folder / "stderr").read_bytes()[-_LAST_WORDS:].decode("utf-8", "replace").strip()
    seconds = clock() - began
    if timed_out:
        return Outcome("timeout", stage, int(limits[stage]), None, words, seconds)
    if code < 0 or code > 128:
        # 137 is how a shell in between says SIGKILL.
        return Outcome("signal", stage, -code if code < 0 else code - 128, None, words, seconds)
    if code != 0 or result is None:
        return Outcome("exit", stage, code, None, words, seconds)
    return Outcome("result", stage, 0, result, words, seconds)


def _watch(
    child: subprocess.Popen[bytes],
    stdout: Path,
    limits: Mapping[str, float],
    entered: Callable[[str], None],
    clock: Callable[[], float],
) -> tuple[str, bool]:
    """The last stage, and whether its time was over; the child has ended or is to be killed, and is not reaped."""
    stage, since, seen = next(iter(limits)), clock(), 0
    while True:
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        stages = _stages(stdout)
        for name in stages[seen:]:
            entered(name)
            stage, since = name, clock()
            assert child.stdin is not None
            with suppress(BrokenPipeError):
                os.write(child.stdin.fileno(), b"go\n")
        seen = len(stages)
        if ended:
            return stage, False
        if clock() - since > limits[stage]:
            return stage, True
        time.sleep(_LOOK_EVERY)


def _lines(stdout: Path) -> list[dict[str, Any]]:
    found = []
    for line in stdout.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def _stages(stdout: Path) -> list[str]:
    return [str(line["stage"]) for line in _lines(stdout) if "stage" in line]


def _result(stdout: Path) -> dict[str, Any] | None:
    lines = _lines(stdout)
    result = lines[-1].get("result") if lines else None
    return result if isinstance(result, dict) else None
