"""Running a recorded run again from its identity and its inputs, in a fresh folder, and judging what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.digests import tree_sha256
from latentforge.evidence.reading import RunRecord, read_run
from latentforge.spec.code import running_code
from latentforge.spec.run import RunDir
from latentforge.train.likeness import Likeness, compare_products
from latentforge.train.setting import THREADS
from latentforge.verdicts import Outcome

TOLERANCE = 1e-4
"""What weights and metrics may be apart, relative, where sums were made in another order (other threads, processor)."""


@dataclass(frozen=True)
class Reproduction:
    """A run executed again: its folder, how alike the products are, and what was not as the first time."""

    run: str
    folder: Path
    likeness: Likeness
    setting: tuple[str, ...]
    """What differs between both executions and may change the order of a sum: threads, processor, versions."""
    tolerance: float

    @property
    def outcome(self) -> Outcome:
        """PASS for the same bits, or for products within the tolerance where the setting differs; FAIL otherwise."""
        alike = self.likeness.bit_equal or (bool(self.setting) and self.likeness.within(self.tolerance))
        return Outcome.PASS if alike else Outcome.FAIL

    def lines(self) -> list[str]:
        """What was found, in words."""
        found = self.likeness
        counted = f"{found.compared} tensors and shards"
        if found.bit_equal:
            lines = [f"bit-equal  {counted} of {self.run}"]
        else:
            word = "within tolerance" if self.outcome is Outcome.PASS else "NOT REPRODUCED"
            lines = [
                f"{word}  {len(found.different)} of {counted} of {self.run} differ: weights by {found.distance:.2e}, "
                f"{found.metric or 'metrics'} by {found.metrics:.2e} (relative; tolerance {self.tolerance:.0e})"
            ]
            if not self.setting:
                lines.append("the same threads, processor and versions: the bits have to be the same")
                lines += [f"  {name}" for name in found.different[:5]]
        return lines + [f"not as the first time: {one}" for one in self.setting]

    def as_json(self) -> dict[str, Any]:
        """The same as data; a distance that is infinite is null."""
        finite = [None if value == float("inf") else value for value in (self.likeness.distance, self.likeness.metrics)]
        return {
            "run": self.run,
            "outcome": self.outcome.name.lower(),
            "bit_equal": self.likeness.bit_equal,
            "compared": self.likeness.compared,
            "different": list(self.likeness.different),
            "distance": finite[0],
            "metrics": finite[1],
            "tolerance": self.tolerance,
            "setting": list(self.setting),
            "folder": str(self.folder),
        }


@dataclass(frozen=True)
class Rerun:
    """How a run is to be executed again.

    ``inputs`` are folders of runs in which its inputs are looked for, ``threads`` torch's (None: as many as the first
    time), ``python`` the interpreter whose LatentForge runs it.
    """

    folder: Path
    inputs: tuple[Path, ...] = ()
    threads: int | None = None
    tolerance: float = TOLERANCE
    python: Path = field(default_factory=lambda: Path(sys.executable))


def reproduce(source: Path, how: Rerun, *, say: Callable[[str], None] = lambda line: None) -> Reproduction:
    """Execute the run of the folder ``source`` again below ``how.folder`` and compare what it leaves.

    ``say`` hears of each line that it writes. RefusedError where it cannot be run again here (other code, an input that
    is not here or has changed, a run that asked a service); FailedError where it ends before it has its products.
    """
    first = read_run(source)
    _refuse_unrepeatable(first)
    if how.python == Path(sys.executable):
        _require_code(first)
    target = how.folder / first.id
    _lay_out(first, target, how)
    threads = how.threads or (first.device or {}).get("threads")
    environ = {**os.environ, **({THREADS: str(threads)} if threads else {})}
    command = [str(how.python), "-P", "-m", "latentforge", "run", str(target)]
    last = _execute(command, environ, target / "launch.log", say)
    second = read_run(target)
    if second.end["code"] not in (0, 1):
        raise FailedError(
            f"{first.id} ended with {second.end['code']} when it ran again: {second.reason or last}",
            next=f"less {target / 'launch.log'}",
        )
    return Reproduction(first.id, target, compare_products(first, second), _setting(first, second), how.tolerance)


def _refuse_unrepeatable(record: RunRecord) -> None:
    if record.identity is None or record.launch is None or record.effective_file is None:
        raise RefusedError(f"{record.folder} lacks identity.json, launch.json or effective.json: it cannot run again")
    if record.end["code"] not in (0, 1):
        raise RefusedError(f"{record.id} did not come to its end (exit code {record.end['code']})")
    if record.launch.get("secrets") or record.identity.secrets or record.kind == "bench":
        why = "measures speed" if record.kind == "bench" else "asked a service that needs a key"
        raise RefusedError(f"{record.id} {why}: running it again says nothing of these bits")


def _require_code(record: RunRecord) -> None:
    asked, found = record.identity.code if record.identity else "", running_code().digest
    if asked != found:
        earlier = (record.launch or {}).get("argv") or [""]
        following = "check out the commit that it ran with"
        if Path(earlier[0]).is_file():
            following += f", or name its interpreter: --python {earlier[0]}"
        raise RefusedError(f"{record.id} ran code {asked[:12]}…, this is {found[:12]}…", next=following)


def _lay_out(first: RunRecord, target: Path, how: Rerun) -> None:
    """The fresh folder of the run, with links to its inputs beside it, each held against the digest that was read."""
    resolved: dict[str, dict[str, str]] = dict((first.launch or {}).get("resolved", {}))
    read = (first.effective_file or {}).get("inputs", {})
    links = {}
    for name, reference in resolved.items():
        if "run" in reference:
            links[reference["run"]] = _input(first, name, reference["run"], read.get(name, {}).get("sha256"), how)
        elif "path" in reference and not Path(reference["path"]).exists():
            raise RefusedError(f"input {name!r} of {first.id} is not on this machine: {reference['path']}")
    if target.exists():
        raise RefusedError(f"{target} exists: a run is made anew in a fresh folder", next="name another with --to")
    target.mkdir(parents=True)
    for run, folder in links.items():
        if not (target.parent / run).exists():
            (target.parent / run).symlink_to(folder, target_is_directory=True)
    run = RunDir(first.folder)
    (target / "identity.json").write_bytes(run.identity_file.read_bytes())
    # Neither the command nor the predecessor of the first time: it begins at the beginning, here.
    launch = replace(run.load_launch(), argv=[], lease=[], predecessor=None)
    (target / "launch.json").write_text(json.dumps(launch.as_json(), indent=1, sort_keys=True))


def _input(first: RunRecord, name: str, run: str, sha256: str | None, how: Rerun) -> Path:
    """The folder of a run that is an input, from those named, beside the run, or where it ran on this machine."""
    argv = (first.launch or {}).get("argv") or [""]
    places = [*how.inputs, first.folder.parent, Path(argv[-1]).parent]
    found = [place / run for place in places if (place / run / "out").is_dir()]
    for folder in found:
        if sha256 in (None, tree_sha256(folder / "out")):
            return folder.resolve()
    if found:
        raise RefusedError(f"input {name!r}: {found[0]} is not what {first.id} read (sha256 {str(sha256)[:12]}…)")
    raise RefusedError(
        f"input {name!r} of {first.id} is not here: {run} is in none of {', '.join(map(str, places))}",
        next=f"on the host that has it, or copied:  latentforge evidence reproduce {first.id} --inputs FOLDER",
    )


def _execute(command: list[str], environ: dict[str, str], log: Path, say: Callable[[str], None]) -> str:
    """Run a command to its end, its output in ``log``; its last line. It is ended where this process is interrupted."""
    last = ""
    with (
        open(log, "w", encoding="utf-8") as text,
        subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                text.write(line)
                last = line.strip() or last
                say(last)
        except BaseException:
            process.terminate()
            raise
    return last


def _setting(first: RunRecord, second: RunRecord) -> tuple[str, ...]:
    """What may change the order of a sum, where both executions state it and differ."""
    found = []
    files = (first.effective_file or {}), (second.effective_file or {})
    for name in ("device", "versions", "extension"):
        before, after = (file.get(name) or {} for file in files)
        for key in sorted({*before, *after} - {"memory_bytes", "sha256"}):
            if before.get(key) != after.get(key):
                found.append(f"{name} {key}: {before.get(key)} then, {after.get(key)} now")
    asked, here = (first.host or {}).get("cpu"), _processor()
    if asked is not None and here is not None and asked != here:
        found.append(f"processor: {asked} then, {here} now")
    return tuple(found)


def _processor() -> str | None:
    """The processor's name in the words of the agent's probe, None where the system does not say."""
    fields: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    if "CPU implementer" in fields and "model name" not in fields:
        return f"ARM implementer {fields['CPU implementer']} part {fields.get('CPU part', 'unknown')}"
    return fields.get("model name")
