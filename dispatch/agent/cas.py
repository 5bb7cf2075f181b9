"""Content that is addressed by its sha256: uploaded objects and the agent itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from .durable import sync_folder, temporary_beside, write_all, write_file
from .paths import Root, check_sha256
from .protocol import AgentError, Payload


class Origin:
    """The agent that is running: its zip and digest, wherever they came from."""

    def __init__(self, data: bytes | None, path: str | None) -> None:
        self._data = data
        self._path = path
        self._sha256: str | None = None

    @property
    def data(self) -> bytes:
        """The zip's bytes."""
        if self._data is None:
            if self._path is None or not os.path.isfile(self._path):
                raise AgentError("internal", f"the agent does not run from a zip file ({self._path!r})")
            self._data = Path(self._path).read_bytes()
        return self._data

    @property
    def sha256(self) -> str:
        """The digest of the zip."""
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(self.data).hexdigest()
        return self._sha256


def install(root: Root, origin: Origin) -> Path:
    """Write the running agent to `<root>/agent/<sha256>.pyz` unless the right bytes are there already."""
    root.create()
    path = root.agent_file(origin.sha256)
    with contextlib.suppress(OSError):
        if hashlib.sha256(path.read_bytes()).hexdigest() == origin.sha256:
            return path
    write_file(path, origin.data, mode=0o500)
    return path


def put(root: Root, sha256: str, payload: Payload) -> bool:
    """Store the payload under its digest; False when it was there; refused when the bytes have another digest."""
    check_sha256(sha256)
    root.create()
    path = root.object(sha256)
    if path.is_file():
        payload.drain()
        return False
    temporary = temporary_beside(path)
    digest = hashlib.sha256()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            while chunk := payload.read():
                digest.update(chunk)
                write_all(fd, chunk)
            os.fsync(fd)
        finally:
            os.close(fd)
        if digest.hexdigest() != sha256:
            raise AgentError(
                "refused", f"the payload has sha256 {digest.hexdigest()}, not {sha256}", next="send it again"
            )
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return True
