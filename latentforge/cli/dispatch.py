"""``latentforge dispatch``: plan, launch, follow and collect runs on hosts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from latentforge.cli import dispatch_gc, dispatch_hosts, dispatch_preflight, dispatch_pull, dispatch_watch
from latentforge.cli.dispatch_hosts import AbandonOption, EachOption, LanesOption
from latentforge.cli.dispatch_watch import DeadlineOption, StallOption
from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from dispatch.hosts.inventory import Host, Inventory
    from dispatch.places import Places
    from dispatch.planning.ask import Ask
    from dispatch.records import Record
    from dispatch.transport.call import Transport

app = typer.Typer(
    help="Plan, launch, follow and collect runs on hosts.\n\n"
    "The host is the authority: a lost laptop, link or terminal loses nothing, and Ctrl-C only detaches.",
    no_args_is_help=True,
)

HostOption = Annotated[
    str | None, typer.Option("--host", metavar="HOST", help="Which host; else GX10_HOST, else the default, else local.")
]
HostsOption = Annotated[
    str | None,
    typer.Option(
        "--host",
        metavar="HOST[,HOST]",
        help="Which host; else GX10_HOST, else the default, else local. Two: one run over both, the first leads.",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the pipeline; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output, lines for people on the other.")]
AttemptOption = Annotated[
    str | None, typer.Option("--attempt", metavar="next", help="Run again what ended: a new attempt, resumed from it.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run id, or the beginning of one.")]
WaiveOption = Annotated[
    list[str] | None,
    typer.Option("--waive", metavar="CHECK=WHY", help="Let a failing check through; the reason is kept with the run."),
]
CacheOption = Annotated[
    bool, typer.Option("--kd-cache-ro", help="Read teacher.cache, and never write to it (teacher.cache_readonly).")
]
PipelineArgument = Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe by name, or a .toml file.")]


@app.command()
def go(
    pipeline: PipelineArgument,
    host: HostsOption = None,
    lanes: LanesOption = None,
    abandon: AbandonOption = False,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, change nothing (also DRY_RUN=1).")] = False,
    attempt: AttemptOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the device lease instead of ending with 7.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Launch, and leave at once.")] = False,
    deadline: DeadlineOption = None,
    stall: StallOption = None,
    waive: WaiveOption = None,
    kd_cache_ro: CacheOption = False,
    json: JsonOption = False,
) -> ExitCode:
    """Do a pipeline: plan, build, launch, follow, collect, verify; ends with the verdict and its exit code.

    Repeating it changes nothing: what runs is followed, what finished is reported with the code that it earned.
    """
    from dispatch.following.limits import Limits

    adjust = Limits.adjuster(deadline or (), stall)
    dry_run = dry_run or _dry_run()
    wanted = _Wanted(pipeline, host, set_, attempt, wait, lanes, abandon, waive, kd_cache_ro)
    with _asked(wanted, readonly=dry_run) as (places, asks, transports):
        if len(asks) > 1:
            from dispatch.pairing.session import pair_session, preview_both

            if dry_run:
                return preview_both(asks, transports, places, as_json=json)
            return pair_session(transports, places, json=json, adjust=adjust).go_both(asks, detach=detach)
        from dispatch.session import Session, preview

        if dry_run:
            return preview(asks[0], places, as_json=json, transport=transports[0])
        return Session(transports[0], places, json=json, adjust=adjust).go(asks[0], detach=detach)


@app.command()
def plan(
    pipeline: PipelineArgument,
    host: HostsOption = None,
    lanes: LanesOption = None,
    abandon: AbandonOption = False,
    set_: SetOption = None,
    attempt: AttemptOption = None,
    waive: WaiveOption = None,
    kd_cache_ro: CacheOption = False,
    json: JsonOption = False,
) -> ExitCode:
    """Show what `go` would do, and why; nothing is created or changed anywhere."""
    wanted = _Wanted(pipeline, host, set_, attempt, False, lanes, abandon, waive, kd_cache_ro)
    with _asked(wanted, readonly=True) as (places, asks, transports):
        if len(asks) > 1:
            from dispatch.pairing.session import preview_both

            return preview_both(asks, transports, places, as_json=json)
        from dispatch.session import preview

        return preview(asks[0], places, as_json=json, transport=transports[0])


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run id, or the beginning of one.")] = None,
    host: HostOption = None,
    each: EachOption = None,
    json: JsonOption = False,
) -> ExitCode:
    """Say how a run is, or all that this laptop knows of; asks the hosts, follows nothing."""
    from dispatch.records import recorded
    from dispatch.standing import print_standing

    if each is not None:
        records = recorded(_places()[0])
        mine = [one for one in records if run is None or one.run.startswith(run)]
        return dispatch_hosts.status_each(each, host, mine, as_json=json)
    if run is None:
        places, inventory = _places()
        if host is not None:
            inventory.choose(host, {})  # a host that cannot be named has no runs, which is not the same as none yet
        records = [one for one in recorded(places) if host is None or one.host == host]
        return print_standing(places, records, as_json=json)
    places, record, _where = located(run, host)
    return print_standing(places, [record], as_json=json, single=True)


@app.command()
def cancel(
    run: RunArgument,
    host: HostOption = None,
    grace: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, max=600, help="Between TERM and KILL; else the run's stop_grace."),
    ] = None,
) -> ExitCode:
    """End a run: TERM, a grace, KILL for all of its processes, and a look whether they are gone.

    Of a run over two hosts both are ended, the leader first.
    """
    from dispatch.conclude import worst
    from dispatch.standing import cancel_run
    from dispatch.transport.open import open_transport

    _no_preview("cancel")
    places, record, where = located(run, host)
    codes = []
    for one in (record, *record.following()):
        there = where if one is record else one.at_host(_places()[1].get(one.host))
        with contextlib.closing(open_transport(there, places)) as transport:
            codes.append(cancel_run(transport, one.run, grace=grace, known=one is record))
    return worst(codes)


@app.command()
def collect(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="A run id, or the beginning of one.")] = None,
    host: HostOption = None,
    each: EachOption = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> ExitCode:
    """Copy what a finished run left into ./runs (or $EVIDENCE_DIR), each file verified; resumes where it was cut.

    With --each all finished runs of those hosts that this laptop knows of, or those that begin with RUN.
    """
    from json import dumps

    from dispatch.collect import collect as fetch
    from dispatch.records import recorded
    from dispatch.transport.open import open_transport
    from latentforge.errors import RefusedError

    _no_preview("collect")
    if each is not None:
        mine = [one for one in recorded(_places()[0]) if run is None or one.run.startswith(run)]
        return dispatch_hosts.collect_each(each, host, mine, as_json=json)
    if run is None:
        raise RefusedError("collect: no RUN is named", next="latentforge dispatch status   lists them")
    places, record, where = located(run, host)
    transport = open_transport(where, places)
    try:
        copied = fetch(transport, record.run, places)
    finally:
        transport.close()
    came = f"{copied.fetched / 1e6:.1f} MB came" if copied.fetched else "all was here"
    line = f"{copied.folder}  {copied.files} files, {copied.bytes / 1e6:.1f} MB verified; {came}{copied.told}"
    print(dumps(copied.as_json(), indent=2) if json else line)
    return ExitCode.PASS


@app.command()
def enrol(
    name: Annotated[str, typer.Argument(metavar="HOST", help="What you call the host.")],
    address: Annotated[str | None, typer.Option(help="Host name, address or ssh alias; HOST itself if absent.")] = None,
    user: Annotated[str | None, typer.Option(help="Login name; what ~/.ssh/config says if absent.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of sshd.")] = None,
    identity: Annotated[str | None, typer.Option(metavar="FILE", help="Private key to use, and no other.")] = None,
    root: Annotated[str | None, typer.Option(metavar="PATH", help="State root on the host.")] = None,
    python: Annotated[str | None, typer.Option(metavar="PATH", help="Python 3.11 or newer on the host.")] = None,
    lock: Annotated[str | None, typer.Option(help="Lock file in constraints/ to build from (cpu).")] = None,
    gb10: Annotated[bool | None, typer.Option("--gb10/--no-gb10", help="Declare it a GB10.")] = None,
    link: Annotated[str | None, typer.Option(metavar="INTERFACE", help="Its end of the link to another host.")] = None,
    hca: Annotated[str | None, typer.Option(metavar="CARD,CARD", help="Its RDMA cards there (NCCL_IB_HCA).")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Accept other keys than those that are pinned.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Pin the keys that are offered now, without asking.")] = False,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="SHA256:…", help="Pin the key with this fingerprint, and no other.")
    ] = None,
) -> ExitCode:
    """Trust a host: fetch its keys, show their fingerprints, pin them, and try to log in."""
    from dispatch.hosts.enrol import enrol as do_enrol

    _no_preview("enrol")
    places, inventory = _places()
    given = {"address": address, "user": user, "port": port, "identity": identity, "root": root, "python": python}
    given |= {"lock": lock, "gb10": gb10, "link": link, "hca": hca}
    wanted = {field: value for field, value in given.items() if value is not None}
    return do_enrol(name, wanted, places, inventory, replace=replace, yes=yes, expected=fingerprint)


@app.command()
def hosts(json: JsonOption = False) -> ExitCode:
    """List the hosts that can be named, and the keys that are pinned."""
    from dispatch.standing import print_hosts

    _laptop, inventory = _places()
    return print_hosts(inventory, as_json=json)


def _places() -> tuple[Places, Inventory]:
    from dispatch.hosts.inventory import Inventory
    from dispatch.places import Places

    places = Places.from_environment(os.environ)
    return places, Inventory.load(places)


class _Wanted(NamedTuple):
    """The words of `go` and `plan` that say what is asked of which host."""

    pipeline: str
    host: str | None
    overrides: list[str] | None
    attempt: str | None
    wait: bool
    lanes: str | None
    abandon: bool
    waive: list[str] | None
    cache_readonly: bool = False

    def of(self, where: Host, lanes: Sequence[str] = (), hosts: Sequence[str] = ()) -> Ask:
        """The request to one host, or to one of the two ``hosts``."""
        from latentforge.spec.dotenv import Environment

        overrides = [*(self.overrides or ()), *(["teacher.cache_readonly=true"] if self.cache_readonly else ())]
        words, env = (overrides, self.attempt, self.wait), Environment.here()
        return _asked_of(self.pipeline, where, *words, env=env, lanes=lanes, hosts=hosts, waive=self.waive)


@contextlib.contextmanager
def _asked(wanted: _Wanted, *, readonly: bool) -> Iterator[tuple[Places, tuple[Ask, ...], tuple[Transport, ...]]]:
    """What is asked, of one host or of two, and a transport to each of them; closed in the end."""
    from dispatch.transport.open import open_transport
    from latentforge.errors import RefusedError

    if wanted.attempt not in (None, "next"):
        raise RefusedError(f"--attempt {wanted.attempt!r} is not known", next="--attempt next")
    if wanted.abandon and wanted.lanes is None:
        raise RefusedError("--abandon says that a lane may be left behind, and there are no --lanes")
    places, inventory = _places()
    with contextlib.ExitStack() as opened:
        if wanted.lanes is not None:
            ask = dispatch_hosts.lane_ask(
                wanted.of, wanted.lanes, wanted.host, places, inventory, abandon=wanted.abandon
            )
            transport = open_transport(ask.host, places, readonly=readonly)
            yield places, (ask,), (opened.enter_context(contextlib.closing(transport)),)
            return
        hosts, transports = inventory.choose_all(wanted.host, os.environ), []
        for host in hosts:
            transports.append(open_transport(host, places, readonly=readonly))
            transports[-1].ahead("probe")  # the host starts our agent while the rest is imported and the request made
            opened.enter_context(contextlib.closing(transports[-1]))
        names = [host.name for host in hosts] if len(hosts) > 1 else ()
        yield places, tuple(wanted.of(host, hosts=names) for host in hosts), tuple(transports)


def _asked_of(
    pipeline: str,
    where: Host,
    overrides: list[str] | None,
    attempt: str | None,
    wait: bool,
    *,
    env: Mapping[str, str],
    lanes: Sequence[str] = (),
    hosts: Sequence[str] = (),
    waive: list[str] | None = None,
) -> Ask:
    from dispatch.planning.ask import asked
    from dispatch.preflight.asking import check_waivers

    return asked(
        pipeline,
        where,
        env=env,
        overrides=overrides or [],
        attempt_next=attempt == "next",
        wait=wait,
        lanes=lanes,
        hosts=hosts,
        waived=check_waivers(waive or []),
        stale=_stale_extension,
    )


def located(run: str, host: str | None) -> tuple[Places, Record, Host]:
    """The record of a run and the host that holds it; with ``--host`` no record is needed: the host knows its runs."""
    from dispatch.records import Record, find, find_there, recorded
    from dispatch.transport.open import open_transport

    places, inventory = _places()
    if host is not None and not any(one.run.startswith(run) for one in recorded(places)):
        where = inventory.choose(host, os.environ)
        transport = open_transport(where, places, readonly=True)
        try:
            run = find_there(transport, run)
        finally:
            transport.close()
        return places, Record(run, where.name, where.root, where.user, (run,), "", "", ""), where
    record = find(places, run)
    return places, record, record.at_host(inventory.get(host or record.host))


def _stale_extension() -> str | None:
    """Why the extension that is installed here must be built again; None where it fits, or where there is none."""
    from latentforge.errors import LatentForgeError
    from latentforge.kernels.native import native

    try:
        native()
    except LatentForgeError as error:
        return None if isinstance(error.__cause__, ImportError) else str(error)
    return None


def _dry_run() -> bool:
    from latentforge.errors import RefusedError

    value = os.environ.get("DRY_RUN", "")
    if value not in ("", "0", "1"):
        raise RefusedError(f"DRY_RUN={value!r} is neither 0 nor 1 (environment variable)")
    return value == "1"


def _no_preview(command: str) -> None:
    """Refuse, where a dry run is asked for, a command that has none: it would do what it says."""
    from latentforge.errors import RefusedError

    if _dry_run():
        raise RefusedError(
            f"{command} has no preview, and DRY_RUN=1 is set (environment variable); nothing was done",
            next=f"to do it:  DRY_RUN=0 latentforge dispatch {command} …",
        )


dispatch_hosts.add_to(app)
dispatch_pull.add_to(app)
dispatch_watch.add_to(app)
dispatch_gc.add_to(app)
dispatch_preflight.add_to(app)
