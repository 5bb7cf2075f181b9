"""The parts of a teacher's section: what trains it, what decides its answers, and how it is reached.

Only the first two are part of what a run means. How a teacher is reached (how many requests at once, which cache,
under which name its key lies) may change without paying for its answers again.
"""

from __future__ import annotations

import json
from typing import Any

from latentforge.spec.run import RunDir
from latentforge.spec.sections import TeacherSpec

ANSWERS = ("backend", "url", "served_model", "revision", "precision", "quantization")
"""The fields on which a teacher's answers depend, beside its folder."""

REACH = (
    "api_key_env",
    "max_model_len",
    "gpu_memory_utilization",
    "environment",
    "cache",
    "cache_readonly",
    "concurrency",
    "timeout",
    "max_requests",
    "max_tokens",
)
"""The fields that say how to get at the answers: kept in ``launch.json``, not in a run's identity."""

DENSE_BACKENDS = ("hf", "fixture")
"""Backends that give a student dense logits where their targets are live; the others give top-k rows of score.k."""

ASKING = ("data", "score", "continuations", "distill")
"""The kinds of runs that may ask a teacher."""

_BY_CONTENT = ("model", "store")
"""Files and folders, which are inputs of runs by their content."""


def training_of(teacher: TeacherSpec) -> dict[str, Any]:
    """What a run that trains the teacher means: its shape and its steps."""
    return teacher.model_dump(mode="json", exclude={*ANSWERS, *REACH, *_BY_CONTENT})


def answers_of(teacher: TeacherSpec) -> dict[str, Any]:
    """What a run that asks the teacher means by it."""
    return teacher.model_dump(mode="json", include=set(ANSWERS))


def reach_of(teacher: TeacherSpec) -> dict[str, Any]:
    """How the teacher is reached, for ``launch.json``."""
    return teacher.model_dump(mode="json", include=set(REACH))


def teacher_of(run: RunDir) -> TeacherSpec:
    """The teacher that a run asks: its identity's part, reached as its launch record says.

    Of a run that asks none it is the teacher that filled its store. ``model`` and ``store`` are the run's inputs
    ``teacher`` and ``targets``, and absent here but for the store's path.
    """
    known: dict[str, Any] | None = run.load_identity().spec.get("teacher")
    if known is None and run.has_input("targets"):
        # A student that is fed from the store asks nobody; its teacher is the one that filled it.
        scored = run.input_run("targets")
        known = {"backend": "store"} if scored is None else scored.load_identity().spec.get("teacher")
    known = known or {}
    values = {name: value for name, value in known.items() if name in ANSWERS}
    if values.get("backend") == "store":
        values["store"] = str(run.input_path("targets"))
    reach = {name: value for name, value in run.load_launch().reach.items() if name in REACH}
    return TeacherSpec.model_validate_json(json.dumps(values | reach))
