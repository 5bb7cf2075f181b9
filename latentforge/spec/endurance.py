"""How a training run lasts: which checkpoints stay. Kept in ``launch.json``: it changes nothing that is computed."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from latentforge.spec.fields import Count, Section
from latentforge.spec.run import RunDir

TRAINING = ("teacher", "autoencoder", "distill", "latent")
"""The kinds of runs that train something."""


class EnduranceSpec(Section):
    """What makes a training of days end well."""

    keep_newest: Count = Field(2, description="checkpoints that stay, the newest so many")
    keep_nth: Count | None = Field(None, description="each so many-th checkpoint stays for ever; none if absent")


def carriage_of(endurance: EnduranceSpec) -> dict[str, Any]:
    """How a run is carried, for ``launch.json``."""
    return endurance.model_dump(mode="json")


def endurance_of(run: RunDir) -> EnduranceSpec:
    """What was asked of a run, as its launch record says."""
    return EnduranceSpec.model_validate_json(json.dumps(run.load_launch().endurance))
