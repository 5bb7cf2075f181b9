"""Reading a run's folder as one record: what reports, comparisons and promotion show is what stands in its files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError
from latentforge.events import Event, in_course, kept_steps, of_kept, sift_events, standing
from latentforge.evidence.configuration import compare_configuration, flatten
from latentforge.evidence.statement import MANIFEST, end_of, read_json
from latentforge.spec.identity import RUN_ID, RunIdentity
from latentforge.spec.reading import UnreadableError
from latentforge.spec.run import RunDir, named_folder
from latentforge.verdicts import FALSIFIER_ID, Outcome, Verdict


@dataclass(frozen=True)
class Series:
    """Numbers of one name over the steps of one model.

    ``steps``, ``values`` and ``seconds`` (on the host's boot clock) have one length, in the order of the log. ``split``
    names the rows that a metric was measured on; a step's own values (``loss``, ``rows``) have none. ``kept`` is the
    step and the value of the weights that the run saves: the last one's, or those that were put back at its end; None
    where the events do not say it of these.
    """

    name: str
    model: str | None
    split: str | None
    steps: tuple[int, ...]
    values: tuple[float, ...]
    seconds: tuple[float, ...]
    kept: tuple[int, float] | None


@dataclass(frozen=True)
class Phase:
    """A named phase: when it began (boot clock, and UTC), and its seconds, None where it never ended."""

    name: str
    began: float
    wall: str
    seconds: float | None


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says of the run. What the folder lacks is None (or empty), never a guess.

    ``requested`` and ``effective`` are flat, as in the manifest (``teacher.layers``; the run's own section without its
    name); ``differences`` name the fields in which they disagree. ``end`` is as in the manifest: ``outcome``, ``code``,
    ``record`` (the host's exit record); its ``outcome`` is ``unknown`` where no last event stands. ``plan``, ``host``,
    ``dispatched`` and ``subjects`` (sha256 by path) are the manifest's; ``host`` else that of ``launch.json``.
    """

    folder: Path
    id: str
    kind: str
    attempt: int | None
    identity: RunIdentity | None
    launch: dict[str, Any] | None
    requested: dict[str, Any] | None
    effective: dict[str, Any] | None
    differences: tuple[dict[str, Any], ...]
    effective_file: dict[str, Any] | None
    """All of ``effective.json``: ``inputs``, ``device``, ``versions``, ``memory`` and what else a trainer states."""
    verdicts: tuple[Verdict, ...]
    metrics: tuple[Series, ...]
    """The ``metric`` events; :meth:`metric` finds one."""
    trained: tuple[Series, ...]
    """The numbers of the ``step`` events (``loss``, ``kd``, ``tokens_per_second`` …); :meth:`steps_of` finds one."""
    phases: tuple[Phase, ...]
    warnings: tuple[str, ...]
    events: tuple[Event, ...]
    """Every event of this run, for what is not told apart above (``compile``, ``memory``, ``checkpoint``)."""
    unread: tuple[str, ...]
    """What stands in the log and was not counted: lines that are no event, events that name another run."""
    end: dict[str, Any]
    reason: str | None
    seeds: dict[str, Any] | None
    timings: dict[str, float] | None
    peak_memory_bytes: int | None
    flops: Any
    versions: dict[str, Any] | None
    device: dict[str, Any] | None
    manifest: dict[str, Any] | None
    """The statement as it stands in ``manifest.json``: not verified, which is ``verify_evidence``'s work."""
    subjects: dict[str, str] | None
    plan: Any
    host: dict[str, Any] | None
    dispatched: dict[str, Any] | None

    @property
    def outcome(self) -> Outcome:
        """What the run earned, over its verdicts and its end."""
        return Outcome[str(self.end["outcome"]).upper()]

    def metric(self, name: str, *, model: str | None = None, split: str | None = None) -> Series | None:
        """The metric of that name; ``model`` and ``split`` narrow it. None where none, or more than one, is meant."""
        return _one(self.metrics, name, model, split)

    def steps_of(self, name: str, *, model: str | None = None) -> Series | None:
        """A value of the steps by its name; None where none, or those of more than one model, are meant."""
        return _one(self.trained, name, model, None)


def read_run(folder: Path) -> RunRecord:
    """The record of a run's folder, on a host or as collected.

    RefusedError where the folder is no run's, or a file of it cannot be read as what its name promises.
    """
    run = RunDir(named_folder(folder))
    if not os.path.isdir(run.path):
        raise RefusedError(f"there is no folder {run.path}", next="latentforge dispatch ls")
    identity = run.load_identity() if os.path.lexists(run.identity_file) else None
    effective = read_json(run.effective_file)
    launch = read_json(run.launch_file)
    manifest = read_json(run.path / MANIFEST)
    predicate = _mapping(manifest, "predicate") or {}
    told, broken = _events(run.events_file)
    events = [event for event in told if event.run == run.run]
    compared = compare_configuration(run.kind, identity.spec, effective or {}) if identity else None
    alone = _mapping(effective, "effective")
    ends = [event for event in events if event.kind == "end"]
    return RunRecord(
        folder=run.path,
        id=run.run,
        kind=run.kind,
        attempt=identity.attempt if identity else None,
        identity=identity,
        launch=launch,
        requested=compared["requested"] if compared else None,
        effective=compared["effective"] if compared else flatten(alone, run.kind) if alone is not None else None,
        differences=tuple(compared["differences"]) if compared else (),
        effective_file=effective,
        verdicts=tuple(_verdicts(events)),
        metrics=tuple(_metrics(standing(events))),
        trained=tuple(_trained(standing(events))),
        phases=tuple(_phases(events)),
        warnings=tuple(str(event.fields.get("message", "")) for event in events if event.kind == "warning"),
        events=tuple(events),
        unread=(
            *(f"line {number} is no event" for number in broken),
            *(f"seq {event.seq} is an event of {event.run}" for event in told if event.run != run.run),
        ),
        end=end_of(events, read_json(run.path / "exit.json")),
        reason=str(ends[-1].fields["reason"]) if ends and ends[-1].fields.get("reason") else None,
        seeds=_mapping(effective, "seeds"),
        timings=_times(effective),
        peak_memory_bytes=_count(effective, "peak_memory_bytes"),
        flops=(effective or {}).get("flops"),
        versions=_mapping(effective, "versions"),
        device=_mapping(effective, "device"),
        manifest=manifest,
        subjects=_subjects(manifest),
        plan=predicate.get("plan"),
        host=_mapping(predicate, "host") or _mapping(launch, "host"),
        dispatched=_mapping(predicate, "dispatched"),
    )


def evidence_folder() -> Path:
    """Where runs are collected: ``EVIDENCE_DIR``, else ``runs`` in the current folder."""
    return Path(os.environ.get("EVIDENCE_DIR") or "runs")


def find_run(text: str, *, next: str | None = None) -> Path:
    """The path itself, or the one run folder in :func:`evidence_folder` (or in the path's) whose name begins so.

    RefusedError where there is none, or more than one; ``next`` is the command to type then.
    """
    if not text:
        raise RefusedError("no run is named: the name is empty", next=next)
    path = Path(text)
    if os.path.exists(path):
        return path
    folder = path.parent if "/" in text else evidence_folder()
    try:
        known = sorted(name for name in os.listdir(folder) if RUN_ID.fullmatch(name)) if os.path.isdir(folder) else []
    except OSError as error:
        raise RefusedError(f"{folder} cannot be listed: {error.strerror}", next=next) from error
    found = [name for name in known if name.startswith(path.name)]
    if len(found) > 1:
        raise RefusedError(f"{text!r} is the beginning of {len(found)} runs: {', '.join(found)}", next=next)
    if not found:
        raise RefusedError(f"there is no run {text!r} in {folder}/", next=next)
    return folder / found[0]


def _events(path: Path) -> tuple[list[Event], list[int]]:
    if not os.path.lexists(path):
        return [], []
    if not os.path.isfile(path):
        raise UnreadableError(path, "is no regular file")
    try:
        return sift_events(path)
    except OSError as error:
        raise UnreadableError.of(path, error) from error


def _one(series: Iterable[Series], name: str, model: str | None, split: str | None) -> Series | None:
    found = [one for one in series if one.name == name and model in (None, one.model) and split in (None, one.split)]
    return found[0] if len(found) == 1 else None


def _verdicts(events: Iterable[Event]) -> Iterable[Verdict]:
    for event in events:
        said = event.fields
        if event.kind == "verdict" and FALSIFIER_ID.fullmatch(str(said.get("falsifier"))):
            outcome = Outcome.__members__.get(str(said.get("outcome")).upper(), Outcome.UNKNOWN)
            text = " ".join(str(said.get("text") or "").split())
            yield Verdict(str(said["falsifier"]), outcome, text, _mapping(said, "measured") or {}, event.run)


def _metrics(events: Sequence[Event]) -> Iterable[Series]:
    kept = kept_steps(events)
    found: dict[tuple[str, str | None, str | None], list[Event]] = {}
    for event in events:
        said = event.fields
        if event.kind == "metric" and as_number(said.get("value")) is not None and isinstance(said.get("step"), int):
            key = (str(said.get("name")), _word(said, "model"), _word(said, "split"))
            found.setdefault(key, []).append(event)
    for (name, model, split), seen in found.items():
        course = [event for event in seen if in_course(event)]
        step = kept.get(str(model)) if split == "heldout" else None
        yield _series(name, model, split, course or seen, "value", of_kept(seen, step))


def _trained(events: Iterable[Event]) -> Iterable[Series]:
    found: dict[tuple[str, str | None], list[Event]] = {}
    for event in events:
        if event.kind == "step" and isinstance(event.fields.get("step"), int):
            for name, value in event.fields.items():
                if name not in ("step", "steps") and as_number(value) is not None:
                    found.setdefault((name, _word(event.fields, "model")), []).append(event)
    for (name, model), seen in found.items():
        yield _series(name, model, None, seen, name, seen[-1])


def _series(
    name: str, model: str | None, split: str | None, events: Sequence[Event], field: str, kept: Event | None
) -> Series:
    return Series(
        name,
        model,
        split,
        tuple(event.fields["step"] for event in events),
        tuple(float(event.fields[field]) for event in events),
        tuple(event.t for event in events),
        None if kept is None else (kept.fields["step"], float(kept.fields[field])),
    )


def _phases(events: Iterable[Event]) -> Iterable[Phase]:
    """Each phase once for each time that it began, in the order of their beginnings."""
    found: list[Phase] = []
    running: dict[str, int] = {}
    for event in events:
        name, state = str(event.fields.get("name")), event.fields.get("state")
        if event.kind == "phase" and state == "begin":
            running[name] = len(found)
            found.append(Phase(name, event.t, event.wall, None))
        elif event.kind == "phase" and state == "end" and name in running:
            begun = found[running[name]]
            found[running.pop(name)] = Phase(name, begun.began, begun.wall, as_number(event.fields.get("seconds")))
    return found


def as_number(value: Any) -> float | None:
    """A number of an event; the log writes those that JSON has not as words (``nan``, ``inf``)."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _subjects(manifest: Mapping[str, Any] | None) -> dict[str, str] | None:
    try:
        return None if manifest is None else {one["name"]: one["digest"]["sha256"] for one in manifest["subject"]}
    except (KeyError, TypeError):
        raise RefusedError(f"{MANIFEST} names its subjects in no way that is known here") from None


def _word(said: Mapping[str, Any], name: str) -> str | None:
    value = said.get(name)
    return None if value is None else str(value)


def _times(effective: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Seconds by phase, those that are numbers."""
    told = _mapping(effective, "timings")
    numbers = {name: as_number(value) for name, value in (told or {}).items()}
    return None if told is None else {name: value for name, value in numbers.items() if value is not None}


def _count(value: Mapping[str, Any] | None, name: str) -> int | None:
    found = (value or {}).get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _mapping(value: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    found = (value or {}).get(name)
    return found if isinstance(found, dict) else None
