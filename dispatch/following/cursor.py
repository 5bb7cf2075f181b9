"""How far a run's streams have been read, and the bytes read so far: kept on the laptop, so that reading resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dispatch.places import private_folder, write_atomic

STREAMS = ("events.jsonl", "launch.log")


class Reading:
    """The laptop's copy of a run's two streams, and the cursor of each.

    Bytes are written at the offset at which the host has them, before the cursor moves: a crash between the two repeats
    bytes, never loses or doubles them, and two commands that follow one run write the same bytes to the same place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        try:
            with open(self.folder / name, "rb") as stream:
                return stream.read(int(self.cursors[name].get("offset") or 0))
        except FileNotFoundError:
            return b""

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
            write_atomic(self._file, json.dumps(self.cursors).encode())
        return taken

    def _write(self, name: str, data: bytes, offset: int, anew: bool) -> None:
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if anew:
                os.ftruncate(descriptor, 0)
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
        finally:
            os.close(descriptor)

    def _size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return 0
