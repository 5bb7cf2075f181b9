"""What this version of the package can be asked for, by name, and what a pipeline asks for.

A host runs the package that was built there. Before a launch the list that the built package gives of itself is
compared with what the plan needs, so that a flag, field or falsifier that it lacks is refused by name and not met,
or silently ignored, by a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from latentforge.spec.canary import REQUIRED
from latentforge.spec.fields import RUN_FALSIFIERS
from latentforge.spec.identity import Kind
from latentforge.spec.sections import PipelineSpec

RUN_COMMAND = "run RUN_DIR"
"""How a host is told to execute a run folder: the command and its argument."""


def offered(commands: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The capabilities of this package; ``commands`` maps each command to the flags and arguments that it takes."""
    return {
        "schema": 1,
        "commands": sorted(set(commands) | {f"{name} {one}" for name, all in commands.items() for one in all}),
        "fields": sorted(_fields(PipelineSpec)),
        "kinds": sorted(get_args(Kind)),
        "falsifiers": sorted(RUN_FALSIFIERS),
    }


def wanted_of(spec: PipelineSpec) -> dict[str, tuple[str, ...]]:
    """What a pipeline asks of the package on its host: its kinds of runs, every field of them, its falsifiers."""
    made: dict[str, tuple[bool, tuple[str, ...]]] = {
        "data": (True, ()),
        "teacher": (spec.has_teacher and spec.teacher.model is None, ()),
        "score": (spec.scores, ()),
        "continuations": (spec.continues, ()),
        "autoencoder": (spec.through in ("autoencoder", "latent"), spec.autoencoder.require),
        "distill": (spec.distils, spec.distill.require),
        "latent": (spec.through == "latent", spec.latent.require),
        "bench": (spec.benches, ()),
    }
    kinds = [kind for kind, (wanted, _) in made.items() if wanted]
    require = [falsifier for kind in kinds for falsifier in made[kind][1]]
    if spec.profile == "full":
        require += [falsifier for kind, of_canary in REQUIRED.items() if kind in kinds for falsifier in of_canary]
    sections = {*kinds, "teacher"} if spec.teacher.model is not None else set(kinds)
    fields = [one for one in sorted(_fields(PipelineSpec)) if "." not in one or one.partition(".")[0] in sections]
    return {
        "commands": (RUN_COMMAND,),
        "kinds": tuple(kinds),
        "fields": tuple(fields),
        "falsifiers": tuple(dict.fromkeys(require)),
    }


def missing(wanted: Mapping[str, tuple[str, ...]], offer: Mapping[str, Any]) -> list[str]:
    """What is wanted and not offered, each as ``field distill.precision``."""
    words = {"commands": "command", "kinds": "kind", "fields": "field", "falsifiers": "falsifier"}
    lacking = []
    for group, names in wanted.items():
        there = set(offer.get(group) or ())
        lacking += [f"{words.get(group, group)} {name}" for name in names if name not in there]
    return lacking


def _fields(model: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _fields(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}"
