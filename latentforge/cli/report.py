"""``latentforge report``: what runs did, as one page that needs nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Runs' folders, or the beginnings of their ids.")],
    to: Annotated[Path | None, typer.Option("--to", help="The HTML file to write (reports/<run>.html).")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Print the report instead; no file is written.")] = False,
    plots: Annotated[
        bool | None, typer.Option(help="Charts as PNG files in a folder beside the page (where matplotlib is there).")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", help="Write event files of TensorBoard below this folder, too.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Verify the runs' evidence for the report.")] = True,
) -> int:
    """Write a report of runs: verdicts and what happened first, then charts, samples and configuration.

    Exit code: 0 written, whatever the runs earned; 2 where a folder is no run's or a file cannot be written.
    """
    from latentforge.errors import RefusedError
    from latentforge.report.making import make_report
    from latentforge.report.tensorboard import check_tensorboard

    if terminal:
        if to is not None or plots or tensorboard is not None:
            raise RefusedError("--terminal writes no files", next=f"latentforge report {runs[0]} --terminal")
        return _print(runs, verify=verify)
    can_plot = importlib.util.find_spec("matplotlib") is not None
    if plots and not can_plot:
        raise RefusedError(
            "--plots needs matplotlib, which is not installed", next="in a checkout:  pip install '.[train]'"
        )
    if tensorboard is not None:
        check_tensorboard()
    made = make_report(runs, to, verify=verify, plots=can_plot if plots is None else plots, tensorboard=tensorboard)
    if plots is None and not can_plot:
        print("no PNG plots: matplotlib is not installed (in a checkout:  pip install '.[train]')", file=sys.stderr)
    print(made.page)
    if made.plots:
        print(f"{made.plots[0].parent}/  {len(made.plots)} plots")
    for path in made.events:
        print(path)
    return 0


def _print(runs: list[str], *, verify: bool) -> int:
    import shutil

    from latentforge.cli.terminal import accent
    from latentforge.report.comparison import compare
    from latentforge.report.making import read_sections
    from latentforge.report.terminal import compared_lines, lines

    columns = min(120, shutil.get_terminal_size((100, 40)).columns)
    sections = read_sections(runs, verify=verify)
    told = [lines(section, columns=columns, accent=accent) for section in sections]
    if len(sections) > 1:
        compared = compare([section.record for section in sections])
        told.insert(0, compared_lines(compared, columns=columns, accent=accent))
    print(f"\n\n{'─' * columns}\n\n".join("\n".join(part) for part in told))
    return 0
