"""What changed between two runs: what was asked, what was in force, who took part, what came out, what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentforge.errors import RefusedError
from latentforge.evidence.configuration import flatten, same
from latentforge.evidence.reading import RunRecord
from latentforge.evidence.statement import derive, digest_files, host_version

ABSENT = object()
"""The value of what one of two runs does not have; null is a value of its own."""


@dataclass(frozen=True)
class Change:
    """One thing that differs: its name, and its value in either run (``ABSENT`` where a run lacks it)."""

    what: str
    before: Any
    after: Any

    def as_json(self) -> dict[str, Any]:
        """The change as data; a run that lacks it has no key."""
        sides = {"before": self.before, "after": self.after}
        return {"what": self.what, **{side: value for side, value in sides.items() if value is not ABSENT}}


@dataclass(frozen=True)
class Section:
    """The changes of one subject in the order of their names, and how many values are the same in both runs."""

    name: str
    changes: tuple[Change, ...]
    same: int


def compare_runs(before: RunRecord, after: RunRecord) -> list[Section]:
    """What differs between two runs, subject by subject, read from their files; nothing is verified.

    Files are hashed. RefusedError where a folder is compared with itself, or a folder has no identity.
    """
    if before.folder == after.folder:
        raise RefusedError(f"{before.folder} is compared with itself", next="latentforge runs list")
    first, second = _picture(before), _picture(after)
    return [_section(name, first[name], second[name]) for name in first]


def _section(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Section:
    names = sorted({*before, *after})
    sides = [(one, before.get(one, ABSENT), after.get(one, ABSENT)) for one in names]
    changes = tuple(Change(one, a, b) for one, a, b in sides if a is ABSENT or b is ABSENT or not same(a, b))
    return Section(name, changes, len(names) - len(changes))


def _picture(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Everything that is compared, by subject, flat."""
    digests = digest_files(record.folder)
    derived = derive(record.folder, digests)
    host = record.host or {}
    tensors = _tensors(derived["identities"])
    identities = {
        **derived["identities"],
        "driver": host_version("driver", derived, host),
        "kernel": host_version("kernel", derived, host),
    }
    asked = {"kind": record.kind, "attempt": record.attempt, **(record.requested or {})}
    return {
        "asked for": asked,
        "in force": record.effective or {},
        "identities": flatten(identities, ""),
        "environment": flatten(derived["environment"], ""),
        "host": flatten(host, ""),
        "seeds": flatten(derived["seeds"], ""),
        "verdicts": _verdicts(record),
        "results": _results(record),
        "cost": _cost(record),
        "tensors": tensors,
        "files": digests,
    }


def _tensors(identities: dict[str, Any]) -> dict[str, Any]:
    """The digest of each tensor of the run's weights and of its inputs', which it takes out of the identities."""
    files: dict[str, Any] = dict(identities.pop("tensors"))
    for name, each in identities["inputs"].items():
        if isinstance(each["read"], dict) and isinstance(each["read"].get("tensors"), dict):
            read = dict(each["read"])
            files.update({f"{name}: {file}": tensors for file, tensors in read.pop("tensors").items()})
            identities["inputs"][name] = {**each, "read": read}
    # Of a run's own files they are as they were hashed here; of its inputs, whatever the trainer wrote down.
    listed = [
        (f"{file} {name}", one) for file, each in files.items() if isinstance(each, dict) for name, one in each.items()
    ]
    return {name: one["sha256"] if isinstance(one, dict) and "sha256" in one else one for name, one in listed}


def _verdicts(record: RunRecord) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for verdict in record.verdicts:
        found[verdict.falsifier] = verdict.outcome.name.lower()
        found.update(flatten({"measured": verdict.measured}, "", f"{verdict.falsifier} "))
    return found


def _results(record: RunRecord) -> dict[str, Any]:
    found: dict[str, Any] = {name: record.end[name] for name in ("outcome", "code")}
    for series in record.metrics:
        name = " ".join(part for part in (series.model, series.name, series.split) if part is not None)
        if series.kept is not None:
            found[f"{name} (kept)"] = series.kept[1]
    return found


def _cost(record: RunRecord) -> dict[str, Any]:
    seconds = {f"{name} seconds": value for name, value in (record.timings or {}).items()}
    flops = flatten({"flops": record.flops}, "") if record.flops is not None else {}
    memory = {} if record.peak_memory_bytes is None else {"peak_memory_bytes": record.peak_memory_bytes}
    return {**seconds, **flops, **memory}
