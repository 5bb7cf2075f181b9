"""``latentforge dispatch pull``: a model to a host, pinned, verified, and moved once."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from latentforge.cli.dispatch_hosts import EachOption, on_each
from latentforge.verdicts.exitcode import ExitCode


def pull(
    source: Annotated[
        str, typer.Argument(metavar="REPO@COMMIT|FOLDER", help="A model of the hub, or a folder here (./, /, ~).")
    ],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What a folder's model is called on hosts.")] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="HOST", help="Which host; as for go.")] = None,
    each: EachOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would move, change nothing (also DRY_RUN=1).")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Launch, and leave at once.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output, log lines on the other.")] = False,
) -> ExitCode:
    """Bring a model to a host: files, sizes and digests known before, resumed where it was cut, verified whole.

    A branch is resolved to its commit, which is printed. HF_ENDPOINT names another hub. HF_TOKEN, where it is
    set, goes along for this pull and is kept nowhere; else the host's own token is used. A second pull moves nothing.
    """
    from dispatch.pulling.command import Wanted, pull_here, pulling
    from latentforge.cli.dispatch import _dry_run, _places
    from latentforge.errors import RefusedError

    places, inventory = _places()
    wanted, dry = Wanted.of(source, name), dry_run or _dry_run()
    if each is not None:
        if detach:
            raise RefusedError("--detach and --each: give one of them")
        return on_each(
            each,
            host,
            inventory,
            lambda hosts: pulling(hosts, wanted, places, os.environ, dry_run=dry),
            row=lambda one: str(one.line()),
            value=lambda one: one.as_json(),
            as_json=json,
        )
    where = inventory.choose(host, os.environ)
    return pull_here(where, wanted, places, os.environ, dry_run=dry, as_json=json, detach=detach)


def add_to(app: typer.Typer) -> None:
    """Put the commands of this room on the group."""
    app.command()(pull)
