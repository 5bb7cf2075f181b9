"""``latentforge report``: what runs did, as one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Runs' folders, or the beginnings of their ids.")],
    to: Annotated[Path | None, typer.Option("--to", help="The HTML file to write (reports/<run>.html).")] = None,
    verify: Annotated[bool, typer.Option(help="Verify the runs' evidence for the report.")] = True,
) -> int:
    """Write a report of runs: verdicts and what happened first, then charts, samples and configuration.

    Exit code: 0 written, whatever the runs earned; 2 where a folder is no run's or the file cannot be written.
    """
    from latentforge.report.making import make_report

    written = make_report(runs, to, verify=verify)
    print(written)
    return 0
