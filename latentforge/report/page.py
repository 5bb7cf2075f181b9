"""The page: one HTML file with everything in it. No script, nothing from elsewhere, and a policy that forbids both."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from latentforge import __version__
from latentforge.evidence.reading import RunRecord
from latentforge.report import attached, glance, panels, telling
from latentforge.report.chart import HEIGHT, WIDTH, Chart, Drawn, draw
from latentforge.report.comparison import Comparison
from latentforge.report.placing import GENERATOR
from latentforge.report.standing import Standing
from latentforge.report.words import number, plain
from latentforge.verdicts import FALSIFIER_ID

_ROWS, _SAMPLES = 400, 40
"""Lines of a list (warnings, settings, phases), and samples, that a page shows; it says how many more there are."""


FALSIFIER_PARTS = re.compile(f"({FALSIFIER_ID.pattern})")
"""Cuts a text at the names of falsifiers, which every second part then is: they are not broken across lines."""


@dataclass(frozen=True)
class Section:
    """One run of a report: its record, what its evidence is worth, and what else lies in its folder."""

    record: RunRecord
    standing: Standing
    samples: list[attached.Sample]
    contestants: list[attached.Contestant]
    wrong: list[str]

    @property
    def learning(self) -> list[Chart]:
        """Loss and KL, in training and held out."""
        return panels.learning(self.record)

    @property
    def quality(self) -> list[Chart]:
        """Quality against compute, of a bench."""
        return attached.quality(self.contestants)

    @property
    def working(self) -> list[Chart]:
        """Throughput, memory, learning rate."""
        return panels.working(self.record)


def section(record: RunRecord, standing: Standing) -> Section:
    """A run with everything that a report shows of it."""
    samples, wrong_samples = attached.samples(record.folder)
    contestants, wrong_bench = attached.bench(record.folder)
    wrong = [one for one in (wrong_samples, wrong_bench) if one is not None]
    return Section(record, standing, samples, contestants, wrong)


def page(sections: Sequence[Section], compared: Comparison | None, *, made: str) -> str:
    """The HTML of a report, the comparison of several runs first; ``made`` is the time (UTC) at its foot."""
    text = _template().render(
        runs=[_of_run(one) for one in sections],
        compared=compared,
        compared_charts=_drawn(compared.charts) if compared else [],
        compared_sentence=_compared(compared) if compared else "",
        most=_ROWS,
        left=_left,
        made=made,
        version=__version__,
        generator=GENERATOR,
        width=WIDTH,
        height=HEIGHT,
    )
    return text + "\n"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("latentforge.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    return environment.get_template("report.html")


def _finalize(value: Any) -> Any:
    """Every text of a run, with what is not seen written out; markup of the template itself stays."""
    return plain(value) if type(value) is str else value


def _compared(compared: Comparison) -> str:
    """What the comparison shows, in a sentence: how many ended how, and in which settings they differ."""
    ends: dict[str, int] = {}
    for row in compared.rows:
        ends[row.state] = ends.get(row.state, 0) + 1
    ended = ", ".join(f"{count} {end}" for end, count in ends.items())
    names = [field.name for field in compared.fields]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    differ = f"they differ in {shown}" if names else "their settings are the same"
    return f"{len(compared.rows)} runs, {ended}; {differ}."


_WORST_FIRST = {"fail": 0, "unknown": 1, "pass": 2}


def _verdicts(record: RunRecord) -> list[tuple[str, str, str]]:
    told = [(one.outcome.name.lower(), one.falsifier, one.text) for one in record.verdicts]
    return sorted(told, key=lambda one: _WORST_FIRST[one[0]])


def _of_run(one: Section) -> dict[str, Any]:
    record = one.record
    return {
        "id": record.id,
        "headline": telling.headline(record),
        "state": telling.state(record),
        "sentence": FALSIFIER_PARTS.split(telling.sentence(record)),
        "verdicts": _verdicts(record),
        "figures": glance.figures(record),
        "learning": _drawn(one.learning),
        "quality": _drawn(one.quality),
        "working": _drawn(one.working),
        "teacher": glance.teacher(record),
        "timeline": glance.timeline(record),
        "compile_line": glance.compile_line(record),
        "compiles": glance.compiles(record),
        "checkpoints": glance.checkpoints(record),
        "warnings": [*one.wrong, *record.warnings, *record.unread],
        "samples": one.samples[:_SAMPLES],
        "samples_left": _left(len(one.samples), _SAMPLES, "samples"),
        "contestants": one.contestants,
        "fastest": attached.fastest(one.contestants),
        "settings": _settings(record),
        "differences": [
            (str(each["field"]), _value(each["requested"]), _value(each["effective"])) for each in record.differences
        ],
        "effective": record.effective is not None,
        "standing": one.standing,
        "facts": _facts(record),
    }


def _left(count: int, shown: int, what: str) -> str:
    """What a page says of those that it leaves out; nothing where it shows all."""
    return f"{number(count - shown)} more {what} are left out here: the run's files have them" if count > shown else ""


def _drawn(charts: Sequence[Chart]) -> list[Drawn]:
    return [draw(chart) for chart in charts]


def _settings(record: RunRecord) -> list[tuple[str, str]]:
    values = record.effective if record.effective is not None else record.requested or {}
    return [(name, _value(value)) for name, value in values.items()]


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None else json.dumps(value, ensure_ascii=False)


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Where and when it ran, on what, from which code: as recorded."""
    host, device, effective = record.host or {}, record.device or {}, record.effective_file or {}
    machine = ", ".join(str(part) for part in (host.get("cpu") or device.get("name"), host.get("os")) if part)
    facts = [
        ("run", record.id),
        ("began", record.events[0].wall if record.events else ""),
        ("ended", record.events[-1].wall if record.events and record.end.get("code") is not None else ""),
        ("host", str(host.get("name") or host.get("hostname") or "")),
        ("machine", machine),
        (
            "device",
            " ".join(
                str(device[name])
                for name in ("type", "kind", "name", "threads")
                if name in device and name != "threads"
            ),
        ),
        ("threads", str(device.get("threads") or "")),
        ("kernels", str(effective.get("kernel_backend") or "")),
        ("seeds", ", ".join(f"{name} {value}" for name, value in (record.seeds or {}).items())),
        ("versions", ", ".join(f"{name} {value}" for name, value in (record.versions or {}).items())),
        ("code", str(effective.get("code") or (record.identity.code if record.identity else ""))),
        ("lock file", record.identity.lock if record.identity else ""),
        (
            "inputs",
            ", ".join(f"{name} {value}" for name, value in (record.identity.inputs if record.identity else {}).items()),
        ),
        ("attempt", str(record.attempt) if record.attempt is not None else ""),
    ]
    return [(name, value) for name, value in facts if value]
