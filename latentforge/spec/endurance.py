"""How a training run lasts: which checkpoints stay, and what is done about a step that is none.

What is done about a step changes what is computed, and is part of what a run means. The rest says how it is carried:
it lies in ``launch.json``, and may be another for the next attempt.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from latentforge.spec.fields import Count, Section
from latentforge.spec.run import RunDir

TRAINING = ("teacher", "autoencoder", "distill", "latent")
"""The kinds of runs that train something."""

MEANING = frozenset({"on_bad_step", "divergence_factor", "divergence_steps"})
"""The fields on which it may depend what a run computes."""


class EnduranceSpec(Section):
    """What makes a training of days end well."""

    keep_newest: Count = Field(2, description="checkpoints that stay, the newest so many")
    keep_nth: Count | None = Field(None, description="each so many-th checkpoint stays for ever; none if absent")
    disk_floor_mib: Annotated[int, Field(ge=0, lt=2**33)] = Field(
        256, description="MiB that stay free: a run whose next checkpoint would leave less writes one more and stops"
    )
    stop_grace: Annotated[float, Field(gt=0.0, le=600.0)] = Field(
        10.0,
        description="seconds between being asked to stop and being killed: for the step under way and a checkpoint",
    )
    restarts: Annotated[int, Field(ge=0, le=100)] = Field(
        0, description="how often the supervisor begins a run again that crashed, from its last checkpoint"
    )
    on_bad_step: Literal["stop", "skip"] = Field(
        "stop",
        description="a step that is not finite, or from which the loss diverges: end the run, or go back to before it "
        "and leave its batch out, once at one place",
    )
    divergence_factor: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] | None = Field(
        None, description="the loss diverges above so many times the median of the last 100; not looked for if absent"
    )
    divergence_steps: Count = Field(20, description="and does so for this many steps in a row")

    @model_validator(mode="after")
    def _can_go_back(self) -> Self:
        if self.keep_newest == 1 and self.on_bad_step == "skip" and self.divergence_factor is not None:
            raise ValueError(
                "keep_newest = 1 with on_bad_step = 'skip' and a divergence_factor: the newest checkpoint may lie "
                "behind the step that is to be left out; keep 2"
            )
        return self


def meaning_of(endurance: EnduranceSpec) -> dict[str, Any]:
    """What of it is part of a run's identity."""
    return endurance.model_dump(mode="json", include=set(MEANING))


def carriage_of(endurance: EnduranceSpec) -> dict[str, Any]:
    """How a run is carried, for ``launch.json``."""
    return endurance.model_dump(mode="json", exclude=set(MEANING))


def checkpoints_of(endurance: EnduranceSpec, *, steps: int, every: int, keep: str) -> int:
    """The most checkpoints that a training of ``steps`` steps with one ``every`` so many has on disk: those that stay,
    one that is being written, and the best, the one before it and the next."""
    forever = 0 if endurance.keep_nth is None else steps // (every * endurance.keep_nth)
    return endurance.keep_newest + 1 + forever + (3 if keep == "best" else 0)


def endurance_of(run: RunDir) -> EnduranceSpec:
    """What was asked of a run: its identity's part, carried as its launch record says."""
    meant = run.load_identity().spec.get("endurance", {})
    return EnduranceSpec.model_validate_json(json.dumps(meant | run.load_launch().endurance))
