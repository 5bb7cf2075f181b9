"""Faults of the loss: another mathematics behind ``kd_loss``, which the checks of its contracts must see.

The function that the checks call is replaced, not the check's own control: that would only show that controls work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from latentforge.kernels import fixtures
from latentforge.kernels.api import kd_loss
from latentforge.kernels.targets import TopKTargets

from .frame import claim, mutant, untouched

Settings = dict[str, Any]
Call = Callable[[Any, Any, Any, Settings], Any]


def _loss(name: str, by: str, call: Call, *, how: str) -> None:
    @mutant("mathematics", name, how=how, by=by)
    def _(folder: Path, planted: bool) -> str | None:
        def wrong(student: Any, targets: Any, labels: Any, **settings: Any) -> Any:
            return call(student, targets, labels, settings)

        if planted:
            with mock.patch.object(fixtures, "kd_loss", wrong):
                found = claim(by)()
        else:
            found = untouched(by)
        return None if found.passed is not False else found.text


def _with(**changed: Callable[[Settings], Any]) -> Call:
    """The loss with some settings replaced by what a function makes of all of them."""

    def call(student: Any, targets: Any, labels: Any, settings: Settings) -> Any:
        given = {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0, **settings}
        return kd_loss(student, targets, labels, **{**settings, **{n: value(given) for n, value in changed.items()}})

    return call


def _last_row(student: Any, targets: Any, labels: Any, settings: Settings) -> Any:
    kept = torch.full_like(labels, settings.get("ignore_index", -100))
    kept[-1] = labels[-1]
    return kd_loss(student, targets, kept, **settings)


def _renormalised(student: Any, targets: Any, labels: Any, settings: Settings) -> Any:
    if isinstance(targets, TopKTargets):
        inside = targets.logprobs.log_softmax(-1)
        targets = TopKTargets(targets.ids, inside, torch.full_like(targets.tail, float("-inf")))
    return kd_loss(student, targets, labels, **settings)


_loss(
    "reverse KL",
    "F-DISTILL-KDSTEP-003",
    _with(direction=lambda s: "reverse"),
    how="KL(student, teacher) in place of KL(teacher, student)",
)
_loss(
    "last row only",
    "F-KD-ROWS-001",
    _last_row,
    how="all labels but the last are ignored",
)
_loss(
    "weights swapped",
    "F-KD-WEIGHTS-001",
    _with(ce_weight=lambda s: s["kd_weight"], kd_weight=lambda s: s["ce_weight"]),
    how="ce_weight weighs the divergence, kd_weight the cross-entropy",
)
_loss(
    "T squared in the gradient",
    "F-KD-TPOWER-001",
    _with(kd_weight=lambda s: s["kd_weight"] * s["temperature"]),
    how="one factor of T too many",
)
_loss(
    "no T in the gradient",
    "F-KD-TPOWER-002",
    _with(kd_weight=lambda s: s["kd_weight"] / s["temperature"]),
    how="one factor of T too few",
)
_loss(
    "renormalised top-k",
    "F-KD-TAIL-001",
    _renormalised,
    how="the k likeliest tokens are made to sum to one and the tail is dropped",
)
_loss(
    "KD leaks into the twin",
    "F-DISTILL-KDSTEP-001",
    _with(kd_weight=lambda s: max(s["kd_weight"], 0.01)),
    how="kd_weight is never below 0.01",
)
_loss(
    "teacher at another temperature",
    "F-DISTILL-KDSTEP-002",
    _with(teacher_temperature=lambda s: 1.5 * s["temperature"]),
    how="the teacher's distribution is taken at 1.5 T",
)
