"""What a run reads, on the disk of each of its hosts: listed by digest where it lies, received where it is lacking.

A follower's copies lie below its own run folder, ``mirror/runs/<run>`` beside each other as the leader's do, so that
its processes read what the leader's read by the same names. What another run of this host has with the same digest is
linked and not moved.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from latentforge.errors import FailedError, RefusedError
from latentforge.events import EventLog
from latentforge.evidence.digests import file_sha256, tree_files
from latentforge.spec.endurance import endurance_of
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import InputRef, LaunchRecord, RunDir
from latentforge.train.best import BELOW
from latentforge.train.checkpoint import is_whole, step_folder, steps_in
from latentforge.train.hosts.wire import CHUNK, Link, refuse_ended

_RECORDS = ("identity.json", "effective.json", "events.jsonl")
_PARTIAL = ".partial-mirror"
MIB = 1 << 20
_SYNCED = 256 * MIB
"""What is received between two waits for the disk: one wait for all of a large file would look like a lost host."""
_SAID_SECONDS = 1.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Lent:
    """A file that a run reads: its ``path`` in the mirror, its content, and where it ``lies`` on the leader."""

    path: str
    bytes: int
    sha256: str
    lies: str


@dataclass(frozen=True)
class Reading:
    """All that the processes of a run read: its identity and launch record, and the files."""

    identity: str
    launch: dict[str, Any]
    files: list[Lent]

    def as_json(self) -> dict[str, Any]:
        """What a follower is told."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Reading:
        """What a leader told. RefusedError for a file that would lie outside the mirror."""
        files = [Lent(**one) for one in value["files"]]
        for one in files:
            parts = PurePosixPath(one.path).parts
            outside = one.path.startswith("/") or len(parts) < 2 or ".." in parts or parts[0] not in ("runs", "content")
            # A name that is written to before a file has its own must not be another file's, which may be linked.
            if outside or any(part.endswith(_PARTIAL) for part in parts):
                raise RefusedError(f"{one.path!r} lies outside of what a run reads")
        return cls(value["identity"], value["launch"], files)


def read_by(run: RunDir) -> Reading:
    """What the processes of ``run`` will read: its inputs, and what it or its predecessors left to go on from."""
    launch, files, resolved = run.load_launch(), list[Lent](), dict[str, InputRef]()
    for name, ref in launch.resolved.items():
        source = run.input_run(name)
        if source is not None:
            files += _of_run(source)
        elif "path" in ref:
            path = Path(ref["path"])
            below = f"content/{ref['sha256']}/{path.name}"
            files += _of_tree(path, below) if path.is_dir() else [_lent(path, below)]
            ref = {**ref, "path": below}
        resolved[name] = ref
    for one, checkpoints in _left(run):
        for name in (*(() if one.run == run.run else ("identity.json", "launch.json")), "events.jsonl"):
            if (one.path / name).is_file():
                files.append(_lent(one.path / name, f"runs/{one.run}/{name}"))
        files += checkpoints
    known = {one.path: one for one in files}
    identity = run.identity_file.read_text(encoding="utf-8")
    return Reading(identity, replace(launch, resolved=resolved).as_json(), list(known.values()))


def _of_run(source: RunDir) -> Iterator[Lent]:
    """A run that is an input: its products by the digests that its end recorded, which were held against the files
    when this run began, and what it says of itself."""
    recorded: dict[str, str] = {}
    if source.artifacts_file.is_file():
        files = json.loads(source.artifacts_file.read_bytes())["files"]
        recorded = {one["path"]: one["sha256"] for one in files if one["path"].startswith("out/")}
    for name in _RECORDS:
        if (source.path / name).is_file():
            yield _lent(source.path / name, f"runs/{source.run}/{name}")
    for name, path in tree_files(source.out) if source.out.is_dir() else ():
        if not name.startswith("checkpoints/"):
            yield _lent(path, f"runs/{source.run}/out/{name}", recorded.get(f"out/{name}"))


def _left(run: RunDir) -> Iterator[tuple[RunDir, list[Lent]]]:
    """This run and all attempts before it, each with the checkpoints that a resume looks at: of each model, of which no
    later attempt has a whole one, those down to the newest whole one, and the best until then."""
    one: RunDir | None = run
    found = set[Path]()
    while one is not None and one.path.is_dir():
        files = list[Lent]()
        for folder in _models(one):
            below = folder.relative_to(one.checkpoints)
            if below in found:
                continue
            lent, step = _down_to_whole(one, folder)
            files += lent
            if step is not None:
                found.add(below)
                # That of the last step itself may have to be found again: then the one before it is the best.
                files += _down_to_whole(one, folder / BELOW, until=step, below=step)[0]
        yield one, files
        one = one.predecessor()


def _down_to_whole(
    run: RunDir, folder: Path, *, until: float = math.inf, below: float = math.inf
) -> tuple[list[Lent], int | None]:
    """The checkpoints of a folder, of at most ``until`` steps, from the newest down to the first whole one of less than
    ``below``, and that one's step (None: there is none). Torn ones go along as they are: each host is to skip them."""
    files = list[Lent]()
    for step in reversed(steps_in(folder)):
        if step <= until:
            path = step_folder(folder, step)
            lent = list(_of_tree(path, f"runs/{run.run}/{path.relative_to(run.path).as_posix()}"))
            files += lent
            if step < below and is_whole(path, {Path(one.path).name: one.sha256 for one in lent}):
                return files, step
    return files, None


def _models(run: RunDir) -> Iterator[Path]:
    """Where the checkpoints of each of a run's models lie."""
    yield run.checkpoints
    for path in run.checkpoints.glob("[!.]*"):
        if path.is_dir() and path.name != BELOW and not path.name.startswith("step-"):
            yield path


def _of_tree(folder: Path, below: str) -> Iterator[Lent]:
    for name, path in tree_files(folder):
        yield _lent(path, f"{below}/{name}")


def _lent(path: Path, name: str, sha256: str | None = None) -> Lent:
    if sha256 is not None:
        return Lent(name, path.stat().st_size, sha256, str(path))
    # Of a log that goes on being written it is what is there now.
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for part in _parts(file, size):
            digest.update(part)
    return Lent(name, size, digest.hexdigest(), str(path))


def _parts(file: Any, size: int) -> Iterator[bytes]:
    while size:
        part = file.read(min(CHUNK, size))
        if not part:
            raise FailedError(f"{file.name} became shorter while it was read")
        size -= len(part)
        yield part


def lend(link: Link, files: list[Lent], progress: Progress) -> None:
    """Send files, one after the other."""
    done, total = 0, sum(one.bytes for one in files)
    for one in files:
        link.tell("file", path=one.path)
        with open(one.lies, "rb") as file:
            for part in _parts(file, one.bytes):
                link.tell("part", part)
                done += len(part)
                progress(done, total)


class Throttled:
    """Progress in bytes of a phase, as an event a second at most, and one at its end."""

    def __init__(self, log: EventLog, name: str) -> None:
        self._log, self._name, self._said = log, name, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._said > _SAID_SECONDS:
            self._said = time.monotonic()
            self._log.progress(self._name, done, total)


class Mirror:
    """The folder in which a follower keeps what its processes read; ``own`` is the follower's run."""

    def __init__(self, own: RunDir) -> None:
        self._own = own
        self.root = own.path / "mirror"

    def leader(self, reading: Reading, run: str) -> RunDir:
        """The leader's run as its processes here find it. Refused where what was told is not that run."""
        RunIdentity.from_bytes(reading.identity.encode(), run_id=run)
        found = RunDir(self.root / "runs" / run)
        found.path.mkdir(parents=True, exist_ok=True)
        found.identity_file.write_text(reading.identity, encoding="utf-8")
        launch = LaunchRecord(**reading.launch)
        resolved = {
            name: {**ref, "path": str(self.root / ref["path"])} if "path" in ref else ref
            for name, ref in launch.resolved.items()
        }
        found.launch_file.write_text(json.dumps(replace(launch, resolved=resolved).as_json(), indent=1, sort_keys=True))
        return found

    def lacking(self, reading: Reading, progress: Progress) -> list[Lent]:
        """The files that have to be sent. What is here under its name stays where it is whole, what another run of this
        host has is linked; what is not listed goes, as an attempt would otherwise go on from it."""
        told = {one.path for one in reading.files}
        for path in [*self.root.rglob("*")]:
            if not path.is_dir() and path.relative_to(self.root).as_posix() not in told:
                path.unlink()
        lacking, done, total = [], 0, sum(one.bytes for one in reading.files)
        for one in reading.files:
            if not self._found(one):
                lacking.append(one)
            done += one.bytes
            progress(done, total)
        return lacking

    def _found(self, one: Lent) -> bool:
        here = self.root / one.path
        for path in (here, *self._elsewhere(one)):
            found = Path(os.path.realpath(path))
            if not found.is_file() or found.stat().st_size != one.bytes or file_sha256(found) != one.sha256:
                continue
            if path != here:
                here.parent.mkdir(parents=True, exist_ok=True)
                here.unlink(missing_ok=True)
                _link(found, here)
            return True
        here.unlink(missing_ok=True)
        return False

    def _elsewhere(self, one: Lent) -> Iterator[Path]:
        """Where else on this host the same may lie: under the leader's own path, where both keep models alike, among
        the runs of this host, and in what other runs mirrored."""
        runs = self._own.path.parent
        if one.path.startswith("content/"):
            yield Path(one.lies)
        else:
            yield runs.parent / one.path
        yield from (path / "mirror" / one.path for path in sorted(runs.glob("follow-*")) if path != self._own.path)

    def require_room(self, lacking: Iterable[Lent]) -> None:
        """Refuse files for which the disk has no room."""
        needed = sum(one.bytes for one in lacking)
        floor = endurance_of(self._own).disk_floor_mib * MIB
        found = os.statvfs(self._own.path)
        free = found.f_bavail * found.f_frsize
        if needed and needed + floor > free:
            raise RefusedError(
                f"{free / MIB:.0f} MiB are free for what the run reads: {needed / MIB:.0f} are to be mirrored, and "
                f"endurance.disk_floor_mib = {floor / MIB:.0f} are to stay free",
                next="make room on it, or lower endurance.disk_floor_mib",
            )

    def receive(self, link: Link, lacking: Iterable[Lent], progress: Progress) -> None:
        """Take the files that were asked for; each has its name once its bytes are on the disk and have its digest.

        FailedError where they have another.
        """
        wanted = list(lacking)
        done, total = 0, sum(one.bytes for one in wanted)
        for one in wanted:
            _expect(link, "file", path=one.path)
            final = self.root / one.path
            final.parent.mkdir(parents=True, exist_ok=True)
            partial, digest, left = final.with_name(final.name + _PARTIAL), hashlib.sha256(), one.bytes
            partial.unlink(missing_ok=True)
            with open(partial, "xb") as file:
                while left:
                    part = _expect(link, "part")
                    file.write(part)
                    digest.update(part)
                    left, done = left - len(part), done + len(part)
                    if left // _SYNCED != (left + len(part)) // _SYNCED:
                        file.flush()
                        os.fsync(file.fileno())
                    progress(done, total)
                file.flush()
                os.fsync(file.fileno())
            if left or digest.hexdigest() != one.sha256:
                partial.unlink()
                raise FailedError(
                    f"{one.path} came with sha256 {digest.hexdigest()[:12]}…, and is {one.sha256[:12]}… on the leader",
                    next="look at the link and the leader's disk, then:  latentforge dispatch go --attempt next",
                )
            os.replace(partial, final)


def _expect(link: Link, kind: str, **fields: Any) -> bytes:
    message = link.take()
    if message.kind != kind or message.fields != fields:
        refuse_ended(link, message)
        raise FailedError(f"host {link.peer} told {message.kind} {message.fields} where {kind} {fields} was to come")
    return message.content


def _link(source: Path, target: Path) -> None:
    """The same content under another name: the same file where the disk is the same, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        partial = target.with_name(target.name + _PARTIAL)
        partial.unlink(missing_ok=True)
        shutil.copyfile(source, partial)
        os.replace(partial, target)
