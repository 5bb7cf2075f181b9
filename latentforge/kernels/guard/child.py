"""The child: one variant, one fresh process, one line of JSON at the end. Run as ``python -m …guard.child REQUEST``.

Started by :func:`latentforge.kernels.guard.process.run_child`; may crash or hang as the kernel likes.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

MEMORY_BYTES = 16 * 2**30
_PR_SET_PDEATHSIG = 1
_GUARD_GONE = 3


def main(arguments: list[str]) -> int:
    """Settle into the contract of a child, do what the request asks, and say the result."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    die_with(int(request["guard"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(10)
    # What a kernel prints must not stand between the lines that the guard reads.
    lines = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def say(**line: Any) -> None:
        lines.write(json.dumps(line) + "\n")
        lines.flush()

    def enter(stage: str) -> None:
        say(stage=stage)
        if not sys.stdin.readline():
            os._exit(_GUARD_GONE)

    enter(request["stages"][0])
    from latentforge.kernels.guard import work

    task = getattr(work, request["task"])
    say(result=task(request, enter))
    return 0


def die_with(guard: int) -> None:
    """Have the kernel kill this process when its guard dies; leave at once where it has died already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != guard:
        os._exit(_GUARD_GONE)


def resolve(entry: str) -> Any:
    """The function behind ``module:function``."""
    module, _, name = entry.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
