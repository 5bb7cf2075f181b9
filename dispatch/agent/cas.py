"""Content that is addressed by its sha256: uploaded objects and the agent itself."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from .durable import sync_folder, write_all, write_file
from .paths import Root, check_sha256
from .protocol import AgentError, Payload

PART = ".part-"
_GIVEN_UP_SECONDS = 180.0


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


def held(root: Root, sha256: str) -> tuple[bool, int]:
    """Whether the content is there; and if not, how many of its first bytes are, from sendings that were cut."""
    path = root.object(sha256)
    if path.is_file():
        return True, 0
    return False, max((part.stat().st_size for part in _parts(path)), default=0)


def put(root: Root, sha256: str, payload: Payload, offset: int = 0) -> tuple[bool, bool]:
    """Store the content with this digest, of which the payload is all or, with an offset, the rest.

    Answers whether it was stored now, and whether it is there; it is not where the beginning that the offset speaks of
    is gone or was damaged. Nothing of a sending that is cut is lost, and nothing of it has the content's name.
    """
    check_sha256(sha256)
    root.create()
    path = root.object(sha256)
    if path.is_file():
        payload.drain()
        return False, True
    mine = path.with_name(f"{PART}{sha256}-{os.getpid()}-{os.urandom(4).hex()}")
    digest = hashlib.sha256()
    fd = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)  # nobody else has it: a sign that it is being written, which dies with us
    try:
        try:
            # A copy, not the part itself: its writer may still be waiting at the other end of a dead connection.
            if not _begin(path, mine, fd, digest, offset):
                os.unlink(mine)
                payload.drain()
                return False, False
            with _watched(payload):
                while chunk := payload.read():
                    digest.update(chunk)
                    write_all(fd, chunk)
            os.fsync(fd)
        finally:
            os.close(fd)
    except AgentError:
        if path.is_file() or not mine.stat().st_size:  # somebody else was quicker, or nothing came
            mine.unlink(missing_ok=True)
        raise
    except BaseException:
        mine.unlink(missing_ok=True)
        raise
    if digest.hexdigest() != sha256:
        for part in _parts(path):
            part.unlink(missing_ok=True)
        if offset:
            return False, False
        raise AgentError("refused", f"the payload has sha256 {digest.hexdigest()}, not {sha256}", next="send it again")
    os.rename(mine, path)
    sync_folder(path.parent)
    for part in _parts(path):
        part.unlink(missing_ok=True)
    return True, True


def _parts(path: Path) -> list[Path]:
    """What cut sendings of an object have left."""
    return list(path.parent.glob(f"{PART}{path.name}-*"))


def _begin(path: Path, mine: Path, fd: int, digest: hashlib._Hash, offset: int) -> bool:
    """Take the first bytes over from the longest part; False where there are not so many."""
    if not offset:
        return True
    longest = max((part for part in _parts(path) if part != mine), key=lambda part: part.stat().st_size, default=None)
    if longest is None:
        return False
    left = offset
    with open(longest, "rb") as part:
        while left and (chunk := part.read(min(left, 1 << 20))):
            digest.update(chunk)
            write_all(fd, chunk)
            left -= len(chunk)
    return not left


@contextlib.contextmanager
def _watched(payload: Payload) -> Iterator[None]:
    """End this process when nothing has come for so long that nothing will: no server notices every dead client."""
    done = threading.Event()

    def watch() -> None:
        left = -1
        while payload.left != left:
            left = payload.left
            if done.wait(_GIVEN_UP_SECONDS):
                return
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
