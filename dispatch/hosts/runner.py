"""What carries runs on a host, and what watches over them: the agent's words, typed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

GIB = 1 << 30


class Floors(BaseModel):
    """Bytes of available memory below which a run is warned of, and below which it is ended; 0 is never."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    warn: int = 0
    kill: int = 0

    @property
    def text(self) -> str:
        """The floors for a reader."""
        if not self.kill and not self.warn:
            return "memory is not watched"
        warns = f"warns below {self.warn / GIB:.1f} GiB available" if self.warn else "warns of nothing"
        return f"{warns}, " + (f"ends the run below {self.kill / GIB:.1f}" if self.kill else "ends nothing")


class RunnerFacts(BaseModel):
    """Whether systemd units can carry runs there and why (not), whether lingering is on, and the usual floors."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    systemd: bool = False
    why: str = "not asked"
    linger: bool | None = None
    floors: Floors = Floors()
