"""What the agent gathered for a preflight, typed. Absent is None: nothing here has a default that means "fine"."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Fact(BaseModel):
    """One group of observations; what an agent says beyond these fields is ignored, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Ended(Fact):
    """What became of a program: ``missing``, ``timeout``, ``failed`` to start, or ``ended`` with a code."""

    status: str = "failed"
    code: int | None = None
    out: str = ""
    err: str = ""
    seconds: float | None = None

    @property
    def answered(self) -> bool:
        """Whether it ended by itself and well."""
        return self.status == "ended" and self.code == 0

    def trouble(self, name: str) -> str:
        """Why there is no answer, in words."""
        if self.status == "missing":
            return f"there is no {name} on this host"
        if self.status == "timeout":
            return f"{name} did not answer within {self.seconds or 0:.0f} s"
        said = (self.err or self.out).strip().splitlines()
        return f"{name} ended with status {self.code}" + (f": {said[0][:160]}" if said else "")


class Storage(Fact):
    """The state root, or the nearest folder above it that exists (``base``)."""

    root: str
    exists: bool
    base: str
    filesystem: str | None = None
    owner: int
    uid: int
    mode: int
    writable: bool
    read_only: bool = False
    noexec: bool = False
    bytes_free: int
    bytes_total: int | None = None
    inodes_free: int | None = None
    unnamed: str = "unsupported"
    home: str = "~"
    home_writable: bool = True


class Swap(Fact):
    """One swap file or partition, in bytes."""

    name: str
    size: int
    used: int


class Memory(Fact):
    """``/proc/meminfo`` in bytes, and swap."""

    numbers: dict[str, int]
    swaps: tuple[Swap, ...] = ()
    swappiness: int | None = None


class Clock(Fact):
    """Whether the kernel holds its clock for synchronised."""

    synchronised: bool | None = None


class Session(Fact):
    """What becomes of a user's processes: lingering, sshd's protection from the OOM killer, the watchdog of jobs."""

    systemd: bool
    linger: bool | None = None
    sshd: int | None = None
    watchdog: bool = False


class Platform(Fact):
    """The system by its own names."""

    arch: str
    kernel: str
    id: str | None = None
    version: str | None = None
    pretty: str | None = None
    dgx: str | None = None


class Tenant(Fact):
    """A process that uses the device or serves a model."""

    pid: int
    owner: str | None = None
    age: float | None = None
    command: str = "?"
    name: str | None = None
    why: tuple[str, ...] = ()


class Tenants(Fact):
    """Who uses the device. ``unseen`` counts the processes that may not be looked into; ``ours`` hold our own lease."""

    processes: tuple[Tenant, ...] = ()
    unseen: int = 0
    devices: bool = False
    lease: dict[str, Any] | None = None
    ours: tuple[int, ...] = ()


class Capabilities(Fact):
    """What the built package says that it can do; ``source`` None where nothing is built."""

    source: str | None = None
    offered: dict[str, Any] | None = None
    status: str | None = None
    code: int | None = None
    said: str = ""


class Model(Fact):
    """A model folder's ``config.json`` and the bytes of its weights."""

    config: dict[str, Any] | None = None
    bytes: int | None = None
    reason: str | None = None


class Cache(Fact):
    """A folder that compilers write to."""

    variable: str
    path: str
    filesystem: str | None = None
    writable: bool


class Port(Fact):
    """One port of an RDMA card."""

    card: str
    port: str
    state: str
    net: str | None = None
    mtu: int | None = None


class Triton(Fact):
    """Triton as the run would meet it."""

    version: str | None = None
    variables: dict[str, str] = Field(default_factory=dict)
    ptxas: str | None = None
    programs: tuple[str, ...] = ()
    assembled: Ended | None = None


class Binary(Fact):
    """One compiled extension: what ``cuobjdump`` lists, and whether it asks for the CUDA 12 runtime."""

    path: str
    cudart12: bool | None = None
    elf: tuple[str, ...] | None = None
    ptx: tuple[str, ...] | None = None


class Binaries(Fact):
    """Our extension and those of others."""

    lister: str | None = None
    own: tuple[Binary, ...] = ()
    third: dict[str, tuple[Binary, ...]] = Field(default_factory=dict)


class Failed(Fact):
    """A group that could not be gathered."""

    error: str


class PreflightFacts(Fact):
    """All groups; a group is None where it was not asked for, and ``failed`` says why it has no answer."""

    commands: dict[str, Ended] = Field(default_factory=dict)
    did: dict[str, dict[str, Any]] = Field(default_factory=dict)
    storage: Storage | None = None
    memory: Memory | None = None
    clock: Clock | None = None
    session: Session | None = None
    platform: Platform | None = None
    tenants: Tenants | None = None
    capabilities: Capabilities | None = None
    models: dict[str, Model] = Field(default_factory=dict)
    caches: tuple[Cache, ...] | None = None
    reboot: bool | None = None
    link: tuple[Port, ...] | None = None
    triton: Triton | None = None
    binaries: Binaries | None = None
    received: float | None = None
    answered: float | None = None
    asked: float | None = None
    """The laptop's clock when it asked; with ``heard`` and the host's two times it gives the offset of the clocks."""
    heard: float | None = None
    failed: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, answer: dict[str, Any], *, asked: float, heard: float) -> PreflightFacts:
        """The facts of an answer that was asked for and heard at these moments of the laptop's clock."""
        failed = {name: value["error"] for name, value in answer.items() if _is_error(value)}
        kept = {name: value for name, value in answer.items() if not _is_error(value)}
        commands = {
            name: {"status": "failed", "err": value["error"]} if _is_error(value) else value
            for name, value in answer.get("commands", {}).items()
        }
        return cls.model_validate({**kept, "commands": commands, "asked": asked, "heard": heard, "failed": failed})

    @property
    def offset(self) -> tuple[float, float] | None:
        """Seconds by which the host's clock is ahead of the laptop's, and how far that may be off (half the trip)."""
        if self.received is None or self.answered is None or self.asked is None or self.heard is None:
            return None
        ahead = ((self.received - self.asked) + (self.answered - self.heard)) / 2
        trip = (self.heard - self.asked) - (self.answered - self.received)
        return ahead, max(0.0, trip / 2)


def _is_error(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"error"}
