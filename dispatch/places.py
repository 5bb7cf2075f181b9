"""Where the laptop keeps things: hosts, pinned host keys, what was followed, and the copies of finished runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from latentforge.errors import RefusedError, UnknownOutcomeError


@dataclass(frozen=True)
class Places:
    """Every path of the laptop's side. Nothing here is the truth about a run: losing it loses nothing."""

    config: Path
    state: Path
    evidence: Path

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Places:
        """As the XDG variables say, and ``$EVIDENCE_DIR`` or ``./runs``."""
        home = Path(env.get("HOME") or Path.home())
        config = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
        state = Path(env.get("XDG_STATE_HOME") or home / ".local" / "state")
        return cls(config / "latentforge", state / "latentforge" / "laptop", Path(env.get("EVIDENCE_DIR") or "runs"))

    @property
    def hosts_file(self) -> Path:
        """The inventory."""
        return self.config / "hosts.toml"

    @property
    def ledger(self) -> Path:
        """The hash-chained ledger beside the runs."""
        return self.evidence / "ledger.jsonl"

    def known_hosts(self, host: str) -> Path:
        """The pinned keys of one host, in OpenSSH's known_hosts format."""
        return self.state / "known_hosts" / host

    def followed(self, host: str, run: str) -> Path:
        """What was read of a run's streams so far, with its cursor."""
        return self.state / "followed" / host / run

    def record(self, run: str) -> Path:
        """Which host a run was given to, and with which chain."""
        return self.state / "runs" / f"{run}.json"

    def plans(self, host: str) -> Path:
        """The plans that were applied last to a host, a file a pipeline."""
        return self.state / "plans" / host

    @property
    def records(self) -> Path:
        """The folder of the records."""
        return self.state / "runs"

    def lock(self, name: str) -> Path:
        """A lock file that keeps two commands of this laptop from writing the same copy at once."""
        return self.state / "locks" / f"{name}.lock"

    def run(self, run: str) -> Path:
        """The copy of a finished run."""
        return self.evidence / run


@contextmanager
def writing() -> Iterator[None]:
    """Tell a full or read-only disk of this machine as what it is: no crash of a run, and no evidence of one either."""
    try:
        yield
    except OSError as error:
        raise UnknownOutcomeError(
            f"{error.filename or 'a file'} could not be written on this machine: {error.strerror or error}; "
            "what goes on at the host is not affected",
            next="free disk space here, then the same command again: what was done is found and kept",
        ) from error


def private_folder(folder: Path) -> None:
    """Make a folder and whatever is missing above it for its owner alone (mode 0700), whatever the umask is.

    The state folder of the laptop lies in the state root of host ``local``, which refuses one that others may write.
    """
    if not folder.is_dir():
        private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a whole file by temporary, fsync and rename: a reader sees the old content or the new, never a part."""
    private_folder(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_evidence_folder(places: Places) -> None:
    """Refuse before anything is launched a place for evidence that is a file, or that cannot be written to."""
    place = places.evidence.absolute()
    standing = next(path for path in [place, *place.parents] if os.path.lexists(path))
    if not standing.is_dir():
        why = f"{standing} is not a folder"
    elif not os.access(standing, os.W_OK | os.X_OK):
        why = f"{standing} may not be written to"
    else:
        return
    raise RefusedError(
        f"evidence cannot be kept in {str(places.evidence)!r} (EVIDENCE_DIR, or ./runs): {why}",
        next="EVIDENCE_DIR=<a folder of yours>, before the same command",
    )
