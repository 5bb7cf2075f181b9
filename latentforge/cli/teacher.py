"""``latentforge teacher``: who teaches, and from where."""

from __future__ import annotations

import typer

from latentforge.cli.teacher_check import check
from latentforge.cli.teacher_serve import VARIABLES as SERVE_VARIABLES
from latentforge.cli.teacher_serve import serve

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("check")(check)
app.command("serve")(serve)


@app.callback()
def _group(context: typer.Context) -> None:
    """Serve a teacher on this machine, and ask what one can do."""
    if context.invoked_subcommand != "serve":
        return  # which reads the variables of its backend itself
    from pathlib import Path

    from latentforge.spec.dotenv import FILE, read_dotenv

    # Beneath the environment, which typer reads, and the flags.
    said = read_dotenv(Path.cwd() / FILE)
    found = {option: said[name] for option, name in SERVE_VARIABLES.items() if said.get(name)}
    context.default_map = {"serve": found}
