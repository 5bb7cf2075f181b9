"""The second stage of the constant bootstrap line: bring the agent in from stdin or from its installed file.

The first stage (see dispatch/agent_package.py) is the only text that crosses the host's login shell; it executes this
source, which it has read from stdin, with nothing written to the host. It runs before the Python version is known.
"""

import hashlib
import json
import os
import struct
import sys
import zlib
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, BinaryIO, Dict, NoReturn, Optional  # noqa: UP035

PACKAGE = "latentforge_agent"


def refuse(kind: str, message: str, remedy: str, code: int) -> NoReturn:
    """Answer with an error frame and end."""
    error = {"kind": kind, "message": message, "next": remedy, "code": code, "detail": {}}
    body = json.dumps({"ok": False, "error": error, "agent": None, "payload_bytes": 0}).encode()
    sys.stdout.buffer.write(b"\n=LF-BEGIN %d=\n" % len(body) + body + b"\n=LF-END=\n")
    sys.stdout.buffer.flush()
    sys.exit(0)


class MemoryFinder(object):  # noqa: UP004
    """Imports the agent's modules from the sources in a zip that exists only in memory."""

    def __init__(self, sources: Dict[str, bytes]) -> None:  # noqa: UP006
        self.sources = sources

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:  # noqa: UP045
        """The spec of one of the agent's modules."""
        file = name.replace(".", "/")
        for candidate, package in ((file + "/__init__.py", True), (file + ".py", False)):
            if candidate in self.sources:
                return ModuleSpec(name, self, origin="<agent>/" + candidate, is_package=package)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's source."""
        origin = str(module.__spec__.origin)  # type: ignore[union-attr]
        exec(compile(self.sources[origin[len("<agent>/") :]], origin, "exec"), module.__dict__)


def unpack(data: bytes) -> Dict[str, bytes]:  # noqa: UP006
    """The files of a zip that is stored, not compressed; importing zipfile would take longer than most verbs."""
    files, position = {}, 0
    while data[position : position + 4] == b"PK\x03\x04":
        method, size, name, extra = struct.unpack_from("<8xH8xL4xHH", data, position)[:4]
        start = position + 30 + name + extra
        if method:
            refuse("agent-corrupt", "the agent's zip is compressed", "carry the agent in", 3)
        files[data[position + 30 : position + 30 + name].decode()] = data[start : start + size]
        position = start + size
    return files


def begin(stream: BinaryIO) -> None:
    """Read how the agent comes, check its digest, and hand the rest of stdin to it."""
    sys.dont_write_bytecode = True
    # The first word: whoever waits for the answer learns that a program of ours, not a shell, is at work.
    sys.stdout.buffer.write(b"\n=LF-HERE=\n")
    sys.stdout.buffer.flush()
    how = json.loads(stream.readline().decode())
    if sys.version_info < (3, 10):  # noqa: UP036
        version = ".".join(str(part) for part in sys.version_info[:3])
        message = "python3 on this host is " + version + "; the agent needs 3.10 or later"
        refuse("old-python", message, "install a newer python3 on the host", 2)
    if how["mode"] == "carry":
        data = zlib.decompress(stream.read(how["bytes"]))
    else:
        root = how["root"]
        if root is None:
            state = os.environ.get("XDG_STATE_HOME", "")
            if not os.path.isabs(state):
                state = os.path.join(os.path.expanduser("~"), ".local", "state")
            root = os.path.join(state, "latentforge")
        path = os.path.join(os.path.expanduser(root), "agent", how["sha256"] + ".pyz")
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            refuse("agent-missing", "no agent at " + path, "carry the agent in over stdin", 3)
    found = hashlib.sha256(data).hexdigest()
    if found != how["sha256"]:
        refuse("agent-corrupt", "the agent has sha256 " + found + ", not " + how["sha256"], "carry the agent in", 3)
    sys.meta_path.insert(0, MemoryFinder(unpack(data)))
    __import__(PACKAGE + ".__main__")
    sys.modules[PACKAGE + ".__main__"].main(data, how.get("verb"))


if __name__ == "__main__":
    begin(sys.stdin.buffer)
