"""``latentforge runs``: every run that is known of, one of them, or several side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from latentforge.evidence.reading import RunRecord
    from latentforge.history.rows import Given, Row

app = typer.Typer(no_args_is_help=True, help="List, show and compare runs, of this folder, its ledger and hosts.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _group() -> None:
    """List, show and compare runs, of this folder, its ledger and hosts."""


@app.command("list")
def list_runs(
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="data, teacher, score, distill, latent, …")] = None,
    outcome: Annotated[str | None, typer.Option(metavar="OUTCOME", help="pass, fail or unknown.")] = None,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="Where it ran.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="A date, or a time (UTC).")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=VALUE", help="What was asked: teacher.layers=3; all must hold.")
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="The last N alone.")] = None,
    json: AsJson = False,
) -> ExitCode:
    """List runs by their beginning: those in ./runs (or EVIDENCE_DIR), in its ledger, and given to hosts from here.

    No host is asked: latentforge dispatch status does that. Exit code: 0; 3 where something could not be read.
    """
    import sys

    from latentforge.cli.terminal import print_json
    from latentforge.evidence.reading import evidence_folder
    from latentforge.history.rows import Filter, check_filter, list_rows

    asked = Filter(kind, outcome, host, since, tuple(where or ()))
    check_filter(asked)
    rows, problems = list_rows(evidence_folder(), _given())
    rows = [row for row in rows if asked.takes(row)]
    rows = rows if last is None else rows[-last:]
    if json:
        print_json({"runs": [row.as_json() for row in rows], "unread": problems})
    else:
        _print_rows(rows)
    for problem in problems:
        print(f"UNKNOWN  {problem}", file=sys.stderr)
    return ExitCode.UNKNOWN if problems else ExitCode.PASS


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or the beginning of its id.")],
    json: AsJson = False,
) -> ExitCode:
    """Show one run: how it ended, verdicts, results, cost, settings. latentforge report makes a page of it."""
    from latentforge.cli.terminal import accent, print_json
    from latentforge.evidence.reading import find_run, read_run
    from latentforge.history.comparing import picture
    from latentforge.report.words import one_line

    record = read_run(find_run(run, next="latentforge runs list"))
    seen = picture(record)
    if json:
        told = [
            {"falsifier": one.falsifier, "outcome": one.outcome.name.lower(), "text": one.text}
            for one in record.verdicts
        ]
        print_json({"run": record.id, "inputs": _inputs(record), **seen, "verdicts": told, "warnings": record.warnings})
        return ExitCode.PASS
    print(f"{record.id}  {record.end['outcome']}" + (f"  {one_line(record.reason)}" if record.reason else ""))
    for name, value in _inputs(record).items():
        print(f"  {one_line(name):<10} {one_line(value)}")
    for verdict in record.verdicts:
        print(f"{verdict.falsifier} {accent(verdict.outcome.name)} {one_line(verdict.text)}")
    for subject in ("held out, as saved", "cost", "asked for"):
        if seen[subject]:
            print(accent(subject))
            told = {one_line(name): _plain(value) for name, value in seen[subject].items()}
            width = max(map(len, told))
            for name, value in told.items():
                print(f"  {name:<{width}}  {value}")
    return ExitCode.PASS


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Folders, or beginnings of ids.")],
    every: Annotated[bool, typer.Option("--all", help="What is the same in all of them, too.")] = False,
    json: AsJson = False,
) -> ExitCode:
    """Put runs side by side: what differs in what was asked, the verdicts, the results and the cost.

    latentforge evidence diff compares two of them to the last tensor.
    """
    from latentforge.cli.terminal import accent, print_json
    from latentforge.evidence.reading import find_run, read_run
    from latentforge.history import comparing
    from latentforge.report.words import one_line

    records = [read_run(find_run(text, next="latentforge runs list")) for text in runs]
    lines = [one for one in comparing.compare(records) if every or one.differs]
    if json:
        found: dict[str, Any] = {}
        for line in lines:
            found.setdefault(line.subject, {})[line.name] = list(line.values)
        print_json({"runs": [record.id for record in records], "lines": found})
        return ExitCode.PASS
    table = [("", [_short(record.id) for record in records])]
    table += [(one_line(line.name), [_plain(value) for value in line.values]) for line in lines]
    first = max(len(name) for name, _ in table) + 2
    widths = [max(len(values[at]) for _, values in table) for at in range(len(records))]
    subjects = ["", *(line.subject for line in lines)]
    before = ""
    for subject, (name, values) in zip(subjects, table, strict=True):
        if subject != before:
            print(accent(subject))
            before = subject
        print(
            f"  {name:<{first}}" + "  ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        )
    if not lines:
        print("nothing of what was asked, judged or measured differs")
    return ExitCode.PASS


def _given() -> list[Given]:
    import os

    from dispatch.places import Places
    from dispatch.records import recorded
    from latentforge.history.rows import Given

    return [Given(one.run, one.host, one.at) for one in recorded(Places.from_environment(os.environ))]


def _print_rows(rows: list[Row]) -> None:
    from latentforge.cli.terminal import accent
    from latentforge.report.words import one_line

    if not rows:
        print("no such run.   next:  latentforge dispatch go smoke")
    hosts = max((len(row.host or "–") for row in rows), default=0)
    for row in rows:
        outcome = f"({row.where})" if row.outcome is None else row.outcome.upper()
        began = "–" if row.began is None else row.began.replace("T", " ")[:16]
        seconds = "" if row.seconds is None else f"{row.seconds:.0f} s"
        head = f"{row.run:<32}  {accent(f'{outcome:<8}')}  {row.host or '–':<{hosts}}  {began:<16}  {seconds:>8}"
        print(f"{head}  {one_line(row.told)}".rstrip())


def _inputs(record: RunRecord) -> dict[str, str]:
    return dict(record.identity.inputs) if record.identity else {}


def _short(run: str) -> str:
    kind, _, digits = run.partition("-")
    return f"{kind}-{digits[:6]}…"


def _plain(value: Any) -> str:
    import json

    from latentforge.report.words import one_line

    if isinstance(value, float):
        return f"{value:.6g}"
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
