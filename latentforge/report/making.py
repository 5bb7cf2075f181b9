"""From runs' folders to a report's files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.evidence.reading import find_run, read_run
from latentforge.report.chart import Chart
from latentforge.report.comparison import Comparison, compare
from latentforge.report.page import Section, page, section
from latentforge.report.plots import write_plots
from latentforge.report.standing import standing
from latentforge.report.tensorboard import write_events
from latentforge.spec.identity import RUN_ID

_NEXT = "latentforge report RUN --to report.html"
_OURS = b'<meta name="generator" content="latentforge report">'


@dataclass(frozen=True)
class Made:
    """A report that was made: its runs, and the files that were written."""

    sections: tuple[Section, ...]
    compared: Comparison | None
    page: Path | None
    plots: tuple[Path, ...] = ()
    events: tuple[Path, ...] = ()


def read_sections(runs: Sequence[str], *, verify: bool = True) -> list[Section]:
    """The runs of a report, each a folder or the beginning of an id.

    RefusedError where a folder is no run's, or one is named twice. ``EVIDENCE_SIGNERS`` names allowed signers.
    """
    folders = [find_run(run, next="latentforge report runs/RUN").resolve() for run in runs]
    names = [folder.name for folder in folders]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusedError(f"{twice} is named twice", next=f"latentforge report {twice}")
    named = os.environ.get("EVIDENCE_SIGNERS")
    signers = Path(named) if named else None
    records = [read_run(folder) for folder in folders]
    return [section(record, standing(record.folder, verify=verify, signers=signers)) for record in records]


def make_report(
    runs: Sequence[str],
    to: Path | None,
    *,
    verify: bool = True,
    plots: bool = False,
    tensorboard: Path | None = None,
) -> Made:
    """Write the page of ``runs``, with ``plots`` their charts in a folder beside it, event files below ``tensorboard``.

    RefusedError as of :func:`read_sections`, and where a place lies in a run's folder or is something else already.
    """
    sections = read_sections(runs, verify=verify)
    first = sections[0].record.id
    more = f"-and-{len(sections) - 1}-more" if len(sections) > 1 else ""
    path = Path("reports") / f"{first}{more}.html" if to is None else to
    _check(path)
    if tensorboard is not None:
        _outside_runs(tensorboard, "--tensorboard")
    compared = compare([one.record for one in sections]) if len(sections) > 1 else None
    path.parent.mkdir(parents=True, exist_ok=True)
    made = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(page(sections, compared, made=made), encoding="utf-8")
    os.replace(partial, path)
    drawn = write_plots(_charts(sections, compared), path.with_name(f"{path.stem}-plots")) if plots else []
    written = [write_events(one.record, tensorboard) for one in sections] if tensorboard is not None else []
    return Made(tuple(sections), compared, path, tuple(drawn), tuple(written))


def _charts(sections: Sequence[Section], compared: Comparison | None) -> list[tuple[str, Chart]]:
    """Every chart with the name of its file; of several runs, the run's short name before it."""
    if compared is None:
        heads = [""]
    else:
        heads = [f"{row.name}-" for row in compared.rows]
    charts = [
        (f"{head}{chart.name}", chart)
        for head, one in zip(heads, sections, strict=True)
        for chart in (*one.learning, *one.quality, *one.working)
    ]
    return [*((f"compared-{chart.name}", chart) for chart in (compared.charts if compared else ())), *charts]


def _check(path: Path) -> None:
    """A report never becomes a file of a run, whose evidence it would break, and replaces nothing but a report."""
    if path.suffix != ".html":
        raise RefusedError(f"--to {path}: a report is an .html file", next=_NEXT)
    _outside_runs(path, "--to")
    if path.exists() and (not path.is_file() or _OURS not in path.read_bytes()[:4096]):
        raise RefusedError(f"--to {path}: is there already and is no report", next=_NEXT)


def _outside_runs(path: Path, option: str) -> None:
    for folder in (path.resolve(), *path.resolve().parents):
        if RUN_ID.fullmatch(folder.name) and (folder / "identity.json").exists():
            raise RefusedError(
                f"{option} {path}: {folder.name} is a run's folder, whose evidence names each of its files", next=_NEXT
            )
