"""One sequence's teacher targets, and the bytes that keep them (LFT2): quantised, packed, compressed, checked."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from latentforge.errors import RefusedError
from latentforge.targets import exact, packing, row_lft1, sealing
from latentforge.targets.exact import ExactLevels
from latentforge.targets.levels import CountLevels, GradedLevels, Levels

MAGIC = b"LFT2"
GRADED = GradedLevels(finest=1.0 / 768.0, coarsest=1.0 / 16.0)
"""How log-probabilities of top-k rows are rounded unless a store was made with other steps."""

# magic, levels (0 graded, 1 counts, 2 not rounded), mixed, temperatures, positions, k, entries, unique ids, two
# parameters of the levels, bytes of the four compressed streams
_HEAD = struct.Struct("<4sBBHIIIIddIIII")
_MASS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SequenceTargets:
    """A teacher's rows for one sequence of L tokens: row ``i`` predicts token ``i + 1``.

    ``ids`` int32 and ``logprobs`` float32 (natural log, T = 1, descending) have shape ``[L-1, k]``; ``tails`` maps each
    stored temperature T to float32 ``[L-1]``, the log of Σ exp(logp / T) over the tokens outside. An *absent* entry
    has id -1 and logprob minus infinity and stands at the end of its row: its token is not known and counts to the
    outside. In sampled rows ids are the distinct tokens drawn, logprobs log(count / draws), tails minus infinity.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    tails: dict[float, npt.NDArray[np.float32]]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.ids.nbytes + self.logprobs.nbytes + sum(tail.nbytes for tail in self.tails.values())

    def tail_mass(self) -> dict[float, float]:
        """The teacher's mean probability mass outside the entries, by temperature; not a number without positions."""
        if not len(self.ids):  # one token predicts nothing: a mean of nothing
            return dict.fromkeys(self.tails, float("nan"))
        return {t: float(np.mean(_outside(self.logprobs, tail, t))) for t, tail in self.tails.items()}


def check_targets(targets: SequenceTargets, *, k: int, temperatures: tuple[float, ...], vocab_size: int) -> None:
    """Refuse rows that cannot be what a teacher said: wrong shape, ids or order, not-a-number, mass other than 1."""
    shape = targets.ids.shape
    if len(shape) != 2 or shape[1] != k or targets.logprobs.shape != shape:
        raise RefusedError(f"targets have shapes ids {shape}, logprobs {targets.logprobs.shape}; [L-1, {k}] was asked")
    if tuple(targets.tails) != temperatures or any(tail.shape != shape[:1] for tail in targets.tails.values()):
        raise RefusedError(f"targets have tails for T = {list(targets.tails)}; {list(temperatures)} was asked")
    if shape[0] == 0:
        return
    absent = targets.ids == -1
    if not np.array_equal(absent, np.isneginf(targets.logprobs)) or (absent[:, :-1] & ~absent[:, 1:]).any():
        raise RefusedError("absent entries (id -1, logprob minus infinity) do not stand at the end of their rows")
    there = targets.ids[~absent]
    if there.size and (there.min() < 0 or there.max() >= vocab_size):
        raise RefusedError(f"target ids {there.min()}..{there.max()} are outside the vocabulary of {vocab_size}")
    if not np.isfinite(targets.logprobs[~absent]).all() or any(
        (~np.isfinite(tail) & ~np.isneginf(tail)).any() for tail in targets.tails.values()
    ):
        raise RefusedError("the teacher answered with values that are not finite", next="check the teacher's weights")
    if (targets.logprobs[:, 1:] > targets.logprobs[:, :-1]).any():
        raise RefusedError("target logprobs are not in descending order")
    ordered = np.sort(targets.ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise RefusedError("a row of targets names one token twice")
    if 1.0 in targets.tails:
        mass = np.exp(targets.logprobs.astype(np.float64)).sum(axis=1) + np.exp(targets.tails[1.0].astype(np.float64))
        worst = float(np.abs(mass - 1.0).max())
        if worst > _MASS_TOLERANCE:
            raise RefusedError(f"the teacher's probabilities and tail do not sum to 1 (off by {worst:.3g})")


def pack_row(key: bytes, targets: SequenceTargets, *, levels: Levels | ExactLevels = GRADED) -> bytes:
    """The bytes of a row: head, checksum, body. The checksum covers the key: a moved row is refused."""
    if isinstance(levels, ExactLevels):
        shape, streams, bits = exact.pack(targets.ids, targets.logprobs, targets.tails)
    else:
        shape, streams, bits = packing.pack(targets.ids, targets.logprobs, targets.tails, levels)
    compressor = sealing.compressor()
    frames = [compressor.compress(stream.tobytes()) for stream in streams]
    kind, parameters = 0, (0.0, 0.0)
    if isinstance(levels, ExactLevels):
        kind = 2
    elif isinstance(levels, CountLevels):
        kind, parameters = 1, (float(levels.draws), 0.0)
    else:
        parameters = (levels.finest, levels.coarsest)
    head = _HEAD.pack(
        MAGIC,
        kind,
        shape.mixed,
        len(shape.temperatures),
        shape.positions,
        shape.k,
        shape.entries,
        shape.unique,
        *parameters,
        *(len(frame) for frame in frames),
    )
    body = b"".join([*frames, bits.tobytes()])
    return head + sealing.checksum(key, head, body) + body


def unpack_row(
    key: bytes, value: bytes, *, temperatures: tuple[float, ...], reader: packing.Reader = packing.unpack
) -> SequenceTargets:
    """Read a row back; RefusedError where a single bit is not what was written under this key."""
    if value[:4] == row_lft1.MAGIC:
        parts = row_lft1.unpack(key, value)
        if parts is None or len(parts[2]) != len(temperatures):
            raise _damaged(key)
        return SequenceTargets(parts[0], parts[1], dict(zip(temperatures, parts[2], strict=True)))
    begin = _HEAD.size + sealing.CHECK_BYTES
    head, body = value[: _HEAD.size], memoryview(value)[begin:]
    if len(value) < begin or value[_HEAD.size : begin] != sealing.checksum(key, head, body):
        raise _damaged(key)
    magic, kind, mixed, n_temperatures, positions, k, entries, unique, first, second, *sizes = _HEAD.unpack(head)
    if magic != MAGIC or kind > 2 or n_temperatures != len(temperatures):
        raise RefusedError(f"row {key.hex()[:12]}… is of another format ({magic!r}, {n_temperatures} temperatures)")
    shape = packing.Shape(positions, k, entries, unique, bool(mixed), temperatures)
    decompressor = sealing.decompressor()
    streams, at = [], 0
    try:
        for size, length in zip(sizes, exact.lengths(shape) if kind == 2 else shape.lengths, strict=True):
            streams.append(decompressor.decompress(body[at : at + size], max_output_size=length) if length else b"")
            at += size
        bits = body[at:]
        if kind == 2:
            ids, logprobs, tails = exact.unpack(shape, streams, bits)
        else:
            ids, logprobs, tails = reader(shape, streams, bits, _levels(kind, first, second))
    except (ValueError, IndexError, zstandard.ZstdError) as error:
        # Its checksum is right: whoever wrote it wrote something else than this format.
        raise RefusedError(f"row {key.hex()[:12]}… contradicts itself ({error})", next="score again") from None
    return SequenceTargets(ids, logprobs, dict(zip(temperatures, tails, strict=True)))


_LADDERS: dict[tuple[int, float, float], Levels] = {}


def _levels(kind: int, first: float, second: float) -> Levels:
    # Kept: a ladder's table costs more than a row.
    if (kind, first, second) not in _LADDERS:
        _LADDERS[kind, first, second] = CountLevels(int(first)) if kind else GradedLevels(first, second)
    return _LADDERS[kind, first, second]


def _damaged(key: bytes) -> RefusedError:
    again = "latentforge targets check STORE --drop, then score again: only what is missing is asked"
    return sealing.damaged(key, "targets", again)


def _outside(logprobs: npt.NDArray[Any], tail: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
    outside = np.exp(tail.astype(np.float64))
    inside = np.exp(logprobs.astype(np.float64) / temperature).sum(axis=1)
    return np.asarray(outside / (inside + outside))
