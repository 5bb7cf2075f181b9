"""What a probe saw of a host, typed; judgements about it are the planner's."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dispatch.hosts.runner import RunnerFacts
from dispatch.preflight.facts import PreflightFacts

GOING_ON = frozenset({"queued", "starting", "running", "finishing", "unsupervised"})
ENDED = frozenset({"finished", "lost", "interrupted"})


class Fact(BaseModel):
    """One observation. The agent may say more than this laptop knows of; that is ignored, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RunState(Fact):
    """A run on its host, as the agent derived it at the moment of asking."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    state: str
    code: int | None = None
    signal: int | None = None
    oom: Any = None
    class_: str | None = Field(None, alias="class")
    """exited, signal, stopped, oom, killed-unknown, watchdog, cancelled or not-started; None while it goes on."""
    outcome: str | None = None
    exit: int | None = None
    reason: str | None = None
    started: Any = None
    ended: Any = None
    seconds: float | None = None
    chain: tuple[str, ...] = ()
    pid: int | None = None
    cancel_requested: bool = False
    beat_age: float | None = None
    beat: dict[str, Any] | None = None
    """What its tree used when it was last looked at (see the agent's telemetry); None unless it runs."""
    warning: str | None = None
    """The last thing that its supervisor found amiss while it runs: memory or disk running low."""

    @property
    def going_on(self) -> bool:
        """Whether something is still to happen."""
        return self.state in GOING_ON

    @property
    def has_ended(self) -> bool:
        """Whether it was started and nothing more will happen."""
        return self.state in ENDED

    @property
    def passed(self) -> bool:
        """Whether it finished with a pass."""
        return self.state == "finished" and self.outcome == "pass"


class KinRun(RunState):
    """A run on the host that differs from one of the plan's in code (or attempt) alone."""

    id: str
    attempt: int = 1
    boot_id: str | None = None
    driver: str | None = None
    hosts: tuple[str, ...] = ()
    """Those that it was launched over, the leader first; empty where it has one host to itself."""


class PathFact(Fact):
    """A file or folder of the user's, hashed where it lies."""

    ok: bool
    sha256: str | None = None
    files: int | None = None
    bytes: int | None = None
    documents_bytes: int | None = None
    vocab_size: int | None = None
    tokenizer: bool | None = None
    reason: str | None = None
    next: str | None = None
    absent: bool = False
    """A pulled model that is not (or no longer) there, whole."""
    location: str | None = None
    """Where a pulled model lies on its host."""


class ModelFact(Fact):
    """A pulled model as it lies on its host."""

    complete: bool
    path: str
    why: str | None = None
    sha256: str | None = None
    files: int = 0
    bytes: int = 0
    bad: tuple[str, ...] = ()
    present: dict[str, int] = Field(default_factory=dict)


class Machine(Fact):
    """The host itself."""

    hostname: str = "?"
    arch: str = "?"
    os: str | None = None
    kernel: str | None = None
    cpu: str | None = None
    cores: int | None = None
    boot_id: str | None = None
    mem_total: int | None = None
    mem_available: int | None = None
    disk_free: int | None = None
    gpus: tuple[Any, ...] = ()
    driver: str | None = None


class Interpreter(Fact):
    """The Python that ran the agent, and that builds."""

    executable: str
    version: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers."""
        return tuple(int(part) for part in self.version.split(".")[:2] if part.isdigit())


class WireFact(Fact):
    """One interface of a host: its IPv4 address and network, None where it has none.

    ``up``, and ``carrier`` (the other end of its cable is up), are None where there is no such interface.
    """

    interface: str
    address: str | None = None
    network: str | None = None
    mtu: int | None = None
    up: bool | None = None
    carrier: bool | None = None
    others: tuple[str, ...] = ()
    """All interfaces that there are."""


class Holder(Fact):
    """Who holds the device lease."""

    run: str | None = None
    pid: int | None = None


class HostFacts(Fact):
    """Everything that a plan may depend on, from one or more probes of one host."""

    host: Machine
    python: Interpreter
    root: str
    runs: dict[str, RunState] = Field(default_factory=dict)
    kin_runs: dict[str, tuple[KinRun, ...]] = Field(default_factory=dict)
    paths: dict[str, PathFact] = Field(default_factory=dict)
    builds: dict[str, bool] = Field(default_factory=dict)
    venvs: dict[str, bool] = Field(default_factory=dict)
    cas: dict[str, bool] = Field(default_factory=dict)
    lease: dict[str, Any] = Field(default_factory=dict)
    runner: RunnerFacts | None = None
    models: dict[str, ModelFact] = Field(default_factory=dict)
    rsync: str | None = None
    """Where rsync lies on the host; asked together with models."""
    preflight: PreflightFacts | None = None
    link: WireFact | None = None
    """The interface of the inventory's ``link``; asked for a run over two hosts."""

    @property
    def lease_holder(self) -> Holder | None:
        """The holder of the device lease, or None where it is free."""
        holder = self.lease.get("device")
        return Holder.model_validate(holder) if holder else None


def moment(stamp: Any) -> str:
    """A time stamp of the host's (seconds since 1970, or ISO 8601) as a user reads it, in UTC."""
    if isinstance(stamp, int | float):
        return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M UTC")
    try:
        return datetime.fromisoformat(str(stamp)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(stamp)
