"""The agent as the laptop ships it: one deterministic zip, its digest, and the constant line that starts it."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path

_SOURCES = Path(__file__).resolve().parent / "agent"
_PACKAGE = "latentforge_agent"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MAIN = f"""\
import sys

sys.dont_write_bytecode = True
from {_PACKAGE}.__main__ import main

main()
"""

#: The only program text that crosses a host's login shell: safe ASCII without a quote, `$`, backslash, `!` or newline.
#: It reads the length of the second stage from stdin, then the second stage, and executes it.
BOOTSTRAP = "import sys;b=sys.stdin.buffer;exec(b.read(int(b.readline())))"


@functools.cache
def agent_bytes() -> bytes:
    """The zip of dispatch/agent: sorted, stored, with a fixed time, so that equal sources give equal bytes."""
    sources = {f"{_PACKAGE}/{path.name}": path.read_bytes() for path in _SOURCES.glob("*.py")}
    sources["__main__.py"] = _MAIN.encode()
    buffer = io.BytesIO()
    # Stored, not deflated: the bytes then do not depend on which zlib made them.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(sources):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, sources[name])
    return buffer.getvalue()


@functools.cache
def agent_sha256() -> str:
    """The digest of `agent_bytes()`, which names the agent everywhere."""
    return hashlib.sha256(agent_bytes()).hexdigest()


def bootstrap_argv(python: str = "python3") -> list[str]:
    """The constant command of every call: isolated from the user's Python, no bytecode, all values on stdin."""
    return [python, "-I", "-S", "-B", "-c", BOOTSTRAP]


def carried(verb: str | None = None) -> bytes:
    """What to send before a request so that the agent comes along over stdin; nothing is written on the host for it.

    Where the request comes later, `verb` says what it will ask, so that the agent makes itself ready for that.
    """
    # Squeezed for the way only: what is hashed is the zip, whose bytes do not depend on which zlib is here.
    squeezed = _squeezed()
    how = {"mode": "carry", "bytes": len(squeezed), "sha256": agent_sha256(), "verb": verb}
    return _second_stage(how) + squeezed


def installed(root: str | None) -> bytes:
    """What to send before a request to use the agent installed under `root` (None: the host's default root).

    Answered with error kind `agent-missing` or `agent-corrupt` when it is not there: send `carried()` then.
    """
    return _second_stage({"mode": "installed", "root": root, "sha256": agent_sha256()})


@functools.cache
def _squeezed() -> bytes:
    return zlib.compress(agent_bytes())


@functools.cache
def _bootstrap_source() -> bytes:
    return (_SOURCES / "bootstrap.py").read_bytes()


def _second_stage(how: dict[str, object]) -> bytes:
    source = _bootstrap_source()
    return b"%d\n" % len(source) + source + json.dumps(how, separators=(",", ":")).encode() + b"\n"
