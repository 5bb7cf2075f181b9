"""``latentforge targets``: look into a store of teacher targets, check it, keep it in bounds, measure it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from latentforge.cli import targets_bench
from latentforge.cli.terminal import print_json, size
from latentforge.errors import RefusedError
from latentforge.verdicts.exitcode import ExitCode

app = typer.Typer(no_args_is_help=True, help="Look into a store of teacher targets, check it, keep it in bounds.")
app.command("bench")(targets_bench.bench)

Store = Annotated[Path, typer.Argument(help="The store: targets.sqlite of a score run, or teacher.cache.")]
_DAY = 86_400  # seconds
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def stats(store: Store, as_json: AsJson = False) -> None:
    """Show what a store was made for and what it holds; nothing is written."""
    from datetime import UTC, datetime

    from latentforge.targets.store import TargetStore

    with TargetStore.open(store) as opened:
        said = opened.stats()
    if as_json:
        print_json(said)
        return
    teacher = said["identity"]
    drawn = f", {said['draws']} draws a position, seed {said['seed']}" if said["mode"] == "sample" else ""
    temperatures = ", ".join(f"{t:g}" for t in said["temperatures"])
    mass = ", ".join(f"{value:.2%} at T = {t}" for t, value in said["tail_mass"].items() if value is not None)
    print(f"{store}")
    words = [str(teacher.get(name, "?")) for name in ("model", "sha256", "quantization")]
    print(f"  teacher   {words[0]}  {words[1][:12]}  {words[2]}")
    print(f"  rows      {said['rows']} sequences, {said['mode']} k = {said['k']}, T = {temperatures}{drawn}")
    print(f"  size      {size(said['bytes'])}, of it rows {size(said['packed_bytes'])}", end="")
    print(f", and a journal of {size(said['journal_bytes'])}" if said["journal_bytes"] else "")
    steps = "float32 as given" if said["rounding"] == "none" else "in steps"
    print(f"  numbers   rounding {said['rounding']} ({steps}), read with {said['reader']}")
    print(f"  outside   {mass or 'no rows yet'}")
    if said["stored"] is not None:
        first, last = (datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M UTC") for t in said["stored"])
        print(f"  stored    {first} to {last}")
    limit = f"{said['ttl_seconds'] / _DAY:g} days" if said["ttl_seconds"] else "none"
    print(f"  limits    age {limit}, size {size(said['max_bytes']) if said['max_bytes'] else 'none'}")
    if said["too_old"]:
        print(f"  {said['too_old']} rows are too old and not given out:  latentforge targets prune {store}")


@app.command()
def check(
    store: Store,
    drop: Annotated[
        bool, typer.Option("--drop", help="Delete the damaged rows, so that they are scored again.")
    ] = False,
    as_json: AsJson = False,
) -> ExitCode:
    """Read every row and compare its checksum; exit code 1 where one is damaged."""
    from latentforge.cli.progress import Progress
    from latentforge.targets.store import TargetStore

    with Progress() as progress, TargetStore.open(store) as opened:
        health = opened.check(lambda done, total: progress.tell(f"{done}/{total} rows"))
    dropped = 0
    if drop and health.damaged:
        with TargetStore.open(store, readonly=False) as opened:
            dropped = opened.drop_damaged()
    if as_json:
        print_json(
            {"rows": health.rows, "damaged": list(health.damaged), "structure": health.structure, "dropped": dropped}
        )
    else:
        print(
            f"{store}: {health.rows} rows read, {len(health.damaged)} damaged"
            + (f", {dropped} dropped" if drop else "")
        )
        for key in health.damaged[:10]:
            print(f"  {key}")
        if health.structure is not None:
            print(f"  SQLite: {health.structure}")
            print("  next: score again into a new store")
        elif health.damaged and not drop:
            print(
                f"  next: latentforge targets check {store} --drop, then the score run again: it asks what is missing"
            )
    return ExitCode.PASS if health.good or (health.structure is None and dropped) else ExitCode.FAIL


@app.command()
def prune(
    store: Store,
    ttl_days: Annotated[float | None, typer.Option(help="From now on, rows live so many days.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="From now on, the store takes at most so many bytes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Delete what is too old, then what was used longest ago until the rest fits; take in a journal left behind."""
    from latentforge.targets.store import TargetStore

    if ttl_days is not None and not 0 < ttl_days * _DAY < math.inf:
        raise RefusedError(f"--ttl-days {ttl_days:g} is not a finite number of days above 0")
    with TargetStore.open(store, readonly=False) as opened:
        pruned = opened.prune(ttl_seconds=None if ttl_days is None else ttl_days * _DAY, max_bytes=max_bytes)
        left = opened.stats()["rows"]
    taken = store.stat().st_size
    if as_json:
        print_json({"old": pruned.old, "evicted": pruned.evicted, "rows": left, "bytes": taken})
    else:
        print(f"{store}: {pruned.old} rows were too old, {pruned.evicted} made room; {left} are left, {size(taken)}")
