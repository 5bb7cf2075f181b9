"""The ledger of measurements: one CSV row a measured line, stamped with everything that it depends on.

Rows are appended and never changed. The header is written when the file is created; a file with another header is
refused, since its rows would be read under the wrong names.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.kernels.bench.report import Report
from latentforge.kernels.bench.run import CHECKOUT

COLUMNS = (
    "utc",
    "source",
    "extension",
    "architecture",
    "processor",
    "cores",
    "device",
    "threads",
    "torch",
    "triton",
    "op",
    "case",
    "backend",
    "role",
    "shape",
    "dtype",
    "temperature",
    "floor_bytes",
    "flops",
    "floor_formula",
    "stream",
    "stream_gb_s",
    "floor_ms",
    "median_ms",
    "turns",
    "percent_of_floor",
    "vs_eager",
    "vs_compile",
    "error",
)


def default_path() -> Path:
    """``evidence/kernels.csv`` of the checkout that this code runs from; RefusedError where there is none."""
    if not (CHECKOUT / "CMakeLists.txt").is_file():
        raise RefusedError(
            "this installation is no checkout: it has no evidence/kernels.csv", next="name a file: --ledger-file PATH"
        )
    return CHECKOUT / "evidence" / "kernels.csv"


def rows(report: Report) -> Iterator[dict[str, str]]:
    """The report's measured lines as rows; what was not measured has no row."""
    machine = report.machine
    for section in report.sections:
        stream = section.floor.stream if section.floor.stream in section.streams else "copy"
        for line in section.lines:
            if line.median is None:
                continue
            share = section.share(line)
            values: dict[str, object] = {
                "utc": report.started,
                "source": report.source,
                "extension": machine.extension,
                "architecture": machine.architecture,
                "processor": machine.processor,
                "cores": machine.cores,
                "device": machine.device,
                "threads": section.threads,
                "torch": machine.torch,
                "triton": machine.triton,
                "op": section.op,
                "case": section.title,
                "backend": line.backend,
                "role": line.role,
                "shape": " ".join(f"{name}={size}" for name, size in section.shape.items()),
                "dtype": section.dtype,
                "temperature": f"{section.temperature:g}",
                "floor_bytes": section.floor.bytes,
                "flops": section.floor.flops,
                "floor_formula": "bare products" if section.against_products else section.floor.formula,
                "stream": stream,
                "stream_gb_s": _number(section.streams.get(stream), 1e-9),
                "floor_ms": _number(section.floor_ms),
                "median_ms": _number(line.median),
                "turns": len(line.milliseconds),
                "percent_of_floor": _number(share, 100.0),
                "vs_eager": _number(section.ratio(line, "eager")),
                "vs_compile": _number(section.ratio(line, "compile")),
                "error": "" if line.error is None else f"{line.error:.3e}",
            }
            yield {name: "" if values[name] is None else str(values[name]) for name in COLUMNS}


def append(path: Path, report: Report) -> int:
    """Add the report's rows to the file, all of them or none; returns how many. RefusedError for a foreign file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    count = 0
    for row in rows(report):
        writer.writerow(row)
        count += 1
    header = ",".join(COLUMNS) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size:
            found = os.pread(handle, len(header.encode()) + 1, 0).decode("utf-8", "replace").partition("\n")[0]
            if found + "\n" != header:
                raise RefusedError(
                    f"{path} begins with {found[:60]!r}, not with this version's columns",
                    next="name another file: --ledger-file PATH",
                )
            if os.pread(handle, 1, size - 1) != b"\n":
                raise RefusedError(f"{path} ends in the middle of a row", next="mend its last line by hand")
        _write(handle, ((header if not size else "") + text.getvalue()).encode(), size)
    finally:
        os.close(handle)
    return count


def _write(handle: int, data: bytes, size: int) -> None:
    """All of ``data``, or the file as long as it was: a full disk leaves no half row."""
    try:
        written = os.write(handle, data)
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes were written")
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise


def _number(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.4g}"
