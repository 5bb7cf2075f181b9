"""The plan that was applied last to a host for a pipeline, and what has changed in judgement since, with the cause."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dispatch.hosts.facts import moment
from dispatch.places import Places, write_atomic, writing
from dispatch.planning.ask import Ask
from dispatch.planning.plan import Plan

SCHEMA = 1
_TO_DO = frozenset({"run", "send", "write", "follow"})


@dataclass(frozen=True)
class Since:
    """What is different now: ``changes`` are sentences, ``done`` the steps that the applied plan was to do and did."""

    plan: str
    at: str
    changes: tuple[str, ...]
    done: tuple[str, ...]

    def lines(self) -> list[str]:
        """The difference as a plan shows it."""
        head = f"since plan {self.plan[:8]}, applied {moment(self.at)}:"
        done = f"done: {', '.join(self.done)}" if self.done else ""
        if not self.changes:
            return [f"  {head} {done or 'no judgement has changed'}"]
        return [f"  {head}", *(f"    {line}" for line in (*self.changes, *([done] if done else [])))]

    def as_json(self) -> dict[str, Any]:
        """The difference for programs."""
        return {"plan": self.plan, "at": self.at, "changes": list(self.changes), "done": list(self.done)}


def keep_applied(places: Places, plan: Plan, ask: Ask) -> None:
    """Keep a plan as the one that was applied last."""
    path = _path(places, ask)
    content = _content(plan, ask)
    earlier = _read(path)
    if earlier is not None and {**earlier, "at": ""} == {**content, "at": ""}:
        return  # the same judgements again: the time of the first is the one to tell
    with writing():
        write_atomic(path, json.dumps(content, indent=1, sort_keys=True).encode())


def since_applied(places: Places, plan: Plan, ask: Ask) -> Since | None:
    """What has changed since the last plan of this pipeline was applied to this host; None where none was."""
    before = _read(_path(places, ask))
    return None if before is None else compare(before, _content(plan, ask))


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Since:
    """The difference between two kept plans: first what was asked otherwise, then what follows from it."""
    changes = [*_asked_otherwise(before, now)]
    earlier = {step["name"]: step for step in before["steps"]}
    later = {step["name"]: step for step in now["steps"]}
    done = []
    for name, step in later.items():
        was = earlier.get(name)
        if was is None:
            changes.append(f"{name}  new: {step['will']}  ({_why(step)})")
        elif was["run"] != step["run"]:
            changes.append(f"{name}  {was['run'] or '-'} → {step['run'] or '-'}: {step['will']}  ({_why(step)})")
        elif was["will"] in _TO_DO and step["will"] == "keep":
            done.append(name)
        elif was["will"] != step["will"]:
            changes.append(f"{name}  {was['will']} → {step['will']}  ({_why(step)})")
    changes += [f"{name}  not needed any more" for name in earlier if name not in later]
    return Since(before["plan"], before["at"], tuple(changes), tuple(done))


def _asked_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted({*before["spec"], *now["spec"]}):
        was, wanted = before["spec"].get(field), now["spec"].get(field)
        if was != wanted:
            yield f"{field}  {_told(was)} → {_told(wanted)}"
    if before["code"] != now["code"]:
        yield f"code  {before['code_label']} → {now['code_label']}"
    if before["lock"] != now["lock"]:
        yield f"lock file  {before['lock_name']} {before['lock'][:12]} → {now['lock_name']} {now['lock'][:12]}"


def _why(step: Mapping[str, Any]) -> str:
    """The reason of a step, without the run's id that may stand before it."""
    because, run = str(step["because"]), step["run"]
    return because.removeprefix(f"{run}  ") if run else because


def _told(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def _content(plan: Plan, ask: Ask) -> dict[str, Any]:
    steps = [{"name": s.name, "will": s.will, "run": s.run, "because": s.because} for s in plan.steps]
    return {
        "schema": SCHEMA,
        "plan": plan.digest,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": ask.recipe,
        "code": ask.code,
        "code_label": ask.code_label,
        "lock": ask.lock,
        "lock_name": ask.lock_name,
        "spec": dict(_flat(ask.spec.model_dump(mode="json"))),
        "steps": steps,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _path(places: Places, ask: Ask) -> Path:
    """One file a host (or two), state root and pipeline; a pipeline file is named by where it lies."""
    recipe = os.path.abspath(ask.recipe) if ask.recipe.endswith(".toml") or "/" in ask.recipe else ask.recipe
    beside = "".join(f"\0{name}" for name in ask.hosts[1:])
    name = hashlib.sha256(f"{ask.host.root or ''}\0{recipe}{beside}".encode()).hexdigest()[:16]
    return places.plans(ask.host.name) / f"{name}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        return value if value["schema"] == SCHEMA else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
