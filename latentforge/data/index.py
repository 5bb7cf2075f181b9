"""The index of a corpus, kept on disk: a record a document, read back in the order in which documents are packed."""

from __future__ import annotations

import hashlib
import heapq
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentforge.data.split import is_heldout

# sha256 of the name; number of the file, line (0: the file is the document), first byte, bytes; sha256 of the text.
_RECORD = struct.Struct("<32sIQQQ32s")
_SORTED_AT_ONCE = 1 << 17
_READ_AT_ONCE = 1 << 10


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document lies: ``length`` bytes from ``start`` in the file ``file``, which it begins in ``line``."""

    file: int
    line: int
    start: int
    length: int
    sha256: bytes


class Index:
    """Documents in the order of the sha256 of their names: a fixed shuffle without a seed.

    The digests of names are spread evenly, whatever the names, so neighbours in the corpus do not stay neighbours.
    Memory holds a bounded number of records; sorted runs of them lie in a nameless file in ``scratch``, which is gone
    with the process.
    """

    def __init__(self, scratch: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=scratch, prefix=".index-")  # noqa: SIM115 (lives as long as the index)
        self._runs: list[tuple[int, int]] = []
        self._held: list[bytes] = []
        self._counts, self._bytes = [0, 0], [0, 0]

    def add(self, name: str, place: Place) -> None:
        """One more document; no two have the same name."""
        side = is_heldout(place.sha256)
        self._counts[side] += 1
        self._bytes[side] += place.length
        key = hashlib.sha256(name.encode()).digest()
        self._held.append(_RECORD.pack(key, place.file, place.line, place.start, place.length, place.sha256))
        if len(self._held) >= _SORTED_AT_ONCE:
            self._write_run()

    def count(self, *, heldout: bool) -> int:
        """Documents of a side of the split."""
        return self._counts[heldout]

    def bytes(self, *, heldout: bool) -> int:
        """Bytes that the documents of a side have in their files."""
        return self._bytes[heldout]

    def places(self, *, heldout: bool) -> Iterator[Place]:
        """The documents of a side in their order."""
        self._write_run()
        # Records begin with their key, so their order as bytes is the order of the keys.
        for record in heapq.merge(*(self._read_run(*run) for run in self._runs)):
            place = Place(*_RECORD.unpack(record)[1:])
            if is_heldout(place.sha256) is heldout:
                yield place

    def _write_run(self) -> None:
        if self._held:
            self._held.sort()
            self._runs.append((self._file.seek(0, os.SEEK_END), len(self._held)))
            self._file.write(b"".join(self._held))
            self._file.flush()
            self._held = []

    def _read_run(self, begin: int, count: int) -> Iterator[bytes]:
        size = _RECORD.size
        for first in range(0, count, _READ_AT_ONCE):
            wanted = min(_READ_AT_ONCE, count - first) * size
            block = os.pread(self._file.fileno(), wanted, begin + first * size)
            yield from (block[at : at + size] for at in range(0, wanted, size))
