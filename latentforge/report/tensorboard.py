"""A run's numbers as an event file of TensorBoard, for those who live there.

The format in full, so that no library is needed to write it: a record is its length (8 bytes), that length's checksum
(4), the bytes, their checksum (4), all little-endian; the bytes are a protobuf ``Event``. Checksums are CRC-32C, masked
as TensorFlow does. The tests read what is written with TensorBoard's own reader.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from latentforge.evidence.reading import RunRecord, as_number
from latentforge.report import telling
from latentforge.report.words import plain

_SKIPPED = frozenset({"step", "steps"})
_STRING = 7  # DT_STRING of TensorFlow's types


def write_events(record: RunRecord, folder: Path) -> Path:
    """Write the event file of a run into ``folder/<run>`` and return its path; the same file when written again.

    Each number of a step is ``<model>/<name>``, each metric ``<split>/<model>/<name>``, with the steps and times (UTC)
    of the run's own events; not-a-number stays what it is. ``report`` is a text: what happened, and the verdicts.
    """
    times = [_seconds(event.wall) for event in record.events]
    last = max(times, default=0.0)
    path = folder / record.id / f"events.out.tfevents.{int(last)}.latentforge"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "wb") as file:
        file.write(_record(_event(min(times, default=0.0), version="brain.Event:2")))
        for wall, step, tag, value in _scalars(record):
            file.write(_record(_event(wall, step, _text_field(1, tag) + _float_field(2, value))))
        lines = [telling.sentence(record), *(verdict.line() for verdict in record.verdicts)]
        said = plain("\n\n".join(lines)).encode()
        file.write(_record(_event(last, 0, _text_summary("report", said))))
    os.replace(partial, path)
    return path


def _scalars(record: RunRecord) -> Iterator[tuple[float, int, str, float]]:
    for event in record.events:
        said, step = event.fields, event.fields.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
            continue
        wall, model = _seconds(event.wall), plain(said.get("model", "run"))
        if event.kind == "step":
            for name, value in said.items():
                number = as_number(value)
                if name not in _SKIPPED and number is not None:
                    yield wall, step, f"{model}/{plain(name)}", number
        elif event.kind == "metric" and (number := as_number(said.get("value"))) is not None:
            noise = f" at noise {said['noise']}" if "noise" in said else ""
            yield wall, step, plain(f"{said.get('split')}/{model}/{said.get('name')}{noise}"), number


def _seconds(wall: str) -> float:
    """Seconds since 1970; 0 for what is no time."""
    try:
        return datetime.fromisoformat(wall).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _event(wall: float, step: int = 0, value: bytes | None = None, version: str | None = None) -> bytes:
    """``Event``: wall_time 1, step 2, file_version 3, summary 5 with one value 1."""
    body = b"\x09" + struct.pack("<d", wall)
    body += b"\x10" + _varint(step) if step else b""
    body += _text_field(3, version) if version is not None else b""
    return body + (_bytes_field(5, _bytes_field(1, value)) if value is not None else b"")


def _text_summary(tag: str, said: bytes) -> bytes:
    """``Summary.Value`` of the text plugin: tag 1, tensor 8 (dtype 1, shape 2, string 8), metadata 9."""
    shape = _bytes_field(2, _bytes_field(2, b"\x08\x01"))
    tensor = b"\x08" + _varint(_STRING) + shape + _bytes_field(8, said)
    metadata = _bytes_field(1, _text_field(1, "text"))
    return _text_field(1, tag) + _bytes_field(8, tensor) + _bytes_field(9, metadata)


def _text_field(number: int, text: str) -> bytes:
    return _bytes_field(number, text.encode())


def _bytes_field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _float_field(number: int, value: float) -> bytes:
    try:
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    except OverflowError:  # beyond what 32 bits hold
        return _varint(number << 3 | 5) + struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", _masked(length)) + content + struct.pack("<I", _masked(content))


def _masked(content: bytes) -> int:
    crc = _crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def _crc32c(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
