"""The report's charts as PNG files, drawn by matplotlib from the same description."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentforge.report.axes import drawable, smoothed
from latentforge.report.chart import Chart, Mark, axes, bytes_label, window
from latentforge.report.placing import GENERATOR, whole
from latentforge.report.words import plain, short

_COLOURS = {
    "student": "#0b6e86", "latent": "#0b6e86", "autoencoder": "#0b6e86", "teacher": "#c26a1b", "twin": "#8b8f94",
    "run0": "#0b6e86", "run1": "#c26a1b", "run2": "#8b8f94", "run3": "#7b4fa3", "run4": "#3d7a3a", "run5": "#b23a6b",
}  # fmt: skip
"""The colours of the page on paper."""


def write_plots(charts: Sequence[tuple[str, Chart]], folder: Path) -> list[Path]:
    """Write ``<name>.png`` of each chart into ``folder`` (made where it is not there) and return the paths.

    ModuleNotFoundError where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7.2, 4.0))
    FigureCanvasAgg(figure)
    written = []
    for name, chart in charts:
        figure.clear()
        figure.subplots_adjust(left=0.12, right=0.96, top=0.9, bottom=0.13)
        _draw(chart, figure.subplots())
        path = folder / f"{name}.png"
        with whole(path) as partial:
            figure.savefig(partial, dpi=130, format="png", metadata={"Software": GENERATOR})
        written.append(path)
    return written


def _draw(chart: Chart, plot: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    x, y = axes(chart)
    for mark in chart.marks:
        _mark(mark, plot)
    for axis, of, label in ((plot.xaxis, x, short), (plot.yaxis, y, bytes_label if chart.bytes else short)):
        if of.logarithmic:
            (plot.set_yscale if axis is plot.yaxis else plot.set_xscale)("log")
        axis.set_major_locator(FixedLocator(of.ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, label=label: label(value)))
    plot.set_xlim(x.low, x.high)
    plot.set_ylim(y.low, y.high)
    plot.set_title(f"{chart.title} ({chart.unit})", loc="left", fontsize=11)
    plot.set_xlabel(chart.across, loc="right", fontsize=9)
    plot.grid(axis="y", color="#e2dfd7", linewidth=0.8)
    plot.tick_params(length=0, labelsize=9, colors="#5d676d")
    for side in plot.spines.values():
        side.set_visible(False)
    handles, labels = plot.get_legend_handles_labels()
    if handles:
        plot.legend(handles, labels, fontsize=8.5, frameon=False)


def _mark(mark: Mark, plot: Any) -> None:
    colour, label = _COLOURS.get(mark.who, "#8b8f94"), plain(mark.name).replace("$", r"\$")
    across, up = [a for a, _ in mark.points], [b if drawable(b) else float("nan") for _, b in mark.points]
    if mark.dots:
        for a, low, high in mark.whiskers:
            plot.plot([a, a], [low, high], color=colour, linewidth=1.2, alpha=0.7, clip_on=False)
        plot.plot(across, up, "o", color=colour, label=label, markersize=6, clip_on=False)
        return
    over = window(mark)
    if over > 1:
        plot.plot(across, up, color=colour, linewidth=0.7, alpha=0.3)
    style = "steps-post" if mark.levels else "default"
    strong = [b for _, b in smoothed(mark.points, over)]
    plot.plot(across, strong, color=colour, linewidth=1.6, label=label, drawstyle=style)
