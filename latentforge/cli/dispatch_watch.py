"""``latentforge dispatch watch``: one run or several, followed to their verdicts."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode

DeadlineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--deadline",
        metavar="[PHASE=]SECONDS",
        help="Instead of the pipeline's, for the whole run or for PHASE (appear, loading, warm-up, first-step, other).",
    ),
]
StallOption = Annotated[
    float | None,
    typer.Option("--stall", metavar="SECONDS", help="No step for so long (and 10 times the pace shown) is a stall."),
]


def add_to(app: typer.Typer) -> None:
    """Put the commands of this room on the group."""
    app.command()(watch)


def watch(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run ids, or the beginnings of such.")],
    host: Annotated[
        str | None, typer.Option("--host", metavar="HOST", help="Which host; else the one that the run was given to.")
    ] = None,
    deadline: DeadlineOption = None,
    stall: StallOption = None,
) -> ExitCode:
    """Follow runs from wherever they were left to their ends; exits with the run's code, of several with the worst.

    In a pipe these are the run's own lines (of several, each with its run before it), so that
    `latentforge dispatch watch RUN | grep F-DISTILL` prints the verdict and ends. Ends by itself with 4 where a run
    makes no step, misses a deadline or writes no log; the run is left alone, and the command that stops it is shown.
    Of one run over two hosts both are followed. With --host no record of this laptop is needed: the host knows its
    runs, also by the beginnings of their ids.
    """
    from dispatch.following.limits import Limits
    from dispatch.hosts.inventory import Inventory
    from dispatch.session import Session
    from dispatch.together import Target, watch_together
    from dispatch.transport.open import open_transport
    from latentforge.cli.dispatch import located

    adjust = Limits.adjuster(deadline or (), stall)
    found = [located(run, host) for run in dict.fromkeys(runs)]
    if len(found) > 1:
        targets = {record.run: Target(record, where) for _places, record, where in found}
        return watch_together(list(targets.values()), found[0][0], adjust=adjust)
    places, record, where = found[0]
    run, chain = record.run, list(record.chain)
    with contextlib.closing(open_transport(where, places)) as transport:
        if record.beside is None:
            return Session(transport, places, adjust=adjust).watch(run, chain, record.context)
        from dispatch.pairing.session import pair_session

        other = record.following()[0].at_host(Inventory.load(places).get(record.beside.host))
        with contextlib.closing(open_transport(other, places)) as second:
            session = pair_session((transport, second), places, adjust=adjust)
            return session.watch_both(run, chain, record.context, list(record.beside.runs))
