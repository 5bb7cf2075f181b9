"""``latentforge dispatch preflight``: whether a host is fit, check by check."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from dispatch.hosts.inventory import Host
    from dispatch.planning.ask import Ask

_POWER = ("power", "hot")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(preflight)


def preflight(
    host: Annotated[
        str | None, typer.Argument(metavar="[HOST]", help="Which host; else GX10_HOST, else the default, else local.")
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="RECIPE|FILE", help="Judge for this pipeline: memory, disk and so on."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the pipeline; repeatable.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="ID,ID", help="These checks alone; names those that load the GPU too."),
    ] = None,
    power: Annotated[bool, typer.Option("--power", help="Load the GPU for 15 s: rate, clock, temperature.")] = False,
    each: Annotated[str | None, typer.Option(metavar="HOST,HOST", help="Several hosts at once.")] = None,
    teacher_server: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this OpenAI-compatible server, from the host.")
    ] = None,
    teacher_k: Annotated[int, typer.Option(min=1, max=262_144, help="Log-probabilities that it must give.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="The report as JSON, for a script.")] = False,
) -> ExitCode:
    """Say whether a host is fit: what was measured, what is wanted, and what to do; ends with 1 where a check fails.

    One question to the host. It reads, and writes one small file in the run root that it takes away again; what drops
    caches or loads the GPU is done only when it is named with --only or --power.
    """
    from dispatch.hosts.inventory import Inventory
    from dispatch.places import Places
    from dispatch.preflight.asking import check_ids
    from dispatch.preflight.run import Wanted, preflight_all
    from latentforge.errors import RefusedError

    places = Places.from_environment(os.environ)
    inventory = Inventory.load(places)
    if host is not None and each is not None:
        raise RefusedError(f"HOST {host!r} and --each {each!r} both say where", next="give one of them")
    hosts = [inventory.choose(name, os.environ) for name in (_words(each) if each is not None else [host])]
    if len({one.name for one in hosts}) != len(hosts):
        raise RefusedError(f"--each {each!r} names a host twice")
    if set_ and for_ is None:
        raise RefusedError(f"--set {set_[0]!r} sets a field of no pipeline", next="--for RECIPE")
    named = check_ids(_words(only) if only is not None else [])
    also = frozenset(_POWER if power else ()) | ({"teacher-server"} if teacher_server is not None else frozenset())

    def ask(one: Host) -> Ask:
        from dispatch.planning.ask import asked
        from latentforge.cli.dispatch import _stale_extension
        from latentforge.spec.dotenv import Environment

        assert for_ is not None
        return asked(for_, one, env=Environment.here(), overrides=set_ or [], stale=_stale_extension)

    server = {"url": teacher_server, "k": teacher_k} if teacher_server is not None else None
    wanted = Wanted(ask if for_ is not None else None, named, frozenset(also), server)
    return preflight_all(hosts, places, wanted, as_json=json)


def _words(text: str) -> list[str | None]:
    from latentforge.errors import RefusedError

    words: list[str | None] = [word.strip() for word in text.split(",")]
    if not all(words):
        raise RefusedError(f"{text!r} holds an empty name")
    return words
