"""``latentforge run``: what a host's supervisor starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode

app = typer.Typer(add_completion=False)


@app.command()
def run(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder: identity.json and launch.json inside.")],
    restarted: Annotated[int, typer.Option(envvar="LATENTFORGE_RESTARTED", min=0, hidden=True)] = 0,
    restarts_left: Annotated[int, typer.Option(envvar="LATENTFORGE_RESTARTS_LEFT", min=0, hidden=True)] = 0,
) -> ExitCode:
    """Execute one run directory in this process."""
    # Read when torch is imported. Threads that spin for work make every step many times slower where the machine is
    # shared with another process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from latentforge.train.run import execute

    # '.' has no name to tell the run by.
    return execute(run_dir.absolute(), signals=True, restarted=restarted, restarts_left=restarts_left)
