"""What each field of a pipeline file means, from its section."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from latentforge.errors import RefusedError
from latentforge.spec.sections import PipelineSpec


@dataclass(frozen=True)
class Explained:
    """A field by its dotted name, its default as JSON has it, and a sentence (empty where the name says it all)."""

    field: str
    default: Any
    meaning: str


def explained(name: str | None = None) -> list[Explained]:
    """All fields of the table or field ``name``, of a whole file where there is none; RefusedError where neither is."""
    known = list(_fields(PipelineSpec, PipelineSpec()))
    if name is None:
        return known
    found = [one for one in known if one.field == name or one.field.startswith(f"{name}.")]
    if not found:
        tables = {one.field.rpartition(".")[0] for one in known} - {""}
        near = difflib.get_close_matches(name, [*tables, *(one.field for one in known)], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "tables: " + ", ".join(sorted(tables))
        raise RefusedError(f"{name!r} is no field of a pipeline file", next=hint)
    return found


def _fields(model: type[BaseModel], defaults: BaseModel, before: str = "") -> Iterator[Explained]:
    for name, field in model.model_fields.items():
        value = getattr(defaults, name)
        if isinstance(value, BaseModel):
            yield from _fields(type(value), value, f"{before}{name}.")
        else:
            yield Explained(f"{before}{name}", value, field.description or "")
