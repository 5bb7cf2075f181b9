"""What one run of the bench measured, as a table and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from latentforge.kernels.bench.contest import Line
from latentforge.kernels.bench.floor import Floor
from latentforge.kernels.bench.machine import SHOWN, Machine


@dataclass
class Section:
    """One operator on one input: the bytes that must move, and who moved them how fast.

    ``streams`` are bytes a second of the memory, measured in turns with the lines. ``rounding_error`` is what storing
    the exact result in this precision costs alone. ``shape`` names the sizes (N, V, H, k).
    """

    op: str
    title: str
    shape: dict[str, int]
    dtype: str
    threads: int
    temperature: float
    floor: Floor
    lines: list[Line]
    streams: dict[str, float] = field(default_factory=dict)
    error_name: str = "gradient error"
    rounding_error: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of the stream that the floor is counted with (on CUDA: the device's copy)."""
        return self.streams.get(self.floor.stream, self.streams.get("copy"))

    @property
    def floor_ms(self) -> float | None:
        """Milliseconds that nobody can do without: those of the bare products, or of the floor's bytes."""
        for line in self.lines:
            if line.role == "floor":
                return line.median
        return None if self.bandwidth is None else self.floor.bytes / self.bandwidth * 1e3

    @property
    def against_products(self) -> bool:
        """Whether the floor is the time of the bare products rather than of bytes."""
        return any(line.role == "floor" for line in self.lines)

    def share(self, line: Line) -> float | None:
        """The floor's time over the line's: 1 at the floor."""
        if line.median is None or self.floor_ms is None:
            return None
        return self.floor_ms / line.median

    def ratio(self, line: Line, role: str) -> float | None:
        """How many times slower the best line of a role (``eager``, ``compile``, ``peer``) is than this one."""
        times = [other.median for other in self.lines if other.role == role and other.median is not None]
        return min(times) / line.median if times and line.median is not None else None


@dataclass
class Report:
    """All of one run of ``latentforge kernels bench``; ``started`` is UTC, ``source`` names the code."""

    machine: Machine
    sections: list[Section]
    started: str
    source: str
    remarks: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything as data, with the figures that the table derives."""
        said: dict[str, Any] = {
            "machine": asdict(self.machine),
            "started": self.started,
            "source": self.source,
            "remarks": self.remarks,
            "sections": [],
        }
        for section in self.sections:
            entry = asdict(section)
            entry["floor_ms"] = section.floor_ms
            for line, shown in zip(section.lines, entry["lines"], strict=True):
                shown["median_ms"] = line.median
                shown["share_of_floor"] = section.share(line)
                shown["vs_eager"] = section.ratio(line, "eager")
                shown["vs_compile"] = section.ratio(line, "compile")
                shown["vs_peer"] = section.ratio(line, "peer")
            said["sections"].append(entry)
        return said


def render(report: Report) -> str:
    """The report as a table a section."""
    machine = report.machine
    on = machine.processor if machine.device == "cpu" else f"{machine.device}, {machine.processor}"
    text = [
        f"{on}, {machine.cores} processors seen, torch {machine.torch}, kernels {machine.extension[:12]}"
        f" ({machine.cpu_variant})",
        f"source {report.source}, {report.started}",
    ]
    for section in report.sections:
        text += ["", *_section(section)]
    if report.remarks:
        text += ["", *report.remarks]
    return "\n".join(text)


def _section(section: Section) -> list[str]:
    sizes = " ".join(f"{name}={size}" for name, size in section.shape.items())
    many = "s" if section.threads != 1 else ""
    temperature = f" T={section.temperature:g}" if section.temperature else ""
    heading = f"{section.op}, {section.title}: {sizes} {section.dtype}{temperature}, {section.threads} thread{many}"
    floor = section.floor
    counted = f"{floor.formula} = {floor.bytes / 1e6:.1f} MB, {floor.flops / 1e9:.2f} Gop"
    if section.floor_ms is None:
        said = f"floor not measured; {counted}"
    elif section.against_products:
        said = f"floor = the bare products, {section.floor_ms:.1f} ms; {counted}"
    else:
        stream = floor.stream if floor.stream in section.streams else "copy"
        said = (
            f"floor = {counted} at {SHOWN[stream]} {section.streams[stream] / 1e9:.1f} GB/s = {section.floor_ms:.1f} ms"
        )
    if section.rounding_error is not None:
        said += f"; rounding the exact gradient to {section.dtype} alone: {section.rounding_error:.2e}"
    width = max([26, *(len(line.backend) for line in section.lines if line.median is not None)])
    rows = [
        heading,
        said,
        f"  {'backend':<{width}}{'median':>12}{'of floor':>10}{'vs eager':>10}{'vs compile':>12}"
        f"  {section.error_name:>14}",
    ]
    missing: dict[str, list[str]] = {}
    for line in section.lines:
        if line.median is None:
            missing.setdefault(line.note or "no turn", []).append(line.backend)
            continue
        cells = [
            f"  {line.backend:<{width}}{line.median:>9.{1 if line.median >= 10 else 2}f} ms",
            f"{_percent(section.share(line)):>10}",
            f"{_times(section.ratio(line, 'eager')):>10}",
            f"{_times(section.ratio(line, 'compile')):>12}",
            "" if line.error is None else f"  {line.error:>14.2e}",
        ]
        rows.append("".join(cells))
        if len(line.chunks) > 1:
            tried = [
                f"{count} rows {'could not run' if time is None else f'{time:.0f} ms'}"
                for count, time in line.chunks.items()
            ]
            rows.append(f"      tried {', '.join(tried)}")
        if line.note:
            rows.append(f"      {line.note}")
    rows += [f"  not run: {', '.join(names)}: {because}" for because, names in missing.items()]
    return rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}x"
