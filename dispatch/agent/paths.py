"""Every path that the agent reads or writes, in one place."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from .protocol import AgentError, shown

RUN_ID = re.compile(r"[a-z][a-z0-9]{0,31}-[0-9a-f]{20}")
SHA256 = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,199}")
# flock on these does not say what it says on a local disk.
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "fuse.sshfs", "fuse.glusterfs", "glusterfs"}
)


def expand(path: str, what: str) -> Path:
    """An absolute path on this host, with a leading ~ resolved here; anything else is refused."""
    if "\0" in path or not path:
        raise AgentError("refused", f"{what}={path!r} is not a path")
    expanded = os.path.expanduser(path) if path.startswith("~") else path
    if not os.path.isabs(expanded):
        raise AgentError(
            "refused", f"{what}={path!r} is not an absolute path on the host", next="begin it with / or ~/"
        )
    return Path(os.path.normpath(expanded))


def check_run_id(run: object) -> str:
    """`run` itself when it is `<kind>-<20 hex>`; refused otherwise."""
    if not isinstance(run, str) or not RUN_ID.fullmatch(run):
        raise AgentError("refused", f"run={shown(run)} is not a run id (kind, hyphen, 20 hex digits)")
    return run


def check_sha256(sha256: object) -> str:
    """`sha256` itself when it is 64 lower-case hex digits; refused otherwise."""
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise AgentError("refused", f"sha256={shown(sha256)} is not 64 lower-case hex digits")
    return sha256


class RunPaths:
    """The files of one run directory."""

    def __init__(self, runs: Path, run: str) -> None:
        self.id = check_run_id(run)
        self.dir = runs / self.id
        self.identity = self.dir / "identity.json"
        self.launch = self.dir / "launch.json"
        self.events = self.dir / "events.jsonl"
        self.log = self.dir / "launch.log"
        self.effective = self.dir / "effective.json"
        self.out = self.dir / "out"
        self.artifacts = self.dir / "artifacts.json"
        self.journal = self.dir / "journal.jsonl"
        self.exit = self.dir / "exit.rec"
        self.beat = self.dir / "beat.rec"
        self.lock = self.dir / "lock"
        self.supervisor = self.dir / "supervisor.json"
        self.lease = self.dir / "lease.json"
        self.cancel = self.dir / "cancel.json"
        self.secrets = self.dir / "secrets.env.json"
        self.unit = self.dir / "unit.json"


class Root:
    """The state root of this host and what lies directly under it."""

    def __init__(self, root: str | None) -> None:
        if root is not None:
            self.dir = expand(root, "root")
        else:
            state = os.environ.get("XDG_STATE_HOME", "")
            base = state if os.path.isabs(state) else os.path.join(os.path.expanduser("~"), ".local", "state")
            self.dir = Path(base) / "latentforge"
        standing = next(path for path in (self.dir, *self.dir.parents) if os.path.exists(path))
        if not standing.is_dir():
            raise AgentError(
                "refused",
                f"state root {self.dir}: {standing} is not a folder",
                next="set GX10_REPO_PATH to a folder of your own",
            )
        self.agent = self.dir / "agent"
        self.cas = self.dir / "cas"
        self.builds = self.dir / "builds"
        self.venvs = self.dir / "venvs"
        self.models = self.dir / "models"
        self.store = self.dir / "store"
        self.runs = self.dir / "runs"
        self.locks = self.dir / "locks"
        self.device_lock = self.locks / "device.lock"
        self.reserve_lock = self.locks / "reserve.lock"

    def run(self, run: object) -> RunPaths:
        """The paths of one run (its id is checked)."""
        return RunPaths(self.runs, check_run_id(run))

    def runs_present(self) -> list[RunPaths]:
        """Every run directory, by id."""
        try:
            names = sorted(os.listdir(self.runs))
        except OSError:
            return []
        return [RunPaths(self.runs, name) for name in names if RUN_ID.fullmatch(name)]

    def agent_file(self, sha256: str) -> Path:
        """Where an installed agent of this digest lies."""
        return self.agent / f"{check_sha256(sha256)}.pyz"

    def object(self, sha256: str) -> Path:
        """Where the content with this digest lies."""
        return self.cas / check_sha256(sha256)

    def create(self) -> None:
        """Make the root and its folders (mode 0700); refused where foreign, writable by others, or on a network.

        Refused too where it is / or the home folder: our rooms would lie among what is the user's.
        """
        for own, what in (("/", "the root of the file system"), (os.path.expanduser("~"), "your home folder")):
            if os.path.realpath(self.dir) == os.path.realpath(own):
                raise AgentError(
                    "refused",
                    f"state root {self.dir} is {what} itself",
                    next="set GX10_REPO_PATH to a folder of its own, such as ~/latentforge-state",
                )
        try:
            self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own(self.dir)
            kind = filesystem_of(self.dir)
            if kind in NETWORK_FILESYSTEMS:
                raise AgentError(
                    "refused",
                    f"state root {self.dir} lies on {kind}, where locks cannot be trusted",
                    next="set GX10_REPO_PATH to a folder on a local disk",
                )
            for folder in (self.agent, self.cas, self.builds, self.models, self.store, self.runs, self.locks):
                folder.mkdir(mode=0o700, exist_ok=True)
                _check_own(folder)
        except OSError as error:
            raise AgentError(
                "refused",
                f"state root {self.dir} cannot be made: {error.strerror}",
                next="set GX10_REPO_PATH to a folder that you may write",
            ) from None


def _check_own(folder: Path) -> None:
    """Refuse a folder of the state root, or where a link in its place leads, that others may change."""
    found = os.stat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if found.st_uid != os.geteuid():
        raise AgentError(
            "refused",
            f"state root {folder} belongs to uid {found.st_uid}, not to uid {os.geteuid()}",
            next="set GX10_REPO_PATH to a folder of your own",
        )
    if found.st_mode & 0o022:
        raise AgentError(
            "refused",
            f"state root {folder} has mode {stat.S_IMODE(found.st_mode):04o}: others may write into it",
            next=f"on the host: chmod 700 {folder}",
        )


def filesystem_of(path: Path) -> str | None:
    """The type of the filesystem that holds `path` (or its nearest ancestor that exists); None where unknown."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                if left.split()[2] == wanted:
                    return right.split()[0]
    except (OSError, IndexError):
        return None
    return None
