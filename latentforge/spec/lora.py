"""What a user may ask of the adapters of a token-level student."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from latentforge.spec.fields import Positive, Section

ModuleName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_]+$")]


class LoraSpec(Section):
    """Low-rank adapters of a student that starts from a folder: they are trained, and all its own tensors stay."""

    rank: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="0: no adapters, every tensor is trained")
    alpha: Positive = Field(16.0, description="what the adapters add is multiplied by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="of what goes into an adapter")
    target_modules: tuple[ModuleName, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="last names of the linear modules that get an adapter",
    )

    @model_validator(mode="after")
    def _targets_differ(self) -> Self:
        if len(set(self.target_modules)) != len(self.target_modules):
            raise ValueError(f"target_modules {list(self.target_modules)} names one twice")
        return self
