"""Building the statement of a run from the files that the run left: what is observed, apart from what is concluded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from latentforge.errors import FailedError, RefusedError
from latentforge.events import Event, sift_events
from latentforge.evidence.configuration import compare_configuration
from latentforge.evidence.digests import file_sha256, tree_files
from latentforge.evidence.schema import PREDICATE_TYPE, STATEMENT_TYPE, Statement
from latentforge.evidence.secrets import refuse_secret_files, refuse_secrets
from latentforge.evidence.tensors import tensor_digests
from latentforge.spec.identity import RunIdentity
from latentforge.spec.reading import parse_json, read_regular
from latentforge.verdicts import Outcome, meet

MANIFEST = "manifest.json"
_READ_ORDER = "out/corpus.jsonl"
UNLISTED = frozenset({MANIFEST, f"{MANIFEST}.sig"})
"""The files of a run folder that the statement does not cover: itself and its signature."""


@dataclass(frozen=True)
class Claim:
    """An interpretation of a person's or a program's; ``check`` names the falsifier that supports it, if one does."""

    text: str
    check: str | None = None


def build_statement(
    run_dir: Path,
    *,
    plan: Any,
    host: Mapping[str, Any],
    dispatched: Mapping[str, Any],
    claims: Sequence[Claim] = (),
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The in-toto statement of a collected run folder.

    ``plan`` is the plan's digest or content, ``host`` the facts of the host, ``dispatched`` what the control plane did
    (times, agent digest, route). FailedError where a file is not what the host recorded in ``artifacts.json``;
    RefusedError where a secret of the environment (``os.environ`` by default) stands in the run.
    """
    digests = digest_files(run_dir)
    derived = derive(run_dir, digests)
    verdicts = derived["verdicts"]
    known = {str(verdict["falsifier"]) for verdict in verdicts}
    conclusions = checked_conclusions(verdicts) + [
        # A check that did not run for this run supports nothing: the text stays a claim.
        {"text": claim.text, "check": claim.check, "status": "checked" if claim.check in known else "claim"}
        for claim in claims
    ]
    identities = {
        **derived["identities"],
        "driver": host_version("driver", derived, host),
        "kernel": host_version("kernel", derived, host),
    }
    predicate = {
        "schema": 2,
        **{name: derived[name] for name in DERIVED},
        "conclusions": conclusions,
        "identities": identities,
        "plan": plan,
        "host": dict(host),
        "dispatched": dict(dispatched),
    }
    content = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in digests.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    # Through JSON: what is checked and hashed is what will be read back (tuples become lists, keys text).
    statement: dict[str, Any] = parse_json(json.dumps(content, allow_nan=False))
    try:
        Statement.model_validate(statement)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RefusedError(f"evidence of {run_dir.name}: {place}: {first['msg']}") from None
    refuse_secrets(statement, "the statement", environ)
    refuse_secret_files(run_dir, list(digests), environ)
    return statement


DERIVED = (
    "run",
    "configuration",
    "verdicts",
    "observations",
    "environment",
    "seeds",
    "timings",
    "peak_memory_bytes",
    "flops",
    "end",
    "not_collected",
    "secret_names",
)
"""The parts of the predicate that follow from the files alone; verification derives them again."""


def digest_files(run_dir: Path) -> dict[str, str]:
    """sha256 of every regular file of the run folder by relative path, without the manifest and its signature."""
    return {name: file_sha256(path) for name, path in tree_files(run_dir) if name not in UNLISTED}


def derive(run_dir: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the statement says of the run's own files (``DERIVED``, ``identities`` and ``driver``)."""
    identity_bytes = _read(run_dir / "identity.json")
    if identity_bytes is None:
        raise RefusedError(f"{run_dir} has no identity.json: this is no run folder")
    identity = RunIdentity.from_bytes(identity_bytes, run_id=run_dir.name)
    effective = read_json(run_dir / "effective.json") or {}
    record = read_json(run_dir / "exit.json")
    _check_inventory(record, digests.get("artifacts.json"))
    told, broken = sift_events(run_dir / "events.jsonl") if "events.jsonl" in digests else ([], [])
    events = [event for event in told if event.run == run_dir.name]  # another run's verdict is no word of this one's
    device = effective.get("device")
    return {
        "run": {
            "id": run_dir.name,
            "kind": identity.kind,
            "attempt": identity.attempt,
            "identity_sha256": hashlib.sha256(identity_bytes).hexdigest(),
        },
        "configuration": compare_configuration(identity.kind, identity.spec, effective),
        "verdicts": _verdicts(events),
        "observations": [*_observations(events), *_foreign(told, run_dir.name), *_broken(broken)],
        "environment": {
            name: effective[name] for name in ("versions", "device", "kernel_backend") if name in effective
        },
        "seeds": _mapping(effective.get("seeds")),
        "timings": _mapping(effective.get("timings")),
        "peak_memory_bytes": effective.get("peak_memory_bytes"),
        "flops": effective.get("flops"),
        "end": end_of(events, record),
        "not_collected": _not_collected(read_json(run_dir / "artifacts.json"), digests),
        "secret_names": sorted(identity.secrets),
        "identities": {
            "code": identity.code,
            "code_effective": effective.get("code"),
            "lock": identity.lock,
            "extension": effective.get("extension"),
            "inputs": _inputs(identity.inputs, _mapping(effective.get("inputs"))),
            "tokenizer": _tokenizer(effective) or _products(digests).get("tokenizer"),
            "products": _products(digests),
            "tensors": {name: tensor_digests(run_dir / name) for name in digests if name.endswith(".safetensors")},
            "data_files": _data_files(run_dir, digests),
        },
        "driver": device.get("driver") if isinstance(device, dict) else None,
    }


def checked_conclusions(verdicts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the verdicts say in one line each: the conclusions that every statement begins with."""
    return [
        {
            "text": f"{one['falsifier']} {str(one['outcome']).upper()} {one['text']}".rstrip(),
            "check": one["falsifier"],
            "status": "checked",
        }
        for one in verdicts
    ]


def host_version(name: str, derived: Mapping[str, Any], host: Mapping[str, Any]) -> str | None:
    """``driver`` (the trainer's word before the host's) or ``kernel``, by version."""
    return _text(derived["driver"] if name == "driver" else None, host.get(name))


def _verdicts(events: Iterable[Event]) -> list[dict[str, Any]]:
    return [
        {name: event.fields.get(name) for name in ("falsifier", "outcome", "text", "measured")}
        for event in events
        if event.kind == "verdict"
    ]


def _foreign(events: Iterable[Event], run: str) -> Iterable[dict[str, Any]]:
    """Events that name another run: kept as what was seen, never as what was found out."""
    for event in events:
        if event.run != run:
            yield {"what": "event of another run", "value": event.run, "source": f"events.jsonl seq {event.seq}"}


def _broken(lines: Iterable[int]) -> Iterable[dict[str, Any]]:
    """Lines of the event log that nobody can read: what they said is not known."""
    for number in lines:
        yield {"what": "no event", "value": None, "source": f"events.jsonl line {number}"}


def _observations(events: Sequence[Event]) -> Iterable[dict[str, Any]]:
    """Every warning, and each metric's first and last value, with the event that states it."""
    metrics: dict[tuple[str | None, ...], list[Event]] = {}
    for event in events:
        if event.kind == "metric":
            words = (event.fields.get(name) for name in ("name", "split", "model"))
            metrics.setdefault(tuple(None if one is None else str(one) for one in words), []).append(event)
        elif event.kind == "warning":
            source = f"events.jsonl seq {event.seq}"
            yield {"what": "warning", "value": event.fields.get("message"), "source": source}
    for (name, split, model), seen in metrics.items():
        what = " ".join(part for part in (model, name, split) if part is not None)
        for event in seen if len(seen) == 1 else (seen[0], seen[-1]):
            yield {
                "what": f"{what} at step {event.fields.get('step')}",
                "value": event.fields.get("value"),
                "source": f"events.jsonl seq {event.seq}",
            }


def end_of(events: Sequence[Event], record: dict[str, Any] | None) -> dict[str, Any]:
    """The run's outcome: the meet of its verdicts, but never a pass for a run whose end is missing or not a pass."""
    ends = [event for event in events if event.kind == "end"]
    code = ends[-1].fields.get("code") if ends else None
    if type(code) is not int:
        code = None  # false and 0.0 are no exit codes, equal as they are to 0
    outcomes = [Outcome.__members__.get(str(one["outcome"]).upper(), Outcome.UNKNOWN) for one in _verdicts(events)]
    if code != 0:
        outcomes.append(Outcome.FAIL if code == 1 else Outcome.UNKNOWN)
    elif not outcomes:
        outcomes.append(Outcome.PASS)  # runs without falsifiers (data, score): they ended with 0
    if gainsays(record, code):
        outcomes.append(Outcome.UNKNOWN)
    return {"outcome": meet(outcomes).name.lower(), "code": code, "record": record}


def gainsays(record: Mapping[str, Any] | None, code: Any) -> bool:
    """Whether the host's exit record says that a process was killed, or ended otherwise than its last event."""
    if record is None:
        return False
    told = record.get("code")
    otherwise = told is not None and (type(told) is not int or told != code)  # false is no 0
    return otherwise or record.get("outcome") not in (None, "pass", "fail")


def _check_inventory(record: Mapping[str, Any] | None, found: str | None) -> None:
    """The host's exit record names the digest of its own list of files."""
    named = (record or {}).get("artifacts")
    if named is not None and found is not None and named != found:
        raise FailedError(
            f"artifacts.json was altered: sha256 {str(named)[:12]}… in the exit record, {found[:12]}… here",
            next="remove the copy and collect again",
        )


def _not_collected(artifacts: dict[str, Any] | None, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the host recorded and is not here; FailedError where a file is here with other bytes."""
    absent = []
    files = (artifacts or {}).get("files", [])
    if not isinstance(files, list) or not all(isinstance(file, dict) and _is_listed(file) for file in files):
        raise RefusedError("artifacts.json lists its files in no way that is known here")
    for file in files:
        found = digests.get(file["path"])
        if found is None:
            absent.append({"path": file["path"], "bytes": file["bytes"], "sha256": file["sha256"]})
        elif found != file["sha256"]:
            raise FailedError(
                f"{file['path']} was altered on its way: sha256 {file['sha256'][:12]}… recorded on the host, "
                f"{found[:12]}… here",
                next="remove the copy and collect again",
            )
    return absent


def _is_listed(file: Mapping[str, Any]) -> bool:
    return isinstance(file.get("path"), str) and type(file.get("bytes")) is int and isinstance(file.get("sha256"), str)


def _products(digests: Mapping[str, str]) -> dict[str, str]:
    """The content digest (``tree_sha256``) of each folder directly under ``out``, from the digests of its files."""
    folders: dict[str, list[str]] = {}
    for name in sorted(digests, key=str.encode):
        top, _, rest = name.removeprefix("out/").partition("/")
        if name.startswith("out/") and rest:
            folders.setdefault(top, []).append(f"{rest}\0{digests[name]}\n")
    return {top: hashlib.sha256("".join(lines).encode()).hexdigest() for top, lines in folders.items()}


def _data_files(run_dir: Path, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """What a data run read: the digest of its list of files in the order of reading, and how many lines that has."""
    if (sha256 := digests.get(_READ_ORDER)) is None:
        return None
    with open(run_dir / _READ_ORDER, "rb") as file:
        return {"files": sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")), "sha256": sha256}


def _inputs(named: Mapping[str, str], read: Mapping[str, Any]) -> dict[str, Any]:
    """What the identity names each input (``run:…``, ``sha256:…``), with what the trainer found when it read it."""
    return {name: {"named": named.get(name), "read": read.get(name)} for name in sorted({*named, *read})}


def _tokenizer(effective: Mapping[str, Any]) -> str | None:
    if isinstance(found := effective.get("tokenizer_sha256"), str):
        return found
    for item in _mapping(effective.get("inputs")).values():
        if isinstance(item, dict) and isinstance(found := item.get("tokenizer_sha256"), str):
            return found
    return None


def _text(first: Any, second: Any) -> str | None:
    return next((str(value) for value in (first, second) if value is not None), None)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> bytes | None:
    try:
        return read_regular(path)
    except FileNotFoundError:
        return None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file of a run, None where there is no such file; refused where it holds no object."""
    content = _read(path)
    if content is None:
        return None
    try:
        value = parse_json(content)
    except ValueError as error:
        raise RefusedError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RefusedError(f"{path} is not a JSON object")
    return value
