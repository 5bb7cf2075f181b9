"""How alike the products of two executions of one run are: bit for bit, and where not, how far apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.evidence.reading import RunRecord
from latentforge.evidence.tensors import tensor_digests

WEIGHTS = ".safetensors"
ROWS = ".bin"


@dataclass(frozen=True)
class Likeness:
    """What was compared: ``compared`` tensors and shards of rows, of which ``different`` (by name) have other bytes.

    ``distance`` is ``|a - b| / |a|`` over all weights as one vector (fp64), 0 where they are bit-equal and infinite
    where something has no counterpart of its shape and type, or other rows. ``metrics`` is the largest relative
    difference of a metric's last value, and ``metric`` which one that is.
    """

    compared: int
    different: tuple[str, ...]
    distance: float
    metrics: float
    metric: str | None

    @property
    def bit_equal(self) -> bool:
        """Whether every tensor and every row has the same bytes."""
        return not self.different

    def within(self, tolerance: float) -> bool:
        """Whether weights and metrics are no further apart than ``tolerance``."""
        return self.distance <= tolerance and self.metrics <= tolerance


def compare_products(before: RunRecord, after: RunRecord) -> Likeness:
    """Compare the weights and packed rows below ``out/`` of two folders, and the metrics of their logs.

    RefusedError where the first has neither weights nor rows: then there is nothing to compare.
    """
    first, second = _products(before.folder), _products(after.folder)
    if not first:
        raise RefusedError(f"{before.id} has neither weights nor rows below out/: there is nothing to compare")
    compared, different, squares, length = 0, [], 0.0, 0.0
    for name in sorted({*first, *second}):
        here, there = first.get(name), second.get(name)
        if here is None or there is None:
            compared, squares = compared + 1, math.inf
            different.append(f"{name} (only in one of them)")
        elif name.endswith(ROWS):
            compared += 1
            if file_sha256(here) != file_sha256(there):
                different.append(name)
                squares = math.inf
        else:
            tensors, unlike, apart, size = _weights(name, here, there)
            compared, squares, length = compared + tensors, squares + apart, length + size
            different += unlike
    distance = 0.0 if squares == 0 else math.sqrt(squares / length) if length else math.inf
    metrics, metric = _metrics(before, after)
    return Likeness(compared, tuple(different), distance if math.isfinite(distance) else math.inf, metrics, metric)


def _products(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in (folder / "out").rglob("*") if path.is_file()}
    # Checkpoints stay on their host; what they lead to is what is compared.
    kept = {name: path for name, path in found.items() if not name.startswith("out/checkpoints/")}
    return {name: path for name, path in kept.items() if name.endswith((WEIGHTS, ROWS))}


def _weights(name: str, here: Path, there: Path) -> tuple[int, list[str], float, float]:
    """Of two weights files: tensors compared, names of those that differ, squared distance, squared length."""
    first, second = tensor_digests(here), tensor_digests(there)
    if first is None or second is None:
        return 1, [f"{name} (no weights file)"], math.inf, 0.0
    unlike = sorted(one for one in {*first, *second} if first.get(one) != second.get(one))
    apart = 0.0
    for tensor in unlike:
        a, b = (_kind(one.get(tensor)) for one in (first, second))
        apart += math.inf if a != b else _squares(here, there, tensor)
    length = sum(_squares(here, None, tensor) for tensor in first) if unlike else 0.0
    return len({*first, *second}), [f"{name} {tensor}" for tensor in unlike], apart, length


def _kind(tensor: dict[str, Any] | None) -> tuple[Any, ...]:
    return () if tensor is None else (tensor["dtype"], *tensor["shape"])


def _squares(here: Path, there: Path | None, tensor: str) -> float:
    with safe_open(here, "pt") as file:
        value = file.get_tensor(tensor).to(torch.float64)
    if there is not None:
        with safe_open(there, "pt") as file:
            value = value - file.get_tensor(tensor).to(torch.float64)
    found = float(value.square().sum())
    return found if math.isfinite(found) else math.inf


def _metrics(before: RunRecord, after: RunRecord) -> tuple[float, str | None]:
    """The largest relative difference of a metric's last value; infinite where one is missing or no number."""
    worst: tuple[float, str | None] = (0.0, None)
    sides = [{(one.model, one.name, one.split): one.values[-1] for one in record.metrics} for record in (before, after)]
    for key in sorted({*sides[0], *sides[1]}, key=str):
        a, b = sides[0].get(key, math.nan), sides[1].get(key, math.nan)
        apart = abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0
        apart = apart if math.isfinite(apart) else math.inf
        if apart > worst[0]:
            worst = (apart, " ".join(str(part) for part in key if part is not None))
    return worst
