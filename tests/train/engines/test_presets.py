"""The two DeepSpeed files are whole: an optimiser, no value left open, no offload where memory is shared."""

from __future__ import annotations

from typing import Any

import pytest

from latentforge.spec.spread import settings_of
from latentforge.train.optimiser import BETAS


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in leaves(part, f"{name}.{key}".lstrip(".")).items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_preset_is_whole_and_leaves_accumulation_to_the_engine(stage: Any) -> None:
    settings = settings_of(stage)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["optimizer"]["type"] == "AdamW"
    assert settings["optimizer"]["params"]["torch_adam"] is True
    assert tuple(settings["optimizer"]["params"]["betas"]) == BETAS
    said = leaves(settings)
    assert [name for name, value in said.items() if value == "auto"] == []
    # On a GB10 the host's memory is the GPU's: what is offloaded takes the same bytes, and is copied besides.
    assert [name for name in said if "offload" in name] == []
    assert (settings["gradient_accumulation_steps"], settings["managed_gradient_accumulation"]) == (1, False)
