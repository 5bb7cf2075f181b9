"""``latentforge teacher``: who teaches, and from where."""

from __future__ import annotations

import typer

from latentforge.cli.teacher_check import check
from latentforge.cli.teacher_serve import serve

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("check")(check)
app.command("serve")(serve)


@app.callback()
def _group() -> None:
    """Serve a teacher on this machine, and ask what one can do."""
