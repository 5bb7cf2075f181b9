"""What was asked against what was in force, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def compare_configuration(kind: str, spec: Mapping[str, Any], effective_file: Mapping[str, Any]) -> dict[str, Any]:
    """The ``configuration`` of the statement: flat requested and effective values, and where they differ.

    ``spec`` is the identity's; ``effective_file`` the content of ``effective.json`` (its ``requested`` must repeat the
    identity, its ``effective`` is the trainer's own state). A requested null or ``"auto"`` leaves the choice open.
    """
    requested = flatten(spec, kind)
    if not isinstance(effective_file.get("effective"), Mapping):
        return {"requested": requested, "effective": None, "differences": [], "unreported": sorted(requested)}
    effective = flatten(effective_file["effective"], kind)
    repeated = effective_file.get("requested")
    understood = flatten(repeated, kind) if isinstance(repeated, Mapping) else {}
    differences = []
    for field, asked in requested.items():
        # What the trainer took for the request: another value there means that it ran something else.
        if field in understood and not same(asked, understood[field]):
            differences.append({"field": f"{field} (as read)", "requested": asked, "effective": understood[field]})
        if field in effective and asked is not None and asked != "auto" and not same(asked, effective[field]):
            differences.append({"field": field, "requested": asked, "effective": effective[field]})
    return {
        "requested": requested,
        "effective": effective,
        "differences": differences,
        "unreported": sorted(set(requested) - set(effective)),
    }


def flatten(values: Mapping[str, Any], kind: str, prefix: str = "") -> dict[str, Any]:
    """Dotted names to values, sorted; the section of the run's own kind loses its name (``distill.steps`` → ``steps``).

    Lists stay values.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if not prefix and name == kind and isinstance(value, Mapping):
            flat.update(flatten(value, kind, ""))
        elif isinstance(value, Mapping) and value:
            flat.update(flatten(value, kind, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return dict(sorted(flat.items()))


def same(asked: Any, found: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are the same number, but True is not 1."""
    if isinstance(asked, bool) or isinstance(found, bool):
        return asked is found
    if isinstance(asked, list | tuple) and isinstance(found, list | tuple):
        return len(asked) == len(found) and all(same(a, f) for a, f in zip(asked, found, strict=True))
    return bool(asked == found)
