"""``latentforge dispatch gc``: clean up a host, by the state of its runs and never by age."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from latentforge.cli.dispatch_hosts import EachOption, on_each
from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from dispatch.hosts.inventory import Host


def gc(
    host: Annotated[str | None, typer.Option("--host", metavar="HOST", help="Which host; as for go.")] = None,
    each: EachOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Remove it; without this, it is only shown.")] = False,
    keep: Annotated[
        int, typer.Option("--keep", metavar="N", min=0, help="Of each question, the N runs that passed last stay.")
    ] = 1,
    uncollected: Annotated[
        bool, typer.Option("--uncollected", help="Also what was never copied here, and reservations.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> ExitCode:
    """Show what nobody needs on a host any more, and how much that is; with --apply, remove it.

    Judged by the state of runs, never by age. A run that lives, waits or holds the device stays, and so does one that
    was not collected here, or that a run that stays names. With --keep 0 what is not needed now goes too: builds,
    environments, models that no run has used yet.
    """
    from json import dumps

    from dispatch.pulling.tidy import tidying
    from latentforge.cli.dispatch import _dry_run, _places
    from latentforge.errors import RefusedError

    places, inventory = _places()
    if apply and _dry_run():
        raise RefusedError("--apply and DRY_RUN=1: give one of them")
    flags = (f" --keep {keep}" if keep != 1 else "") + " --uncollected" * uncollected

    def again(one: Host) -> str:
        return f"latentforge dispatch gc --host {one.name}{flags} --apply"

    work = tidying(places, keep=keep, uncollected=uncollected, apply=apply, again=again)
    if each is not None:
        return on_each(
            each,
            host,
            inventory,
            lambda _hosts: work,
            row=lambda one: str(one.lines()),
            value=lambda one: one.as_json(),
            as_json=json,
        )
    done = work(inventory.choose(host, os.environ))
    print(dumps(done.as_json(), indent=2) if json else f"{done.host}\n{done.lines()}")
    return done.code


def add_to(app: typer.Typer) -> None:
    """Put the commands of this room on the group."""
    app.command()(gc)
