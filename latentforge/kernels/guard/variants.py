"""What is proven one by one: each kernel by operator, precision, kind of targets, direction and backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from latentforge.errors import RefusedError

Option = tuple[str, str | int | float | bool]

DTYPES = ("bf16", "fp32")
RUNGS = ("cuda", "cuda:alternate", "triton", "cpu", "reference")
"""The fallback ladder, best first: our kernel, another configuration of it, Triton, (on CPU tensors) C++, torch."""


@dataclass(frozen=True)
class Variant:
    """One kernel as it is proven.

    ``entry`` is ``module:function`` with the signature of the backend interface; ``compile`` a function that compiles
    it without a launch (Triton), or None; ``device`` what its tensors are on; ``deterministic`` whether equal calls
    must give equal bits; ``targets`` is the kind of the teacher's targets, for ``latent_decode`` that of the weight;
    ``candidates`` are configurations to choose from, frozen into the record.
    """

    op: Literal["kd_loss", "linear_kd_loss", "latent_decode", "composite"]
    dtype: Literal["bf16", "fp32"]
    rung: str
    entry: str
    targets: Literal["dense", "topk", "float", "int8", "none"] = "dense"
    direction: str = "forward"
    device: Literal["cuda", "cpu"] = "cuda"
    shapes: tuple[tuple[int, ...], ...] = ()
    options: tuple[Option, ...] = ()
    compile: str | None = None
    deterministic: bool = True
    candidates: tuple[tuple[Option, ...], ...] = ()

    @property
    def backend(self) -> str:
        """The backend's name, as the public functions take it."""
        return self.rung.partition(":")[0]

    @property
    def name(self) -> str:
        """Short and unique: ``cuda/kd_loss.bf16.dense.forward`` (on the CPU: ``cpu/…``, ``reference@cpu/…``)."""
        what: dict[str, tuple[str, ...]] = {
            "kd_loss": (self.targets, self.direction),
            "linear_kd_loss": (self.targets,),
            "latent_decode": (self.targets,),
        }
        where = f"{self.rung}@cpu" if self.device == "cpu" and self.rung != "cpu" else self.rung
        return f"{where}/" + ".".join((self.op, self.dtype, *what.get(self.op, ())))

    def as_json(self) -> dict[str, Any]:
        """All fields, for the child."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Variant:
        """The variant that :meth:`as_json` wrote."""
        known = dict(value)
        known["shapes"] = tuple(tuple(shape) for shape in known["shapes"])
        known["options"] = tuple((name, setting) for name, setting in known["options"])
        known["candidates"] = tuple(tuple((n, s) for n, s in one) for one in known["candidates"])
        return cls(**known)


def select(only: Sequence[str], variants: Iterable[Variant]) -> list[Variant]:
    """The variants whose name, operator, backend or precision is one of ``only`` (all where it is empty).

    RefusedError where a word selects nothing.
    """
    known = list(variants)
    chosen: set[str] = set()
    for word in only:
        found = {v.name for v in known if word in (v.name, v.op, v.backend, v.rung, v.dtype)}
        if not found:
            names = ", ".join(dict.fromkeys(v.op for v in known)) or "nothing"
            raise RefusedError(f"no variant is called {word!r}; operators here: {names}", next="leave out --only")
        chosen |= found
    return [v for v in known if not only or v.name in chosen]
