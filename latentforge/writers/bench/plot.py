"""Quality against compute: a point a student, with what it costs to write a token and how fast it does here."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentforge.writers.bench.quality import Quality, Score
from latentforge.writers.bench.report import Entrant, Report

_PANELS: tuple[tuple[str, Callable[[Quality], Score | None]], ...] = (
    ("BrierLM (higher is better)", lambda quality: quality.brier_lm),
    ("bits a byte (lower is better)", lambda quality: quality.bits_per_byte),
)


def draw(report: Report, path: Path) -> None:
    """Write a PNG: BrierLM and bits a byte against operations a token, as far as a report of quality was given.

    A student of unknown quality stands as a line at its cost; where none is known the picture says so. The same model
    in another engine is no other point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    entrants = [one for one in report.entrants if one.flops_per_token is not None and one.role != "transformers"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, of) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        known = [_mark(axes, number, one, of) for number, one in enumerate(entrants)]
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("operations a token, sampler included")
        axes.set_ylabel(label)
        if not any(known):
            axes.set_yticks([])
            axes.text(0.5, 0.5, "not known: --quality FILE\nnames no such value", ha="center", transform=axes.transAxes)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(f"{report.here.machine.processor}, {report.here.started}", fontsize=9)
    figure.savefig(path, dpi=110)


def _mark(axes: Any, number: int, one: Entrant, of: Callable[[Quality], Score | None]) -> bool:
    """Draw a student; whether its quality is known."""
    speed = statistics.median(one.measured.tokens_per_second)
    label, colour = f"{one.measured.name}: {speed:.0f} tokens/s", f"C{number}"
    score = None if one.quality is None else of(one.quality)
    if score is None:
        axes.axvline(one.flops_per_token, color=colour, linestyle=":", label=label)
        return False
    low = score.value if score.low is None else score.low
    high = score.value if score.high is None else score.high
    # An interval of a bootstrap need not hold the value.
    errors = [[max(0.0, score.value - low)], [max(0.0, high - score.value)]]
    axes.errorbar([one.flops_per_token], [score.value], yerr=errors, fmt="o", capsize=3, color=colour, label=label)
    return True
