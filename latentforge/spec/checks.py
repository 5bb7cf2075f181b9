"""Executable checks of contracts/preconditions.yaml: what a pipeline's section takes for a parameter."""

from __future__ import annotations

from typing import Any


def distill_takes(value: Any, *, field: str, mutant: str | None = None) -> None:
    """Refused (ValueError) where the distill section does not take ``value`` for ``field``.

    Mutant ``unchecked``: a section that is made without looking at its values.
    """
    from latentforge.spec.sections import DistillSpec

    if mutant not in (None, "unchecked"):
        raise KeyError(f"unknown mutant {mutant!r}")
    if field not in DistillSpec.model_fields:
        raise KeyError(f"the distill section has no {field!r}")
    if mutant == "unchecked":
        DistillSpec.model_construct(**{field: value})
    else:
        DistillSpec.model_validate({field: value})
