"""What a store was made for: the teacher and the parameters that its keys stand on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from latentforge.errors import RefusedError
from latentforge.targets.connection import Connection
from latentforge.targets.levels import CountLevels

SCHEMA = 2
"""1 held LFT1 rows and had no limits; it is read."""

Mode = Literal["topk", "sample"]
Rounding = Literal["fine", "none"]
"""``fine``: in steps (see ``levels``); ``none``: float32 as given."""


@dataclass(frozen=True)
class Description:
    """Teacher identity, k, temperatures, vocabulary size, mode, draws, seed, rounding: another value, another key."""

    schema: int
    identity: Mapping[str, Any]
    k: int
    temperatures: tuple[float, ...]
    vocab_size: int
    mode: Mode = "topk"
    draws: int | None = None
    seed: int | None = None
    rounding: Rounding = "fine"

    @classmethod
    def checked(
        cls,
        *,
        identity: Mapping[str, Any],
        k: int,
        temperatures: Sequence[float],
        vocab_size: int,
        mode: Mode,
        draws: int | None,
        seed: int | None,
        rounding: Rounding = "fine",
    ) -> Description:
        """A description of a new store; refused where no rows can be of it."""
        if not 1 <= k <= vocab_size:
            raise RefusedError(f"k = {k} does not fit a vocabulary of {vocab_size} tokens", next="lower score.k")
        values = tuple(float(t) for t in temperatures)
        if not values or len(set(values)) != len(values) or not all(0 < t < float("inf") for t in values):
            raise RefusedError(f"temperatures {list(temperatures)} are not distinct finite values above 0")
        if mode not in ("topk", "sample"):
            raise RefusedError(f"mode {mode!r} is neither 'topk' nor 'sample'")
        if rounding not in ("fine", "none"):
            raise RefusedError(f"rounding {rounding!r} is neither 'fine' nor 'none'")
        if mode == "topk" and (draws, seed) != (None, None):
            raise RefusedError(f"draws = {draws}, seed = {seed}: top-k rows are not drawn", next="set mode = 'sample'")
        if mode == "sample":
            if draws is None or seed is None:
                raise RefusedError(f"draws = {draws}, seed = {seed}: sampled rows need both")
            CountLevels(draws)
            if values != (1.0,):
                raise RefusedError(f"temperatures {list(values)}: tokens are drawn at T = 1")
        made = cls(SCHEMA, dict(identity), k, values, vocab_size, mode, draws, seed, rounding)
        try:
            _ = made.canonical
        except (TypeError, ValueError) as error:
            raise RefusedError(f"the teacher's identity is not JSON ({error})") from None
        return made

    @classmethod
    def read(cls, path: Path, connection: Connection) -> Description:
        """What the store's own table says."""
        rows = connection.query("SELECT value FROM meta")
        try:
            meta = json.loads(rows[0][0])
            if "kind" in meta:
                raise RefusedError(f"{path} is a store of {meta['kind']}, not of targets", next="name a score run's")
            if meta["schema"] not in (1, SCHEMA):
                raise ValueError(f"schema {meta['schema']!r}")
            if meta.get("rounding", "fine") not in ("fine", "none"):
                raise ValueError(f"rounding {meta['rounding']!r}")
            values = {**meta, "temperatures": tuple(float(t) for t in meta["temperatures"])}
            return cls(**values)
        except (IndexError, ValueError, KeyError, TypeError) as error:
            raise RefusedError(
                f"{path} does not say what it was made for ({type(error).__name__}: {error}; schemas 1 and {SCHEMA} "
                "are read here)",
                next="score again from the start",
            ) from None

    @property
    def canonical(self) -> bytes:
        """JSON whose sha256 begins every key; of schema 1 with the fields that it had."""
        value = {
            "schema": self.schema,
            "identity": dict(self.identity),
            "k": self.k,
            "temperatures": list(self.temperatures),
            "vocab_size": self.vocab_size,
        }
        if self.schema > 1:
            value |= {"mode": self.mode, "draws": self.draws, "seed": self.seed}
        if self.rounding != "fine":  # which all stores were before there was a choice: their keys stay
            value |= {"rounding": self.rounding}
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def require(self, path: Path, instead: str, **asked: Any) -> None:
        """Refuse where one of the values that are asked (None: not asked) is not the store's; ``instead`` is the next
        thing to do.
        """
        require(self, path, instead, **asked)


def require(description: object, path: Path, instead: str, **asked: Any) -> None:
    """Refuse where one of the values that are asked (None: not asked) is not what a store was made for."""
    for name, wanted in asked.items():
        if wanted is None:
            continue
        have = getattr(description, name)
        if name == "temperatures":
            have, wanted = list(have), [float(t) for t in wanted]
        elif name == "identity":
            have, wanted = dict(have), dict(cast(Mapping[str, Any], wanted))
        if have == wanted:
            continue
        if name == "identity":
            field = next(n for n in sorted({*have, *wanted}) if have.get(n) != wanted.get(n))
            name, have, wanted = f"teacher {field}", have.get(field), wanted.get(field)
        raise RefusedError(f"{path} was made for {name} {have!r}, not for {wanted!r}", next=instead)
