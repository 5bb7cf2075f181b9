"""Builds: which one a plan needs, whether a host has it, and the run that makes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from dispatch.hosts.facts import HostFacts, RunState, moment
from dispatch.planning.ask import Ask
from dispatch.planning.choice import MAX_ATTEMPTS, told_end
from latentforge.spec.canonical import canonical_sha256
from latentforge.spec.identity import RunIdentity

PREPARING = ("build-", "warmup-", "pull-")
"""How the ids of runs begin that prepare a host: no part of a pipeline, and no evidence is kept of them."""
NO_EVIDENCE = (*PREPARING, "follow-")
"""And of those that take part in a run of another host, where the evidence is."""
_PROGRAM = Path(__file__).with_name("host_build.py")


@cache
def build_program() -> tuple[bytes, str]:
    """The program that builds on a host, and its sha256."""
    content = _PROGRAM.read_bytes()
    return content, hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class BuildNames:
    """What a build is called: by its code and lock file, so that it is made once."""

    build: str
    venv: str
    kin: str
    identity: RunIdentity

    @classmethod
    def of(cls, ask: Ask) -> BuildNames:
        """The names of the build that a request needs on an SSH host."""
        assert ask.bundle is not None
        build, venv = f"{ask.code[:16]}-{ask.lock[:8]}", ask.lock[:16]
        identity = RunIdentity(
            kind=cast(Any, "build"),  # a run like any other, but no part of a pipeline
            spec={"build": {"name": build, "venv": venv, "lock": ask.lock_name, "python": ask.host.python}},
            inputs={"bundle": f"sha256:{ask.bundle.sha256}", "program": f"sha256:{build_program()[1]}"},
            code=ask.code,
            lock=ask.lock,
        )
        kin = canonical_sha256({**identity.as_json(), "attempt": 0})
        return cls(build, venv, kin, identity)

    def attempt_ids(self) -> list[str]:
        """The ids of the attempts, the first one first."""
        return [self.identity.at_attempt(number).run_id for number in range(1, MAX_ATTEMPTS + 1)]


@dataclass(frozen=True)
class BuildChoice:
    """The build that a plan stands on, and what will be done about it."""

    names: BuildNames
    run: str
    attempt: int
    will: Literal["keep", "run", "follow", "ended"]
    because: str
    bundle_there: bool
    again: bool = False

    @property
    def identity(self) -> str:
        """The canonical identity of the build's run."""
        return self.names.identity.at_attempt(self.attempt).canonical.decode()

    def site(self, root: str) -> str:
        """The folder that jobs import the package from."""
        return f"{root}/builds/{self.names.build}/site"

    def python(self, root: str) -> str:
        """The interpreter that jobs run with."""
        return f"{root}/venvs/{self.names.venv}/bin/python"

    def argv(self, ask: Ask, facts: HostFacts) -> list[str]:
        """The command of the build's run."""
        assert ask.bundle is not None
        root = facts.root
        asked = {
            "builds": f"{root}/builds",
            "build": self.names.build,
            "venv": f"{root}/venvs/{self.names.venv}",
            "bundle": f"{root}/cas/{ask.bundle.sha256}",
            "code": ask.code,
            "lock": ask.lock,
            "lock_name": ask.lock_name,
        }
        return [facts.python.executable, "-I", "-B", f"{root}/cas/{build_program()[1]}", json.dumps(asked)]


def choose_build(ask: Ask, facts: HostFacts, *, wanted: bool) -> BuildChoice:
    """The build for a request: kept where it is complete, else run; one that failed is reported, not repeated."""
    assert ask.bundle is not None
    names = BuildNames.of(ask)
    there = facts.cas.get(ask.bundle.sha256, False)

    def choice(
        will: Literal["keep", "run", "follow", "ended"], because: str, attempt: int, **more: bool
    ) -> BuildChoice:
        run = names.identity.at_attempt(attempt).run_id
        return BuildChoice(names, run, attempt, will, because, there, **more)

    attempt, state = 1, RunState(state="absent")
    for number, run in enumerate(names.attempt_ids(), start=1):
        if run in facts.runs and facts.runs[run].state != "absent":
            attempt, state = number, facts.runs[run]
    if facts.builds.get(names.build) and facts.venvs.get(names.venv):
        return choice("keep", f"build {names.build} is there", attempt)
    if state.going_on:
        return choice("follow", "it goes on", attempt)
    if not wanted:
        return choice("keep", "not needed", attempt)
    if state.passed:
        return choice("run", f"the build made {moment(state.ended)} is gone", attempt + 1)
    if state.has_ended:
        if ask.attempt_next:
            return choice(
                "run", f"attempt {attempt + 1}, after one that ended: {told_end(state)}", attempt + 1, again=True
            )
        return choice("ended", told_end(state), attempt)
    reason = "no build for this code" if facts.venvs.get(names.venv) else "no build for this lock file and code"
    return choice("run", reason, attempt)
