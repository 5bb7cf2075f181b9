"""Every run that is known of, a row each: read from manifests, which is cheap, and from events where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.evidence.ledger import LEDGER, Entry, read_chain
from latentforge.evidence.reading import read_run
from latentforge.evidence.statement import MANIFEST, read_json
from latentforge.spec.identity import KINDS, RUN_ID
from latentforge.verdicts import Outcome, Verdict

Where = Literal["here", "ledger", "host"]
"""``here``: its files were collected. ``ledger``: the ledger names it, its files are elsewhere. ``host``: given to a
host from this laptop and not collected."""


@dataclass(frozen=True)
class Row:
    """A run. ``began`` is UTC (ISO 8601, seconds); ``outcome`` None where nobody here knows it; ``told`` its first
    verdict that is no pass, else its last. ``asked`` is flat, as in manifests; None where the files are not here."""

    run: str
    kind: str
    where: Where
    outcome: str | None
    host: str | None
    began: str | None
    seconds: float | None
    entry: int | None
    told: str
    asked: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """The row as data."""
        return asdict(self)


@dataclass(frozen=True)
class Given:
    """A run that was given to a host: what a laptop remembers of it."""

    run: str
    host: str
    at: str


@dataclass(frozen=True)
class Filter:
    """Which rows are meant; each field that is None asks for nothing. ``where`` holds ``FIELD=VALUE`` of what was
    asked for, ``since`` a date or time (ISO 8601, UTC)."""

    kind: str | None = None
    outcome: str | None = None
    host: str | None = None
    since: str | None = None
    where: tuple[str, ...] = ()

    def takes(self, row: Row) -> bool:
        """Whether a row is meant. What a row does not say is never what was asked for."""
        outcome = None if self.outcome is None else self.outcome.lower()
        plain = ((self.kind, row.kind), (outcome, row.outcome), (self.host, row.host))
        if any(asked is not None and asked != found for asked, found in plain):
            return False
        if self.since is not None and (row.began is None or row.began < utc(self.since)):
            return False
        return all(_asked(row, one) for one in self.where)


def list_rows(folder: Path, given: Iterable[Given] = ()) -> tuple[list[Row], list[str]]:
    """All runs by their beginning, and what could not be read, in a line each.

    ``folder`` holds run folders and the ledger; one that does not exist holds none.
    """
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    try:
        if (folder / LEDGER).is_file():
            entries = {entry.run: entry for entry in read_chain(folder / LEDGER).entries}
    except LatentForgeError as error:
        problems.append(f"{LEDGER}: {error}")
    rows: dict[str, Row] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if RUN_ID.fullmatch(path.name) and path.is_dir():
            try:
                rows[path.name] = _here(path, entries.get(path.name))
            except LatentForgeError as error:
                problems.append(f"{path.name}: {error}")
    for run, entry in entries.items():
        if run not in rows and not any(one.startswith(f"{run}:") for one in problems):
            told = "its files are not here"
            rows[run] = Row(run, kind_of(run), "ledger", None, None, entry.wall, None, entry.entry, told, None)
    for one in given:
        if one.run not in rows and not any(told.startswith(f"{one.run}:") for told in problems):
            told = f"latentforge dispatch collect {one.run}"
            try:
                began = utc(one.at)
            except LatentForgeError as error:
                problems.append(f"{one.run}: {error}")
                continue
            rows[one.run] = Row(one.run, kind_of(one.run), "host", None, one.host, began, None, None, told, None)
    return sorted(rows.values(), key=lambda row: (row.began or "", row.run)), problems


def kind_of(run: str) -> str:
    """The kind of a run id."""
    return run.partition("-")[0]


def utc(text: str) -> str:
    """A date or time as UTC to the second, the form that rows are compared in; one without a zone is UTC."""
    try:
        found = datetime.fromisoformat(text)
        return _told_time(found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC))
    except (ValueError, OverflowError):  # a zone may lead out of all years
        raise RefusedError(f"{text!r} is no date or time", next="--since 2026-11-19, or 2026-11-19T14:02") from None


def _told_time(found: datetime) -> str:
    """With four digits of the year, in whose order texts compare (strftime writes fewer for early ones)."""
    return found.isoformat(timespec="seconds").replace("+00:00", "Z")


def check_filter(asked: Filter) -> None:
    """Refuse a value that no row could have."""
    if asked.kind is not None and asked.kind not in KINDS:
        raise RefusedError(f"--kind {asked.kind!r} is none of {', '.join(KINDS)}")
    if asked.outcome is not None and asked.outcome.upper() not in Outcome.__members__:
        known = ", ".join(one.lower() for one in Outcome.__members__)
        raise RefusedError(f"--outcome {asked.outcome!r} is none of {known}")
    if asked.since is not None:
        utc(asked.since)
    for one in asked.where:
        if "=" not in one.strip("="):
            raise RefusedError(f"--where {one!r} is no FIELD=VALUE", next="--where teacher.layers=3")


def _here(path: Path, entry: Entry | None) -> Row:
    """From the manifest; from the run's own files where it has none yet."""
    manifest = read_json(path / MANIFEST)
    try:
        return _read(path, entry) if manifest is None else _concluded(path, entry, manifest["predicate"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = "its files say" if manifest is None else f"its {MANIFEST} says"
        raise RefusedError(f"{what} something else than is known here: {error!r}") from None


def _concluded(path: Path, entry: Entry | None, said: Mapping[str, Any]) -> Row:
    end, host = said["end"], said["host"]
    ended = end["record"] or {}
    began = ended.get("started")
    told = None if began is None else _told_time(datetime.fromtimestamp(began, UTC))
    seconds = ended.get("seconds")
    verdicts = [
        Verdict(one["falsifier"], Outcome[one["outcome"].upper()], one["text"] or "") for one in said["verdicts"]
    ]
    return Row(
        run=path.name,
        kind=kind_of(path.name),
        where="here",
        outcome=Outcome[end["outcome"].upper()].name.lower(),
        host=host.get("name") or host.get("hostname"),
        began=told or (entry.wall if entry is not None else None),
        seconds=None if seconds is None else float(seconds),
        entry=None if entry is None else entry.entry,
        told=_told(verdicts),
        asked=said["configuration"]["requested"],
    )


def _read(path: Path, entry: Entry | None) -> Row:
    record = read_run(path)
    events, host = record.events, record.host or {}
    return Row(
        run=path.name,
        kind=record.kind,
        where="here",
        outcome=str(record.end["outcome"]),
        host=host.get("name") or host.get("hostname"),
        began=utc(events[0].wall) if events else None,
        seconds=events[-1].t - events[0].t if events else None,
        entry=None if entry is None else entry.entry,
        told=_told(record.verdicts),
        asked=record.requested,
    )


def _told(verdicts: Sequence[Verdict]) -> str:
    """The first verdict that is no pass, else the last one."""
    if not verdicts:
        return ""
    shown = next((one for one in verdicts if one.outcome is not Outcome.PASS), verdicts[-1])
    return " ".join(f"{shown.falsifier} {shown.outcome.name} {shown.text}".split())


def _asked(row: Row, condition: str) -> bool:
    """Whether a field that was asked for has a value, as a pipeline file writes it; its own section may be named."""
    field, _, value = condition.partition("=")
    field = field.removeprefix(f"{row.kind}.")
    if row.asked is None or field not in row.asked:
        return False
    found = row.asked[field]
    if isinstance(found, int | float) and not isinstance(found, bool):
        try:
            return float(value) == float(found)
        except ValueError:
            return False
    return (found if isinstance(found, str) else json.dumps(found)) == value
