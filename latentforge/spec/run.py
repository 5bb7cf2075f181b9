"""A run's folder: the class that owns every path in it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError
from latentforge.spec.identity import RUN_ID, RunIdentity, check_run_id
from latentforge.spec.reading import read_regular

InputRef = dict[str, str]
"""Where an input lies on this host: ``{"run": id}``, ``{"path": …, "sha256": …}`` or ``{"builtin": "stdlib"}``."""


def write_record(path: Path, value: Any) -> None:
    """Write a product's JSON, for people and programs, whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def named_folder(path: Path) -> Path:
    """A folder by its whole path; one that is linked as a run by that name, beside which its ledger lies, any other
    link by what it leads to."""
    given = Path(os.path.abspath(path))
    return given if RUN_ID.fullmatch(given.name) else Path(os.path.realpath(given))


@dataclass(frozen=True)
class LaunchRecord:
    """``launch.json``: how a run was started on this host; no part of its meaning."""

    run: str
    kin: str
    resolved: dict[str, InputRef]
    argv: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    lease: list[str] = field(default_factory=list)
    predecessor: str | None = None
    plan: str | None = None
    reach: dict[str, Any] = field(default_factory=dict)
    endurance: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)
    """Where it runs on several hosts: which, and which of them this is (``spec.hosts``)."""

    def as_json(self) -> dict[str, Any]:
        """The content of ``launch.json``."""
        return dict(self.__dict__)


class RunDir:
    """Every path of a run. ``<state>/runs/<run-id>/`` on a host, ``runs/<run-id>/`` on a laptop."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.run = check_run_id(self.path.name)
        self.identity_file = self.path / "identity.json"
        self.launch_file = self.path / "launch.json"
        self.events_file = self.path / "events.jsonl"
        self.log_file = self.path / "launch.log"
        self.effective_file = self.path / "effective.json"
        self.artifacts_file = self.path / "artifacts.json"
        self.out = self.path / "out"
        self.checkpoints = self.out / "checkpoints"

    @classmethod
    def create(cls, runs: Path, identity: RunIdentity, launch: LaunchRecord) -> RunDir:
        """Make the folder of a run in ``runs`` for execution in this process (the agent does it on hosts)."""
        run = cls(runs / identity.run_id)
        run.path.mkdir(parents=True, exist_ok=False)
        run.identity_file.write_bytes(identity.canonical)
        run.launch_file.write_text(json.dumps(launch.as_json(), indent=1, sort_keys=True))
        return run

    @property
    def kind(self) -> str:
        """The run's kind, from its id."""
        return self.run.partition("-")[0]

    def load_identity(self) -> RunIdentity:
        """The identity, verified against the folder's name."""
        return RunIdentity.from_bytes(self._read(self.identity_file), run_id=self.run)

    def load_launch(self) -> LaunchRecord:
        """How the run was launched."""
        try:
            value = json.loads(self._read(self.launch_file))
            known = {name: value[name] for name in LaunchRecord.__dataclass_fields__ if name in value}
            return LaunchRecord(**known)
        except (ValueError, TypeError) as error:
            raise RefusedError(f"{self.launch_file} cannot be read: {error}") from error

    def input_ref(self, name: str) -> InputRef:
        """Where the named input lies; refused where the run has none of that name."""
        resolved = self.load_launch().resolved
        if name not in resolved:
            raise RefusedError(f"{self.run} has no input {name!r} (it has: {', '.join(sorted(resolved)) or 'none'})")
        return resolved[name]

    def has_input(self, name: str) -> bool:
        """Whether the run has an input of that name."""
        return name in self.load_launch().resolved

    def input_run(self, name: str) -> RunDir | None:
        """The folder of the run that is the named input, or None where the input is not a run."""
        ref = self.input_ref(name)
        return RunDir(self.path.parent / check_run_id(ref["run"])) if "run" in ref else None

    def input_path(self, name: str) -> Path:
        """The path of an input: ``out`` of a run, or the external file or folder itself."""
        ref = self.input_ref(name)
        run = self.input_run(name)
        path = run.out if run is not None else Path(ref["path"]) if "path" in ref else None
        if path is None:
            raise RefusedError(f"input {name!r} of {self.run} is built in: {ref}")
        if not path.exists():
            raise RefusedError(f"input {name!r} of {self.run} is missing: {path}")
        return path

    def predecessor(self) -> RunDir | None:
        """The earlier attempt that this run resumes, where there is one."""
        name = self.load_launch().predecessor
        return RunDir(self.path.parent / check_run_id(name)) if name else None

    def _read(self, path: Path) -> bytes:
        try:
            return read_regular(path)
        except FileNotFoundError:
            raise RefusedError(f"{path.name} is missing from {self.path}: this is no run folder") from None
