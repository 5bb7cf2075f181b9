"""Following a run: bytes of its streams from a cursor on, with the state sampled before the bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .paths import Root, RunPaths
from .processes import boot_clock
from .protocol import AgentError, Arguments, Reply
from .state import RESTING, derive

LARGEST_READ = 16 << 20
LONGEST_WAIT = 20.0
LONGEST_FOLLOW = 120.0
_PAUSE = 0.03
_STATE_EVERY = 0.15
_STUCK_SECONDS = 60
_GAP = 0.05
_FIRST_ANSWER = 64 << 10
_HEAD, _TAIL = 256, 4096


def read(root: Root, args: Arguments) -> Reply:
    """Up to `max` bytes over all streams; with nothing new, wait up to `wait` seconds for bytes or another state.

    `eof` says that no byte will come any more by itself (of a run that is absent or only reserved, too). A cursor is
    {inode, offset, head, tail}; `head` (digest of the first bytes) tells a file replaced under a reused inode, `tail`
    (of the last ones before the offset) one that was truncated and grew beyond the offset between two looks.
    """
    run = root.run(args.text("run"))
    streams = args.table("streams")
    most = int(args.number("max", 1 << 20, low=1, high=LARGEST_READ))
    wait = args.number("wait", 0.0, low=0.0, high=LONGEST_WAIT)
    known = args.optional_text("known_state")
    args.done()
    files = {name: _Stream(name, run, cursor) for name, cursor in streams.items()}
    deadline = time.monotonic() + wait
    state = derive(run)
    first = known if known is not None else state["state"]
    sampled = time.monotonic()
    while True:
        news = any(stream.has_news() for stream in files.values())
        late = time.monotonic() >= deadline
        if news or late or state["state"] != first or state["state"] in RESTING:
            break
        time.sleep(_PAUSE)
        if time.monotonic() - sampled >= _STATE_EVERY:
            state, sampled = derive(run), time.monotonic()
    # Sampled before the read: with "finished" in hand, the bytes read next are all there will ever be.
    state = derive(run)
    left, payload, answers = most, b"", {}
    for name, stream in files.items():
        data, answer = stream.take(left, state["state"] in RESTING)
        left -= len(data)
        payload += data
        answers[name] = answer
    return Reply({"run": run.id, "state": state, "streams": answers, "order": list(files)}, payload)


def follow(root: Root, args: Arguments) -> Iterator[Reply]:
    """What ``read`` answers, again and again over one channel, each as soon as there is something to say.

    At least every `quiet` seconds an answer, so that silence means a lost link; after `seconds` the last one (`last`),
    and the reader asks again: a process that nobody listens to any more does not outlive that by more than a minute.
    Streams are read in the order in which they are named, each up to `max` bytes an answer; `clock` is the host's boot
    clock, on which the events' `t` and the beat's `clock` are.
    """
    run = root.run(args.text("run"))
    streams = args.table("streams")
    most = int(args.number("max", 1 << 20, low=1, high=LARGEST_READ))
    seconds = args.number("seconds", 30.0, low=0.0, high=LONGEST_FOLLOW)
    quiet = args.number("quiet", 5.0, low=0.05, high=60.0)
    args.done()
    files = {name: _Stream(name, run, cursor) for name, cursor in streams.items()}
    # A pipe that nobody empties blocks a write for as long as sshd holds it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(seconds) + _STUCK_SECONDS)
    end = time.monotonic() + seconds
    told: str | None = None
    size = min(most, _FIRST_ANSWER)
    while True:
        state = _wait_for_news(run, files, told, min(time.monotonic() + quiet, end))
        told = state["state"]
        payload, answers = [], {}
        for name, stream in files.items():
            data, answers[name] = stream.take(size, told in RESTING)
            payload.append(data)
        last = time.monotonic() >= end or all(answer["eof"] for answer in answers.values())
        result = {"run": run.id, "state": state, "streams": answers, "order": list(files), "clock": boot_clock()}
        yield Reply({**result, "last": last}, b"".join(payload))
        if last:
            return
        if any(len(data) == size for data in payload):
            size = min(most, 2 * size)  # over a slow link the first lines are not to wait for megabytes
        else:
            time.sleep(_GAP)  # a run that tells something all the time must not keep a core busy with telling it


def _wait_for_news(run: RunPaths, files: dict[str, _Stream], told: str | None, until: float) -> dict[str, Any]:
    """Wait for bytes, another state or the time; the state returned was sampled before any byte is read."""
    state, sampled = derive(run), time.monotonic()
    while told is not None and state["state"] == told and told not in RESTING and time.monotonic() < until:
        if any(stream.has_news() for stream in files.values()):
            return derive(run) if time.monotonic() - sampled > _PAUSE else state
        time.sleep(_PAUSE)
        if time.monotonic() - sampled >= _STATE_EVERY:
            state, sampled = derive(run), time.monotonic()
    return state


class _Stream:
    """One file of a run and how far the reader has come in it."""

    def __init__(self, name: str, run: RunPaths, cursor: Any) -> None:
        paths: dict[str, Path] = {"events.jsonl": run.events, "launch.log": run.log, "identity.json": run.identity}
        if name not in paths:
            raise AgentError("protocol", f"read: stream {name!r} is none of {', '.join(paths)}")
        cursor = {} if cursor is None else cursor
        if not isinstance(cursor, dict):
            raise AgentError("protocol", f"read: the cursor {cursor!r} of {name} is not an object")
        self.path = paths[name]
        self.inode = _count(cursor.get("inode"), name)
        self.offset = _count(cursor.get("offset"), name) or 0
        self.head = cursor.get("head")
        self.tail = cursor.get("tail")

    def has_news(self) -> bool:
        """Whether a read would give bytes or a marker."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return found.st_size != self.offset or (self.inode is not None and found.st_ino != self.inode)

    def take(self, most: int, resting: bool) -> tuple[bytes, dict[str, Any]]:
        """The bytes from the cursor on, and the answer: their length, the new cursor, markers, whether that is all."""
        answer: dict[str, Any] = {"bytes": 0, "truncated": False, "replaced": False, "missing": False, "eof": resting}
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            answer.update(missing=True, cursor=self._cursor(), size=0)
            return b"", answer
        try:
            found = os.fstat(fd)
            before, block = min(self.offset, _TAIL), b""
            if self.inode is not None and found.st_ino != self.inode:
                answer["replaced"] = True
            elif self.head is not None and self.head != _digest(os.pread(fd, min(_HEAD, self.offset), 0)):
                answer["truncated" if found.st_size < self.offset else "replaced"] = True
            else:
                # What was read last comes in one piece with what is new: nothing can be changed between the two.
                block = _bytes(fd, self.offset - before, before + most)
                known = self.tail is None or self.tail == _digest(block[:before])
                answer["truncated"] = len(block) < before or not known
            if answer["replaced"] or answer["truncated"]:
                self.offset, before, self.head = 0, 0, None
                block = _bytes(fd, 0, most)
            self.inode = found.st_ino
            data = block[before:]
            if self.head is None or self.offset == before:
                self.head = _digest(block[:_HEAD] if self.offset == before else os.pread(fd, _HEAD, 0))
            self.offset += len(data)
            self.tail = _digest(block[-_TAIL:])
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        answer.update(bytes=len(data), cursor=self._cursor(), size=size, eof=resting and self.offset >= size)
        return data, answer

    def _cursor(self) -> dict[str, Any]:
        return {"inode": self.inode, "offset": self.offset, "head": self.head, "tail": self.tail}


def _count(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise AgentError("protocol", f"read: the cursor of {name} holds {value!r}, which is not a count")
    return value


def _bytes(fd: int, offset: int, most: int) -> bytes:
    data = os.pread(fd, most, offset)
    while data and len(data) < most and (chunk := os.pread(fd, most - len(data), offset + len(data))):
        data += chunk
    return data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
