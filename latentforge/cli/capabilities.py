"""``latentforge capabilities``: what this install can be asked for, as a program reads it."""

from __future__ import annotations

from typing import Any

import typer

app = typer.Typer(add_completion=False)


@app.command()
def capabilities() -> None:
    """Print, as JSON, every command with its flags, every field of a pipeline, every kind of run and falsifier."""
    import json

    from latentforge import __version__
    from latentforge.cli import ENTRIES
    from latentforge.cli import app as root
    from latentforge.spec.capabilities import offered

    group: Any = typer.main.get_command(root)
    context: Any = typer.Context(group)
    found: dict[str, tuple[str, ...]] = {}
    for name in ENTRIES:
        _collect(name, group.get_command(context, name), found)
    print(json.dumps({"version": __version__, **offered(found)}, sort_keys=True))


def _collect(name: str, command: Any, found: dict[str, tuple[str, ...]]) -> None:
    """The names that a command takes, and those of its subcommands."""
    words = []
    for parameter in command.params:
        is_argument = parameter.param_type_name == "argument"
        words += [parameter.name.upper()] if is_argument else [one for one in parameter.opts if one.startswith("--")]
    found[name] = tuple(words)
    for inner, sub in getattr(command, "commands", {}).items():
        _collect(f"{name} {inner}", sub, found)
