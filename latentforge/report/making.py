"""From runs' folders to a report's files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.evidence.reading import find_run, read_run
from latentforge.evidence.signatures import allowed_signers
from latentforge.report.chart import Chart
from latentforge.report.comparison import Comparison, compare
from latentforge.report.page import Section, page, section
from latentforge.report.placing import check_page, check_plot, outside_runs, refusing, whole
from latentforge.report.plots import write_plots
from latentforge.report.standing import standing
from latentforge.report.tensorboard import write_events
from latentforge.spec.run import named_folder


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

    RefusedError where a folder is no run's, or one is named twice, or ``EVIDENCE_SIGNERS`` names no file of allowed
    signers.
    """
    folders = [named_folder(find_run(run, next="latentforge report runs/RUN")) for run in runs]
    names = [folder.name for folder in folders]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusedError(f"{twice} is named twice", next=f"latentforge report {twice}")
    signers = allowed_signers(None)
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

    RefusedError as of :func:`read_sections`, where a place lies in a run's folder or is something else already, and
    where a file cannot be written; what was written before that stays.
    """
    sections = read_sections(runs, verify=verify)
    path = Path("reports") / f"{_name([one.record.id for one in sections])}.html" if to is None else to
    compared = compare([one.record for one in sections]) if len(sections) > 1 else None
    charts = _charts(sections, compared)
    with refusing(path):
        check_page(path)
        folder = path.with_name(f"{path.stem}-plots")
        for name, _ in charts if plots else ():
            check_plot(folder / f"{name}.png")
        if tensorboard is not None:
            outside_runs(tensorboard, "--tensorboard")
        path.parent.mkdir(parents=True, exist_ok=True)
        made = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        with whole(path) as partial:
            partial.write_text(page(sections, compared, made=made), encoding="utf-8")
    with refusing(folder):
        drawn = write_plots(charts, folder) if plots else []
    with refusing(tensorboard or folder):
        written = [write_events(one.record, tensorboard) for one in sections] if tensorboard is not None else []
    return Made(tuple(sections), compared, path, tuple(drawn), tuple(written))


def _name(runs: Sequence[str]) -> str:
    """The name of a report's file: of several runs, no other choice or order of them has it."""
    if len(runs) == 1:
        return runs[0]
    named = hashlib.sha256("\n".join(runs).encode()).hexdigest()
    return f"{runs[0]}-and-{len(runs) - 1}-more-{named[:8]}"


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
