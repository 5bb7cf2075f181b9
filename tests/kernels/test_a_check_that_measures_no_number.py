"""An error that is not a number is the worst of all: no later one takes its place in what a check measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.contracts import Finding, worse
from latentforge.kernels import checks, fixtures, step_checks


def test_the_worse_of_two_errors() -> None:
    errors = [0.0, 1.0, math.inf, math.nan]
    for one, other in itertools.product(errors, errors):
        found = worse(one, other)
        assert math.isnan(found) if math.isnan(one) or math.isnan(other) else found == max(one, other)


@pytest.mark.parametrize(
    "check",
    [
        checks.loss_gradient_consistent,
        checks.temperature_power,
        checks.weights_named,
        step_checks.pure_cross_entropy,
    ],
)
def test_one_gradient_that_is_no_number_fails_the_claim(
    check: Callable[[], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient_of, calls = fixtures.gradient_of, itertools.count()

    def wrong(student: Tensor, *args: Any, **settings: Any) -> Tensor:
        return gradient_of(student, *args, **settings) * (math.nan if next(calls) == 0 else 1.0)

    monkeypatch.setattr(fixtures, "gradient_of", wrong)
    if check is checks.loss_gradient_consistent:  # central differences take long, and say nothing of this
        zero = torch.zeros(())
        monkeypatch.setattr(checks, "_numeric_gradient", lambda *case: zero)
        monkeypatch.setattr(
            fixtures, "gradient_of", lambda *args, **settings: zero if next(calls) else torch.tensor(math.nan)
        )
    assert check().passed is False
