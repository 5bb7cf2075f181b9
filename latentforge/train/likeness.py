"""How alike two executions of one run are: products bit for bit, metrics, verdicts, and how far apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from latentforge.evidence.digests import file_sha256, tree_files
from latentforge.evidence.reading import RunRecord
from latentforge.evidence.tensors import tensor_digests

WEIGHTS = ".safetensors"
ROWS = ".bin"


@dataclass(frozen=True)
class Likeness:
    """What was compared: ``compared`` tensors and shards of rows, of which ``different`` (by name) have other bytes.

    ``distance`` is the largest ``|a - b| / |a|`` (fp64) of a tensor and ``furthest`` names it: 0 where they are
    bit-equal, infinite where something has no counterpart of its shape and type, or other rows. ``values`` counts the
    values of metrics that were compared; ``metrics`` is the largest relative difference of one, infinite where one is
    missing or only one of both is a number, and ``metric`` says of which. ``turned`` are the verdicts and the exit code
    that are not those of the first execution, a sentence each, of ``verdicts`` that were compared.
    """

    compared: int
    different: tuple[str, ...]
    distance: float
    furthest: str | None
    values: int
    metrics: float
    metric: str | None
    verdicts: int
    turned: tuple[str, ...]

    @property
    def bit_equal(self) -> bool:
        """Whether every tensor and every row has the same bytes."""
        return not self.different

    @property
    def same(self) -> bool:
        """Whether bytes, metrics, verdicts and exit code are all those of the first execution."""
        return self.bit_equal and self.metrics == 0 and not self.turned

    def within(self, tolerance: float) -> bool:
        """Whether weights and metrics are no further apart than ``tolerance``, and no verdict is another."""
        return self.distance <= tolerance and self.metrics <= tolerance and not self.turned


def products(folder: Path) -> dict[str, Path]:
    """The weights and packed rows below ``out/`` of a run's folder by their names in it.

    Checkpoints stay on their host; what they lead to is what is compared. RefusedError for what is no regular file.
    """
    found = tree_files(folder / "out") if (folder / "out").is_dir() else ()
    kept = {f"out/{name}": path for name, path in found if not name.startswith("checkpoints/")}
    return {name: path for name, path in kept.items() if name.endswith((WEIGHTS, ROWS))}


def compare_executions(before: RunRecord, after: RunRecord) -> Likeness:
    """Compare the weights and packed rows below ``out/`` of two executions, their metrics, verdicts and exit codes."""
    first, second = products(before.folder), products(after.folder)
    compared, apart = 0, dict[str, float]()
    for name in sorted({*first, *second}):
        here, there = first.get(name), second.get(name)
        if here is None or there is None:
            compared += 1
            apart[f"{name} (only in one of them)"] = math.inf
        elif name.endswith(ROWS):
            compared += 1
            if file_sha256(here) != file_sha256(there):
                apart[name] = math.inf
        else:
            tensors, unlike = _weights(name, here, there)
            compared, apart = compared + tensors, apart | unlike
    furthest = max(apart, key=lambda name: apart[name], default=None)
    distance = 0.0 if furthest is None else apart[furthest]
    values, metrics, metric = _metrics(before, after)
    verdicts, turned = _verdicts(before, after)
    return Likeness(compared, tuple(apart), distance, furthest, values, metrics, metric, verdicts, turned)


def _weights(name: str, here: Path, there: Path) -> tuple[int, dict[str, float]]:
    """Of two weights files: how many tensors there are, and the distance of each that differs."""
    first, second = tensor_digests(here), tensor_digests(there)
    if first is None or second is None:
        return 1, {f"{name} (no weights file)": math.inf}
    unlike = sorted(one for one in {*first, *second} if first.get(one) != second.get(one))
    return len({*first, *second}), {
        f"{name} {tensor}": _distance(here, there, tensor)
        if _kind(first.get(tensor)) == _kind(second.get(tensor))
        else math.inf
        for tensor in unlike
    }


def _kind(tensor: dict[str, Any] | None) -> tuple[Any, ...]:
    return () if tensor is None else (tensor["dtype"], *tensor["shape"])


def _distance(here: Path, there: Path, tensor: str) -> float:
    """``|a - b| / |a|`` of a tensor; infinite where that is no number, or torch reads none in it."""
    try:
        a, b = _read(here, tensor), _read(there, tensor)
    except (SafetensorError, RuntimeError):
        return math.inf
    length = float(a.norm())
    found = float((a - b).norm()) / length if length else math.inf
    return found if math.isfinite(found) else math.inf


def _read(path: Path, tensor: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        read: torch.Tensor = file.get_tensor(tensor).to(torch.float64)
    return read


def _metrics(before: RunRecord, after: RunRecord) -> tuple[int, float, str | None]:
    """How many values there are, the largest relative difference of one, and of which.

    A value has the place that it has among its metric's: the same step, and of the saved weights their own.
    NaN that both recorded there is the same.
    """
    sides = []
    for record in (before, after):
        found: dict[tuple[Any, ...], float] = {}
        for one in record.metrics:
            counted: dict[int, int] = {}
            if one.kept is not None and one.kept != (one.steps[-1], one.values[-1]):
                found[one.model, one.name, one.split, one.kept[0], "kept"] = one.kept[1]
            for step, value in zip(one.steps, one.values, strict=True):
                counted[step] = counted.get(step, -1) + 1  # one step may have several: a value for each level of noise
                found[one.model, one.name, one.split, step, counted[step]] = value
        sides.append(found)
    worst: tuple[float, str | None] = (0.0, None)
    places = sorted({*sides[0], *sides[1]}, key=str)
    for place in places:
        apart = _apart(sides[0].get(place), sides[1].get(place))
        if apart > worst[0]:
            *names, step, _ = place
            worst = (apart, " ".join([*(str(part) for part in names if part is not None), f"at step {step}"]))
    return len(places), *worst


def _apart(a: float | None, b: float | None) -> float:
    if a is None or b is None or math.isnan(a) != math.isnan(b):
        return math.inf
    if a == b or math.isnan(a):
        return 0.0
    apart = abs(a - b) / max(abs(a), abs(b))
    return apart if math.isfinite(apart) else math.inf


def _verdicts(before: RunRecord, after: RunRecord) -> tuple[int, tuple[str, ...]]:
    """How many verdicts there are, and which of them, or of the exit codes, are not the same in both."""
    first, second = ({one.falsifier: one.outcome.name.lower() for one in record.verdicts} for record in (before, after))
    names = sorted({*first, *second})
    said = [(name, first.get(name, "none"), second.get(name, "none")) for name in names]
    said.append(("exit code", str(before.end["code"]), str(after.end["code"])))
    return len(names), tuple(f"{name}: {then} then, {now} now" for name, then, now in said if then != now)
