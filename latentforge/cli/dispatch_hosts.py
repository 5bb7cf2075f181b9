"""``latentforge dispatch`` over several hosts: fallback lanes, and the same on each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from dispatch.hosts.inventory import Host, Inventory
    from dispatch.places import Places
    from dispatch.planning.ask import Ask
    from dispatch.records import Record

LanesOption = Annotated[
    str | None,
    typer.Option("--lanes", metavar="A,B", help="Fallback hosts in order, or a lane of hosts.toml; all are asked."),
]
AbandonOption = Annotated[
    bool, typer.Option("--abandon", help="Go on although a lane that does not answer may have the run.")
]
EachOption = Annotated[
    str | None, typer.Option("--each", metavar="A,B", help="Each of these hosts at once; the exit code is the worst.")
]


def lane_ask(
    ask_for: Callable[[Host, Sequence[str]], Ask],
    lanes: str,
    host: str | None,
    places: Places,
    inventory: Inventory,
    *,
    abandon: bool,
) -> Ask:
    """The request for the lane that takes the run; ``ask_for`` makes that of one host."""
    from dispatch.lanes.names import several
    from dispatch.lanes.survey import ask_for_lane
    from latentforge.errors import RefusedError

    if host is not None:
        raise RefusedError(f"--host {host!r} and --lanes {lanes!r}: give one of them")
    hosts = several(lanes, "--lanes", inventory, os.environ)
    asks = [ask_for(one, [one.name for one in hosts]) for one in hosts]
    return ask_for_lane(asks, places, abandon=abandon)


def on_each(
    each: str,
    host: str | None,
    inventory: Inventory,
    work_of: Callable[[Sequence[Host]], Callable[[Host], Any]],
    *,
    row: Callable[[Any], str],
    value: Callable[[Any], Any],
    as_json: bool,
) -> ExitCode:
    """Do a piece of work on each host and print what came of it, keyed by host."""
    import json

    from dispatch.lanes.each import each as do_each
    from dispatch.lanes.each import results_json, results_table, worst_code
    from dispatch.lanes.names import several
    from latentforge.errors import RefusedError

    if host is not None:
        raise RefusedError(f"--host {host!r} and --each {each!r}: give one of them")
    hosts = several(each, "--each", inventory, os.environ)
    try:
        results = do_each(hosts, work_of(hosts))
    except KeyboardInterrupt:
        return _detached()
    if as_json:
        print(json.dumps(results_json(results, value), indent=2))
    else:
        print("\n".join(results_table(results, row)))
    return worst_code(results)


def _detached() -> ExitCode:
    print("\ndetached; what was launched there goes on.   again:  the same command, it finds what was done")
    return ExitCode.DETACHED


def build(
    host: Annotated[str | None, typer.Option("--host", metavar="HOST", help="Which host; as for go.")] = None,
    each: EachOption = None,
    attempt: Annotated[
        str | None, typer.Option("--attempt", metavar="next", help="Build again after a build that failed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built (also DRY_RUN=1).")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output, log lines on the other.")] = False,
) -> ExitCode:
    """Send this code to a host and build it there, for the first run that will want it; a build is made once."""
    from dataclasses import replace

    from dispatch.building.only import build_request
    from dispatch.lanes.commands import building
    from latentforge.cli.dispatch import _asked_of, _dry_run, _places
    from latentforge.errors import RefusedError

    if attempt not in (None, "next"):
        raise RefusedError(f"--attempt {attempt!r} is not known", next="--attempt next")
    places, inventory = _places()
    reads = dry_run or _dry_run()

    def work_of(hosts: Sequence[Host]) -> Callable[[Host], Any]:
        asks = [build_request(_asked_of("tiny", one, None, attempt, False, env={})) for one in hosts]
        return building(asks, places, dry_run=reads, out=sys.stderr)

    row, value = (lambda one: one.line()), (lambda one: replace(one).__dict__)
    if each is not None:
        return on_each(each, host, inventory, work_of, row=row, value=value, as_json=json)
    where = inventory.choose(host, os.environ)
    try:
        done = work_of([where])(where)
    except KeyboardInterrupt:
        return _detached()
    if json:
        from json import dumps

        print(dumps({"host": where.name, **value(done)}, indent=2))
    else:
        print(f"{where.name}  {row(done)}")
    return ExitCode.PASS


def status_each(each: str, host: str | None, records: list[Record], *, as_json: bool) -> ExitCode:
    """How the runs of each host are."""
    from dispatch.lanes.commands import standing

    def value(one: Any) -> Any:
        return {run: state.model_dump(mode="json") for run, state in one.runs.items()}

    return _runs_of_each(each, host, lambda places: standing(records, places), value, as_json=as_json)


def collect_each(each: str, host: str | None, records: list[Record], *, as_json: bool) -> ExitCode:
    """Copy what the finished runs of each host left."""
    from dispatch.lanes.commands import gathering

    def value(one: Any) -> Any:
        return {
            "collected": {run: str(copy.folder) for run, copy in one.copies.items()},
            "failed": {run: str(error) for run, error in one.failed.items()},
            "going_on": list(one.going_on),
        }

    return _runs_of_each(each, host, lambda places: gathering(records, places), value, as_json=as_json)


def _runs_of_each(
    each: str,
    host: str | None,
    work: Callable[[Places], Callable[[Host], Any]],
    value: Callable[[Any], Any],
    *,
    as_json: bool,
) -> ExitCode:
    """Do on each host what is done with the runs that this laptop gave it."""
    from latentforge.cli.dispatch import _places

    places, inventory = _places()
    return on_each(
        each,
        host,
        inventory,
        lambda _hosts: work(places),
        row=lambda one: str(one.lines()),
        value=value,
        as_json=as_json,
    )


def add_to(app: typer.Typer) -> None:
    """Put the commands of this room on the group."""
    app.command()(build)
