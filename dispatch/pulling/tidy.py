"""``latentforge dispatch gc``: what can go from a host and how much that frees; removed only when asked to."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dispatch.hosts.inventory import Host
from dispatch.places import Places
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.evidence.digests import file_sha256
from latentforge.spec.identity import RUN_ID
from latentforge.verdicts import ExitCode

_SHOWN = 40


@dataclass(frozen=True)
class Tidied:
    """What can go from one host, what stays and why, and, where it was asked for, what went."""

    host: str
    items: tuple[dict[str, Any], ...]
    kept: tuple[dict[str, Any], ...]
    applied: bool
    removed: tuple[dict[str, Any], ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    again: str = ""

    @property
    def code(self) -> ExitCode:
        """Fail where something that was to go did not."""
        return ExitCode.FAIL if self.skipped else ExitCode.PASS

    def lines(self) -> str:
        """The verdict for people."""
        if self.applied:
            lines = [f"removed  {_row(item)}" for item in self.removed[:_SHOWN]]
            lines += [f"left     {one['room']:<6}  {one['name']}  {one['why']}" for one in self.skipped]
            freed = sum(item["bytes"] for item in self.removed)
            return "\n".join([*lines, f"{len(self.removed)} removed, {_size(freed)} freed; {self._staying()}"])
        lines = [_row(item) for item in self.items[:_SHOWN]]
        if len(self.items) > _SHOWN:
            lines.append(f"… and {len(self.items) - _SHOWN} more")
        total = sum(item["bytes"] for item in self.items)
        lines.append(f"{len(self.items)} can go, {_size(total)}; {self._staying()}")
        return "\n".join([*lines, f"nothing was removed. To do it:  {self.again}" if self.items else "nothing to do."])

    def _staying(self) -> str:
        runs = Counter(_short(one["why"]) for one in self.kept if one["room"] == "runs")
        others = sum(one["room"] != "runs" for one in self.kept)
        told = ", ".join(f"{count} {why}" for why, count in sorted(runs.items()))
        return f"{sum(runs.values())} runs stay" + (f" ({told})" if told else "") + f", and {others} other things"

    def as_json(self) -> dict[str, Any]:
        """The verdict for programs."""
        return {
            "host": self.host,
            "applied": self.applied,
            "items": list(self.items),
            "kept": list(self.kept),
            "removed": list(self.removed),
            "skipped": list(self.skipped),
            "bytes": sum(item["bytes"] for item in (self.removed if self.applied else self.items)),
        }


def _short(why: str) -> str:
    return "named by others" if why.endswith("names it") else why.removeprefix("it is ").split(":")[0]


def _row(item: dict[str, Any]) -> str:
    name = item["name"] if len(item["name"]) < 60 else item["name"][:16] + "…"
    return f"{item['room']:<6}  {name:<32}  {_size(item['bytes']):>9}  {item['why']}"


def _size(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def held_copies(places: Places) -> dict[str, str]:
    """The runs of which this laptop has all files, and the digest of each one's inventory: the proof for the host."""
    found: dict[str, str] = {}
    for path in places.evidence.glob("*/exit.json"):  # written after everything else
        folder = path.parent
        try:
            content = (folder / "artifacts.json").read_bytes()
            files = json.loads(content)["files"]
            whole = all((folder / file["path"]).stat().st_size == file["bytes"] for file in files)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if whole and RUN_ID.fullmatch(folder.name):
            found[folder.name] = hashlib.sha256(content).hexdigest()
    return found


def is_intact(places: Places, run: str) -> bool:
    """Whether the copy of a run still has the bytes that its inventory names: read again, since the host's may go."""
    folder = places.run(run)
    try:
        files = json.loads((folder / "artifacts.json").read_bytes())["files"]
        return all(file_sha256(folder / file["path"]) == file["sha256"] for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def tidying(
    places: Places, *, keep: int, uncollected: bool, apply: bool, again: Callable[[Host], str]
) -> Callable[[Host], Tidied]:
    """The work that looks at each host and, with ``apply``, removes what was shown there and still can go."""
    collected = held_copies(places)
    wishes = {"keep": keep, "uncollected": uncollected, "collected": collected}

    def work(host: Host) -> Tidied:
        transport = open_transport(host, places, readonly=not apply)
        try:
            found = call(transport, "probe", {"gc": wishes}, timeout=300.0).result["gc"]
            items, kept = tuple(found["items"]), tuple(found["kept"])
            if not apply or not items:
                return Tidied(host.name, items, kept, apply, again=again(host))
            transport.install()
            spoilt = [] if uncollected else _spoilt(places, items, collected)
            proven = {run: digest for run, digest in collected.items() if run not in spoilt}
            names = [{"room": one["room"], "name": one["name"]} for one in items if one["name"] not in spoilt]
            done = call(transport, "gc", {**wishes, "collected": proven, "names": names}, timeout=1800.0).result
            why = "its copy here is not what was collected; move it away and collect the run again"
            told = [{"room": "runs", "name": run, "why": why} for run in spoilt]
            return Tidied(host.name, items, kept, True, tuple(done["removed"]), (*told, *done["skipped"]))
        finally:
            transport.close()

    return work


def _spoilt(places: Places, items: Iterable[dict[str, Any]], collected: Mapping[str, str]) -> list[str]:
    """The runs among those that are to go whose copies here were altered since they were collected."""
    runs = [str(one["name"]) for one in items if one["room"] == "runs" and one["name"] in collected]
    return [run for run in runs if not is_intact(places, run)]
