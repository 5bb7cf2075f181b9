"""The report in a terminal: what the page shows, in its order and in lines; of the samples the first."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from latentforge.report import glance, telling
from latentforge.report.axes import Axis, drawable, smoothed
from latentforge.report.chart import Chart, Mark, axes, bytes_label, last_told, window
from latentforge.report.comparison import Comparison
from latentforge.report.page import Section
from latentforge.report.words import fitted, number, one_line, plain
from latentforge.verdicts import Outcome

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 40

Accent = Callable[[str], str]


def lines(section: Section, *, columns: int, accent: Accent = str) -> list[str]:
    """One run; ``accent`` marks the words that carry the outcome, ``columns`` is the width that is kept."""
    record = section.record
    told = [f"{accent(telling.state(record).upper())}  {record.id}", ""]
    told += _wrapped(telling.sentence(record), columns)
    if record.verdicts:
        told.append("")
        for verdict in sorted(record.verdicts, key=lambda one: one.outcome):
            word = verdict.outcome.name if verdict.outcome is Outcome.PASS else accent(verdict.outcome.name)
            told += _hanging(
                f"{word}{' ' * (8 - len(verdict.outcome.name))}{verdict.falsifier}", 33, verdict.text, columns
            )
    told += ["", *_hanging("evidence", 10, "; ".join([section.standing.line, *section.standing.problems]), columns)]
    told += _figures(glance.figures(record), columns)
    told += _charts("what it learned", section.learning, columns)
    told += _charts("quality against compute", section.quality, columns)
    told += _speeds(section, columns)
    told += _charts("how it ran", section.working, columns)
    counted = glance.teacher(record)
    if counted:
        said = ", ".join(f"{one_line(name)} {one_line(value)}" for name, value in counted)
        told += ["", *_hanging("counted of the teacher", 24, said, columns)]
    told += _timeline(glance.timeline(record), columns)
    noted = [glance.compile_line(record), *glance.compiles(record), *glance.checkpoints(record)]
    told += [row for line in noted if line for row in _hanging(" ", 2, one_line(line), columns)]
    warnings = [*section.wrong, *record.warnings, *record.unread]
    if warnings:
        told += ["", "warnings", *(line for one in warnings for line in _hanging(" ", 2, one, columns))]
    for sample in section.samples[:1]:
        more = f", the first of {number(len(section.samples))}" if len(section.samples) > 1 else ""
        told += ["", f"a sample{more}", *_hanging("  ", 2, one_line(sample.prompt), columns)]
        for who, text in sample.continued:
            told += _hanging(f"  {one_line(who)}", 19, one_line(text), columns)
    for each in record.differences:
        told += [
            "",
            *_hanging(
                "DIFFERS", 10, f"{each['field']}: {each['requested']} asked, {each['effective']} in force", columns
            ),
        ]
    return told


def compared_lines(compared: Comparison, *, columns: int, accent: Accent = str) -> list[str]:
    """Several runs beside one another."""
    told = []
    for row in compared.rows:
        told += [f"{row.name}  {accent(row.state.upper())}", *_figures(row.figures, columns)[1:], ""]
    told += [line for note in compared.notes for line in _wrapped(note, columns)]
    told += _charts("side by side", compared.charts, columns)
    if compared.fields:
        told += ["", f"what was different  ({', '.join(row.name for row in compared.rows)})"]
        for field in compared.fields:
            values = ["not there" if value is None else one_line(value) for value in field.values]
            told += _hanging(f"  {one_line(field.name)}", 30, " | ".join(values), columns)
    return told


def _speeds(section: Section, columns: int) -> list[str]:
    told = ["", "how fast it writes"] if section.contestants else []
    wide = min(30, max((len(one_line(one.name)) for one in section.contestants), default=0))
    for one in section.contestants:
        told += _hanging(f"  {fitted(one.name, wide)}", wide + 4, one.told, columns)
    return told


def _figures(figures: Sequence[glance.Figure], columns: int) -> list[str]:
    told = [""]
    for one in figures:
        told += _hanging(f"  {one.name}", 20, f"{one.value}{f'  ({one.beside})' if one.beside else ''}", columns)
    return told if figures else []


def _charts(title: str, charts: Sequence[Chart], columns: int) -> list[str]:
    told = ["", title] if charts else []
    for chart in charts:
        _, y = axes(chart)
        scale = ", logarithmic" if y.logarithmic else ""
        told.append(f"  {chart.title} ({chart.unit}{scale})")
        wide = min(30, max(len(one_line(mark.name)) for mark in chart.marks))
        for mark in chart.marks:
            told.append(f"    {fitted(mark.name, wide)}  {_curve(mark, y, chart, columns - wide - 36)}".rstrip())
    return told


def _curve(mark: Mark, y: Axis, chart: Chart, room: int) -> str:
    """First finite value, a curve where there is one, last value; what is not finite is a gap in the curve."""
    label, last = bytes_label if chart.bytes else number, last_told(chart, mark)
    values = [value for _, value in smoothed(mark.points, window(mark))]
    finite = mark.finite
    if not finite:
        return "no finite value"
    if mark.dots or len(values) < 3:
        return " → ".join([label(finite[0][1]), *([last] if len(mark.points) > 1 else [])])
    wide = max(8, min(_SPARK, room, len(values)))
    chosen = [values[round(n * (len(values) - 1) / (wide - 1))] for n in range(wide)]
    curve = "".join(_block(value, y) for value in chosen)
    return f"{label(finite[0][1]):>10} {curve} {last}"


def _block(value: float, y: Axis) -> str:
    if not drawable(value) or (y.logarithmic and value <= 0):
        return " "
    return _BLOCKS[min(len(_BLOCKS) - 1, max(0, int(y.at(value) * len(_BLOCKS))))]


def _timeline(bars: Sequence[glance.Bar], columns: int) -> list[str]:
    if not bars:
        return []
    wide = min(20, max(len(one_line(bar.name)) for bar in bars))
    room = max(10, min(50, columns - wide - 26))
    told = ["", "phases"]
    for bar in bars:
        begin = min(room - 1, int(bar.begin * room / 100))
        length = max(1, min(room - begin, round(bar.length * room / 100)))
        drawn = ("░" if bar.open_ else "█") * length
        told.append(f"  {fitted(bar.name, wide)}  {'·' * begin}{drawn}{'·' * (room - begin - length)}  {bar.told}")
    return told


def _hanging(head: str, indent: int, text: str, columns: int) -> list[str]:
    """``head`` and, from column ``indent`` on, the text. ``head`` may hold an accent, whose escapes take no room."""
    shown = len("".join(part.partition("m")[2] if number else part for number, part in enumerate(head.split("\x1b["))))
    rows = textwrap.wrap(plain(text), max(20, columns - indent)) or [""]
    first = head + " " * max(1, indent - shown) + rows[0]
    return [first.rstrip(), *(" " * indent + row for row in rows[1:])]


def _wrapped(text: str, columns: int) -> list[str]:
    return textwrap.wrap(plain(text), columns) or [""]
