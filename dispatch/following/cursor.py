"""How far a run's streams have been read, and the bytes read so far: kept on the laptop, so that reading resumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispatch.places import private_folder, write_atomic

STREAMS = ("identity.json", "launch.log", "events.jsonl")
"""In the order in which the host reads them. An event is written before the line that tells the same, so the events
that are read after the log hold the event of every line of it."""

_CHUNK = 1 << 20
_KEPT = 9


class Reading:
    """The laptop's copy of a run's two streams, and the cursor of each.

    Bytes are written at the offset at which the host has them, before the cursor moves: a crash between the two repeats
    bytes, never loses or doubles them, and two commands that follow one run write the same bytes to the same place.
    The cursor is saved every ``every`` seconds and by ``save``; an old one makes bytes come again, to the same place.
    """

    def __init__(self, folder: Path, *, every: float = 1.0) -> None:
        self.folder = folder
        self._every = every
        self._saved = float("-inf")
        self._moved = False
        self._file = folder / "cursor.json"
        self.cursors: dict[str, dict[str, Any]] = {name: {} for name in STREAMS}
        try:
            saved = json.loads(self._file.read_text())
        except (OSError, ValueError):
            saved = {}
        for name in STREAMS:
            cursor = saved.get(name)
            if isinstance(cursor, dict) and self._size(name) >= int(cursor.get("offset") or 0):
                self.cursors[name] = cursor

    def stored(self, name: str) -> bytes:
        """The bytes read so far."""
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes read so far, a MiB at a time."""
        left = int(self.cursors[name].get("offset") or 0)
        try:
            with open(self.folder / name, "rb") as stream:
                while left > 0 and (chunk := stream.read(min(left, _CHUNK))):
                    left -= len(chunk)
                    yield chunk
        except FileNotFoundError:
            return

    def take(self, answers: dict[str, Any], order: list[str], payload: bytes) -> dict[str, tuple[bytes, bool]]:
        """Store one reply of ``read``; returns for each stream its new bytes, and whether it began anew."""
        private_folder(self.folder)
        taken: dict[str, tuple[bytes, bool]] = {}
        position = 0
        for name in order:
            answer = answers[name]
            data = payload[position : position + answer["bytes"]]
            position += len(data)
            anew = bool(answer["truncated"] or answer["replaced"])
            if data or anew:
                self._write(name, data, int(answer["cursor"]["offset"]) - len(data), anew)
            taken[name] = (data, anew)
        moved = {name: answers[name]["cursor"] for name in order if not answers[name]["missing"]}
        if any(self.cursors[name] != cursor for name, cursor in moved.items()):
            self.cursors.update(moved)
            self._moved = True
        if time.monotonic() - self._saved >= self._every:
            self.save()
        return taken

    def save(self) -> None:
        """Save the cursor, where it has moved."""
        if self._moved:
            write_atomic(self._file, json.dumps(self.cursors).encode())
            self._saved, self._moved = time.monotonic(), False

    def _write(self, name: str, data: bytes, offset: int, anew: bool) -> None:
        if anew:
            self._keep_aside(name)
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
        finally:
            os.close(descriptor)

    def _keep_aside(self, name: str) -> None:
        """Keep what was read of a file that the host has no more, as ``launch.log.1`` and so on; the oldest stay."""
        if self._size(name) == 0:
            return
        aside = (self.folder / f"{name}.{number}" for number in range(1, _KEPT + 1))
        free = next((path for path in aside if not path.exists()), self.folder / f"{name}.{_KEPT}")
        os.replace(self.folder / name, free)

    def _size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return 0
