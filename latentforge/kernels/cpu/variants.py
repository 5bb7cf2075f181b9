"""Which instruction set the C++ kernels use on this machine."""

from __future__ import annotations

import os

from latentforge.errors import RefusedError
from latentforge.kernels.native import native

VARIANT_VARIABLE = "LATENTFORGE_CPU_VARIANT"


def variant() -> str:
    """The instruction-set variant in use: the best of this machine, or the one that LATENTFORGE_CPU_VARIANT names."""
    available = list(native().cpu_variants())
    asked = os.environ.get(VARIANT_VARIABLE)
    if asked is None:
        return str(available[0])
    if asked not in available:
        raise RefusedError(
            f"{VARIANT_VARIABLE}={asked!r}: this machine can run {', '.join(available)}",
            next=f"unset {VARIANT_VARIABLE}",
        )
    return asked
