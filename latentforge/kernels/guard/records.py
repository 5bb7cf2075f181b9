"""What is known of each variant on this host: one file a key, whole or not at all, and ``pending`` before the proof.

A host that freezes leaves no other trace than the ``pending`` record that was on its disk before, so each write is
flushed to the disk, the folder's entry too, before the next thing happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.kernels.guard.reasons import REASONS, STAGES, STATES

MAX_AGE_SECONDS = 14 * 86400.0


class DamagedRecordError(LatentForgeError):
    """A record that cannot be read; it counts as none, and never as a kernel that was proven."""


@dataclass(frozen=True)
class Record:
    """What the last proof of a variant found.

    ``stage`` is the last one reached; ``attempts`` counts proofs that did not come back; ``measured`` holds worst
    errors, milliseconds and the like; ``config`` is the frozen choice; ``accepted`` says that a person has seen the
    crash and lives with the fallback. ``finished`` is None while pending; times are seconds since the epoch.
    """

    variant: str
    key: str
    state: str
    stage: str = "gate"
    reason: str | None = None
    detail: str = ""
    backend: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0
    accepted: bool = False
    host: str = ""
    boot: str = ""
    began: float = 0.0
    finished: float | None = None
    verified: float | None = None

    def __post_init__(self) -> None:
        if self.state not in STATES or self.stage not in STAGES or (self.reason and self.reason not in REASONS):
            raise ValueError(f"not a record: state {self.state!r}, stage {self.stage!r}, reason {self.reason!r}")
        if self.state in ("ok", "pending") and self.reason is not None:
            raise ValueError(f"a record that is {self.state} has no reason, not {self.reason!r}")
        if self.state in ("failed", "crashed", "degraded") and self.reason is None:
            raise ValueError(f"a record that is {self.state} names its reason")

    def fresh(self, now: float) -> bool:
        """Whether the proof is younger than 14 days; a clock that runs backwards makes it old."""
        return self.finished is not None and 0 <= now - self.finished < MAX_AGE_SECONDS


def state_folder() -> Path:
    """``$LATENTFORGE_STATE/warmup``, as the agent names it to its runs, or ``$XDG_STATE_HOME/latentforge/warmup``."""
    if root := os.environ.get("LATENTFORGE_STATE"):
        return Path(root) / "warmup"
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "latentforge" / "warmup"


class Records:
    """The records of one host, in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = state_folder() if folder is None else folder

    def path(self, key: str) -> Path:
        """Where the record of ``key`` lies."""
        return self.folder / f"{key}.json"

    def prepare(self) -> None:
        """Make the folder; RefusedError where that cannot be done.

        It lies in the state root of the host, which takes no run while others may read there: whatever is missing above
        it is made for its owner alone (mode 0700), whatever the umask.
        """
        try:
            for folder in reversed((self.folder, *self.folder.parents)):
                if not folder.is_dir():
                    folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error

    def read(self, key: str) -> Record | None:
        """The record of ``key``, None where there is none; DamagedRecordError where it is not whole."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedRecordError(f"record {path} cannot be read: {error.strerror}") from error
        record = _parse(path, content)
        if record.key != key:
            raise DamagedRecordError(f"record {path} is of key {record.key}, not of {key}", next=f"rm {path}")
        return record

    def write(self, record: Record) -> None:
        """Put the record on the disk: temporary file, flush, rename, flush of the folder."""
        content = _content(record)
        path = self.path(record.key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                _write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            _flush_folder(self.folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> RefusedError:
        return RefusedError(
            f"the guard cannot keep its records in {self.folder}: {error.strerror}; nothing is tried without one",
            next="make room there, or name another state root with LATENTFORGE_STATE",
        )

    def all(self) -> Iterator[Record | DamagedRecordError]:
        """Every record of the host, of older keys too, in the order of their names."""
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else ():
            try:
                yield _parse(path, path.read_bytes())
            except (DamagedRecordError, OSError) as error:
                yield error if isinstance(error, DamagedRecordError) else DamagedRecordError(f"{path}: {error}")


def settle_leftover(record: Record, boot: str) -> Record:
    """What a ``pending`` record becomes that nobody is working on: the last attempt took its process or host down."""
    host_down = record.boot != boot
    return replace(
        record,
        state="crashed",
        reason="host_crash" if host_down else "crash_signal",
        detail=f"the attempt did not come back from stage {record.stage}: "
        + ("the host has booted since" if host_down else "the warm-up itself was ended"),
        attempts=record.attempts + 1,
        finished=time.time(),
    )


def boot_id() -> str:
    """The kernel's name of this boot; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _content(record: Record) -> bytes:
    body = asdict(record)
    return (json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n").encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse(path: Path, content: bytes) -> Record:
    try:
        body = json.loads(content)
        said = body.pop("sha256")
        if set(body) != {one.name for one in fields(Record)}:
            raise ValueError("its fields are not those of this version")
        if said != _digest(body):
            raise ValueError("its checksum is not that of its content")
        return Record(**body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRecordError(f"record {path} is damaged ({error}); it counts as none", next=f"rm {path}") from error


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
