"""Pulling a model onto a host: a run of its own, named by what it brings, that moves only what is missing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from dispatch.following.follow import Follower
from dispatch.hosts.facts import HostFacts, ModelFact, RunState
from dispatch.places import Places
from dispatch.planning.choice import MAX_ATTEMPTS, told_end
from dispatch.preparing import Preparation, finish, start
from dispatch.pulling.folder import LocalFolder, send_folder
from dispatch.pulling.listing import TOKEN, Listing, resolve_url
from dispatch.pulling.program import pull_program
from dispatch.pulling.refs import ModelRef
from dispatch.records import remember
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from dispatch.transport.sending import send
from latentforge.errors import FailedError, RefusedError
from latentforge.spec.canonical import canonical_sha256
from latentforge.spec.identity import RunIdentity

MARGIN = 1 << 30
"""Bytes that stay free on the host beside what is pulled."""
WAIT_SECONDS = 0.5
PROBE_SECONDS = 60.0


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the hub at this address, or a folder of this laptop."""

    listing: Listing
    endpoint: str | None = None
    folder: LocalFolder | None = None


@dataclass(frozen=True)
class PullChoice:
    """What will be done about one model on one host, and why."""

    ref: ModelRef
    will: Literal["keep", "run", "follow"]
    because: str
    path: str
    """Where the model lies on the host, or will."""
    sha256: str
    files: int
    bytes: int
    missing: int = 0
    """Bytes that are not there yet, as far as sizes and stamps tell."""
    run: str | None = None
    attempt: int = 1
    source: Source | None = field(default=None, repr=False)

    @property
    def identity(self) -> RunIdentity:
        """The identity of the pull's run."""
        assert self.source is not None
        return identity_of(self.source.listing).at_attempt(self.attempt)

    @property
    def told(self) -> str:
        """The choice in a plan."""
        size = f", {self.missing / 1e6:.1f} of {self.bytes / 1e6:.1f} MB" if self.will == "run" else ""
        return f"{self.ref.repo}@{self.ref.revision[:12]}  {self.because}{size}"

    def as_json(self) -> dict[str, Any]:
        """The choice for programs."""
        names = ("will", "because", "path", "sha256", "files", "bytes", "missing", "run")
        return {"model": str(self.ref), **{name: getattr(self, name) for name in names}}


def identity_of(listing: Listing) -> RunIdentity:
    """What a pull means: these files, brought by this program. The hub that they come from is no part of it."""
    program = pull_program()[1]
    return RunIdentity(
        kind=cast(Any, "pull"),  # a run like any other, but no part of a pipeline
        spec={"pull": {"model": str(listing.ref)}},
        inputs={"files": f"sha256:{listing.sha256}", "program": f"sha256:{program}"},
        code=program,
        lock=hashlib.sha256(b"").hexdigest(),  # it takes the host's Python and nothing else
    )


def kin_of(listing: Listing) -> str:
    """What the attempts of a pull have in common."""
    return canonical_sha256({**identity_of(listing).as_json(), "attempt": 0})


def probe_models(transport: Transport, refs: list[ModelRef], sources: list[Source]) -> HostFacts:
    """What the host has of some models, and of the pulls and contents that would bring them."""
    question: dict[str, Any] = {"models": [ref.folder for ref in refs]}
    if sources:
        kins = [kin_of(source.listing) for source in sources]
        runs = [identity_of(source.listing).run_id for source in sources]
        question |= {"kins": kins, "runs": [{"id": run, "kin": kin} for run, kin in zip(runs, kins, strict=True)]}
    return HostFacts.model_validate(call(transport, "probe", question, timeout=PROBE_SECONDS).result)


def keep(ref: ModelRef, found: ModelFact, because: str = "complete") -> PullChoice:
    """The choice for a model that is there."""
    assert found.sha256 is not None
    return PullChoice(ref, "keep", because, found.path, found.sha256, found.files, found.bytes)


def choose_pull(source: Source, facts: HostFacts, *, needed: bool = True) -> PullChoice:
    """What is to be done about a model, as the host has it. A pull that ended is taken up again: bytes have no verdict.

    RefusedError where what is missing would fill the host's disk.
    """
    listing = source.listing
    found = facts.models[listing.ref.folder]
    if found.complete and found.sha256 == listing.tree_sha256:
        return keep(listing.ref, found)
    at_hand = {name: size for name, size in found.present.items() if name not in found.bad}
    missing = sum(file.bytes for file in listing.files if at_hand.get(file.path) != file.bytes)
    attempt, state, ended = _latest(listing, facts)

    def choice(will: Literal["keep", "run", "follow"], because: str, attempt: int) -> PullChoice:
        run = identity_of(listing).at_attempt(attempt).run_id
        size, total = listing.size, len(listing.files)
        args = (listing.ref, will, because, found.path, listing.tree_sha256, total, size, missing)
        return PullChoice(*args, run=run, attempt=attempt, source=source)

    if state.going_on:
        return choice("follow", "it goes on", attempt)
    if not needed:
        return choice("keep", "not needed", attempt)
    free = facts.host.disk_free
    if free is not None and free < missing + MARGIN:
        raise FailedError(
            f"{missing / 1e9:.1f} GB of {listing.ref} are missing and {MARGIN / 1e9:.1f} GB must stay free, but "
            f"{facts.root} has {free / 1e9:.1f} GB free",
            next="latentforge dispatch gc   shows what can go",
        )
    because = found.why or "its files are others than the list says"
    if ended is None:
        return choice("run", because, attempt)
    if attempt >= MAX_ATTEMPTS:
        raise RefusedError(f"{state} is attempt {attempt} of this pull, the last that there can be")
    return choice("run", f"{because}; attempt {attempt + 1}, after one that {ended}", attempt + 1)


def _latest(listing: Listing, facts: HostFacts) -> tuple[int, RunState, str | None]:
    """The latest attempt of a pull on the host, its state, and how it ended where it did."""
    kin_runs = sorted(facts.kin_runs.get(kin_of(listing), ()), key=lambda one: one.attempt)
    if not kin_runs:
        return 1, RunState(state="absent"), None
    last = kin_runs[-1]
    state = RunState(state=last.state, outcome=last.outcome, ended=last.ended)
    return last.attempt, state, told_end(state) if state.has_ended else None


def perform(
    choice: PullChoice,
    facts: HostFacts,
    transport: Transport,
    places: Places,
    follower: Follower,
    *,
    say: Callable[[str], None],
    detach: bool = False,
) -> RunState | None:
    """Start a pull and follow it to its end; FailedError or CrashedError where the model is not complete then."""
    if choice.will == "keep":
        return None
    host, run = transport.host, str(choice.run)
    hub = choice.source is None or choice.source.folder is None
    again = f"latentforge dispatch pull {choice.ref} --host {host.name}" if hub else "the same command again"
    prepared = Preparation(
        run=run,
        kin="",
        identity="",
        told=f"the pull {run} of {choice.ref} on {host.name} did not succeed",
        next=f"what was verified is kept; to go on:  {again}",
    )
    transport.install()
    if choice.will == "run":
        assert choice.source is not None
        listing, (program, program_sha256) = choice.source.listing, pull_program()
        send(transport, program_sha256, program)
        send(transport, listing.sha256, listing.content)
        prepared = replace(
            prepared,
            kin=kin_of(listing),
            identity=choice.identity.canonical.decode(),
            launch={
                "argv": _argv(choice.source, facts, program_sha256),
                "env": {"PYTHONUNBUFFERED": "1"},
                "plan": "",
                "host": {"name": host.name, "hostname": facts.host.hostname, "boot_id": facts.host.boot_id},
            },
            secrets=_secrets(choice.source),
        )
        remember(places, host, [run], recipe=f"pull {choice.ref}", plan="")

        def bring() -> None:
            if choice.source is not None and choice.source.folder is not None:
                send_folder(choice.source.folder, listing, facts, transport, places, say=say)

        start(prepared, transport, bring=bring)
    remember(places, host, [run], recipe=f"pull {choice.ref}", plan="")
    if detach:
        follower.goal = run
        return None
    return finish(prepared, follower)


def _secrets(source: Source) -> dict[str, str]:
    """This laptop's token, where its environment has one; else the host uses its own, if it has one."""
    value = os.environ.get(TOKEN, "").strip()
    return {TOKEN: value} if source.endpoint is not None and value else {}


def _argv(source: Source, facts: HostFacts, program: str) -> list[str]:
    root, listing = facts.root, source.listing
    asked: dict[str, Any] = {
        "models": f"{root}/models",
        "name": listing.ref.folder,
        "list": f"{root}/cas/{listing.sha256}",
        "margin": MARGIN,
        "wait": WAIT_SECONDS,
    }
    if source.endpoint is not None:
        asked |= {"url": resolve_url(source.endpoint, listing.ref), "token": TOKEN}
    else:
        asked |= {"cas": f"{root}/cas"}
    return [facts.python.executable, "-I", "-B", f"{root}/cas/{program}", json.dumps(asked)]
