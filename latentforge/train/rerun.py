"""Laying a recorded run out anew, its inputs beside it: what cannot be executed again is refused before that."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError
from latentforge.evidence.digests import tree_sha256
from latentforge.evidence.reading import RunRecord
from latentforge.spec.code import running_code
from latentforge.spec.fields import HTTP_BACKENDS
from latentforge.spec.identity import RUN_ID, RunIdentity
from latentforge.spec.run import RunDir
from latentforge.train.likeness import products
from latentforge.train.run import made_sha256

TOLERANCE = 1e-4
"""What weights and metrics may be apart, relative, where sums were made in another order (other threads, processor)."""


@dataclass(frozen=True)
class Rerun:
    """How a run is to be executed again.

    ``folder`` is where, ``inputs`` are folders of runs in which its inputs are looked for, ``threads`` torch's (None:
    as many as the first time), ``python`` the interpreter whose LatentForge runs it; ``kept`` says that the folder
    stays when both were compared. RefusedError for a tolerance that is not in [0, 1), for inputs that are no folder and
    for an interpreter that is no program.
    """

    folder: Path
    inputs: tuple[Path, ...] = ()
    threads: int | None = None
    tolerance: float = TOLERANCE
    python: Path = field(default_factory=lambda: Path(sys.executable))
    kept: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and 0 <= self.tolerance < 1):
            why = "weights that are all lost are 1 apart" if self.tolerance >= 1 else "it is relative, from 0"
            raise RefusedError(f"a tolerance of {self.tolerance:g} is none: {why}", next=f"--tolerance {TOLERANCE:g}")
        for place in self.inputs:
            if not os.path.isdir(place):
                raise RefusedError(f"--inputs {place} is no folder", next="name the folder in which the runs lie")
        if shutil.which(self.python) is None:
            raise RefusedError(
                f"{self.python} is no program that can be started",
                next="name the interpreter of an installed LatentForge, or leave out --python",
            )


def check_repeatable(record: RunRecord, how: Rerun) -> None:
    """Refuse a run of which another execution shows nothing: no end, other code, no products, answers of a service."""
    if record.identity is None or record.launch is None or record.effective_file is None:
        raise RefusedError(f"{record.folder} lacks identity.json, launch.json or effective.json: it cannot run again")
    if record.end["code"] not in (0, 1):
        raise RefusedError(f"{record.id} did not come to its end (exit code {record.end['code']})")
    if why := _says_nothing(record, record.identity):
        raise RefusedError(f"{record.id} {why}: running it again says nothing of these bits")
    if not products(record.folder):
        raise RefusedError(
            f"{record.id} has neither weights nor packed rows below out/: there is nothing to compare",
            next="reproduce a run that packs rows or trains: data, teacher, autoencoder, distill, latent",
        )
    if how.python == Path(sys.executable):
        _require_code(record, record.identity)


def _says_nothing(record: RunRecord, identity: RunIdentity) -> str | None:
    asked = identity.spec.get("teacher")
    if record.kind == "bench":
        return "measures speed"
    if identity.secrets or (record.launch or {}).get("secrets"):
        return "asked a service that needs a key"
    if isinstance(asked, dict) and asked.get("backend") in HTTP_BACKENDS:
        return f"asked a service (teacher.backend = {asked['backend']!r})"
    return None


def _require_code(record: RunRecord, identity: RunIdentity) -> None:
    found = running_code().digest
    if identity.code != found:
        following = "check out the commit that it ran with"
        if (earlier := _argv(record)) and os.path.isfile(earlier[0]) and earlier[0] != sys.executable:
            following += f", or name its interpreter: --python {earlier[0]}"
        raise RefusedError(f"{record.id} ran code {identity.code[:12]}…, this is {found[:12]}…", next=following)


def lay_out(first: RunRecord, how: Rerun) -> Path:
    """The fresh folder of the run below ``how.folder``, with links to its inputs beside it.

    RefusedError where the folder exists or cannot be made, where an input is not the one that the run's identity names,
    is not here, or has not the digest that the run read. Nothing is written before all of that is known.
    """
    target = how.folder / first.id
    if os.path.lexists(target):
        raise RefusedError(f"{target} exists: a run is made anew in a fresh folder", next="name another with --to")
    links = {}
    for name, reference in _resolved(first).items():
        if "run" in reference:
            links[reference["run"]] = _input(first, name, reference["run"], how)
        elif "path" in reference and not Path(reference["path"]).exists():
            raise RefusedError(f"input {name!r} of {first.id} is not on this machine: {reference['path']}")
    for recorded in (first.folder, *links.values()):
        if Path(os.path.realpath(target)).is_relative_to(recorded):
            raise RefusedError(f"{target} is inside {recorded}, which was recorded", next="name another with --to")
    run = RunDir(first.folder)
    # Neither the command nor the predecessor of the first time: it begins at the beginning, here.
    launch = replace(run.load_launch(), argv=[], lease=[], predecessor=None, world={})
    try:
        target.mkdir(parents=True)
        for named, folder in links.items():
            if not (how.folder / named).exists():
                (how.folder / named).symlink_to(folder, target_is_directory=True)
        (target / "identity.json").write_bytes(run.identity_file.read_bytes())
        (target / "launch.json").write_text(json.dumps(launch.as_json(), indent=1, sort_keys=True))
    except OSError as error:
        raise RefusedError(f"{target} cannot be made: {error.strerror}", next="name another with --to") from error
    return target


def _resolved(first: RunRecord) -> dict[str, dict[str, str]]:
    """Where the inputs lay, by name, each held against what the run's identity names: the content, or a run of that
    kind. Which run is the plan's to choose, among those that mean the same: :func:`_input` asks what was read."""
    resolved = (first.launch or {}).get("resolved")
    named = first.identity.inputs if first.identity is not None else {}
    if not isinstance(resolved, dict):
        raise RefusedError(f"launch.json of {first.id} does not say where its inputs lay: it cannot run again")
    for name, reference in resolved.items():
        asked, found = named.get(name), _reference(reference)
        if asked is None or found is None or (asked if "run" not in reference else _kind(asked)) != found:
            raise RefusedError(f"input {name!r} of {first.id}: its identity names {asked}, launch.json {reference!r}")
    return resolved


def _kind(named: str) -> str:
    return named.rpartition("-")[0]


def _reference(value: Any) -> str | None:
    """What an identity calls the input that ``launch.json`` refers to so, of a run its kind; None for no reference."""
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        return None
    if "run" in value:
        return _kind(f"run:{value['run']}") if RUN_ID.fullmatch(value["run"]) else None
    if "path" in value and "\0" not in value["path"]:
        return f"sha256:{value.get('sha256')}"
    return value.get("builtin")


def _input(first: RunRecord, name: str, run: str, how: Rerun) -> Path:
    """The folder of a run that is an input, held against the digest that was read: the one that lies where it will be
    read, else one from the folders named, beside the run, or where it ran on this machine."""
    read = (first.effective_file or {}).get("inputs")
    recorded = read.get(name) if isinstance(read, dict) else None
    sha256, named = (recorded.get(one) if isinstance(recorded, dict) else None for one in ("sha256", "run"))
    if not isinstance(sha256, str):
        raise RefusedError(f"effective.json of {first.id} has no digest of what it read as {name!r}: any would pass")
    if named != run:
        raise RefusedError(
            f"input {name!r} of {first.id}: launch.json names {run}, effective.json says it read {named}"
        )
    places = [*how.inputs, first.folder.parent, *(Path(argument).parent for argument in _argv(first)[-1:])]
    if os.path.lexists(how.folder / run):
        places = [how.folder]
    found = [place / run for place in places if os.path.lexists(place / run)]
    for folder in found:
        # Records of runs from before made_sha256 have the digest of all of it, checkpoints as well.
        if (out := folder / "out").is_dir() and sha256 in (made_sha256(out), tree_sha256(out)):
            return folder.resolve()
    if found:
        raise RefusedError(
            f"input {name!r}: {found[0]} is not what {first.id} read (sha256 {sha256[:12]}…)",
            next="name a folder that has it with --inputs, and a fresh one with --to",
        )
    raise RefusedError(
        f"input {name!r} of {first.id} is not here: {run} is in none of {', '.join(map(str, places))}",
        next=f"on the host that has it, or copied:  latentforge evidence reproduce {first.id} --inputs FOLDER",
    )


def _argv(record: RunRecord) -> list[str]:
    """The command of the first time; empty where the run does not record one."""
    argv = (record.launch or {}).get("argv")
    return argv if isinstance(argv, list) and all(isinstance(one, str) for one in argv) else []
