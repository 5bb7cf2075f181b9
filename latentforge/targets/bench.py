"""The figures of the store on a teacher's rows: bytes a token, tokens a second, what rounding does to a gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentforge.kernels.fixtures import gradient_of
from latentforge.kernels.targets import TopKTargets
from latentforge.targets import native, packing
from latentforge.targets.levels import GradedLevels
from latentforge.targets.row import GRADED, SequenceTargets, pack_row, unpack_row
from latentforge.targets.store import TargetStore
from latentforge.targets.topk import sequence_rows, topk_rows

DISTANCES = (0.1, 0.3, 1.0)
"""Standard deviations of the noise, in nats, by which the measured students differ from the teacher."""

Rows = Sequence[tuple[npt.NDArray[np.int64], SequenceTargets]]
_KEY = b"\0" * 32


@dataclass(frozen=True)
class Figures:
    """What a store of these rows costs. Bytes are a token's; seconds are this process's processor time, one thread.

    ``file_bytes`` counts the closed file, ``packed_bytes`` the rows' values, ``streams`` their parts. ``read_tokens``
    and ``write_tokens`` are a second; a reading gives ids and log-probabilities in memory. ``different_ids`` is the
    mean number of different ids in a sequence, ``tail_mass`` the mean mass outside the top-k at T = 1.
    """

    tokens: int
    sequence_length: int
    k: int
    temperatures: tuple[float, ...]
    file_bytes: float
    packed_bytes: float
    streams: dict[str, float]
    write_tokens: float
    read_tokens: float
    read_tokens_numpy: float
    reader: str
    different_ids: float
    tail_mass: float

    def as_json(self) -> dict[str, Any]:
        """The same as JSON-able data."""
        return asdict(self)


def measure(rows: Rows, folder: Path, *, vocab_size: int, repeats: int = 200) -> Figures:
    """Write the rows to a store in ``folder``, read them back ``repeats`` times, and count.

    The fastest reading is the figure: what a busy machine adds to one is no part of it.
    """
    first = rows[0][1]
    temperatures = tuple(first.tails)
    tokens = sum(len(targets.ids) for _, targets in rows)
    path = folder / "bench.sqlite"
    path.unlink(missing_ok=True)
    store = TargetStore.create(path, {"model": "bench"}, first.ids.shape[1], temperatures, vocab_size=vocab_size)
    began = time.process_time()
    for at in range(0, len(rows), 64):
        store.put_many(rows[at : at + 64])
    store.close()
    written = time.process_time() - began
    keys = np.stack([sequence for sequence, _ in rows])

    def read() -> None:
        for at in range(0, len(keys), 64):
            opened.get_many(keys[at : at + 64])

    def in_numpy() -> None:
        for value in values:
            unpack_row(_KEY, value, temperatures=temperatures, reader=packing.unpack)

    values = [pack_row(_KEY, targets) for _, targets in rows[: max(1, len(rows) // 8)]]
    some = sum(len(targets.ids) for _, targets in rows[: len(values)])
    # No row is kept in memory: each is read from the file and unpacked.
    with TargetStore.open(path, cache_bytes=0) as opened:
        seconds = _least(read, repeats)
    return Figures(
        tokens=tokens,
        sequence_length=len(rows[0][0]),
        k=store.k,
        temperatures=temperatures,
        file_bytes=path.stat().st_size / tokens,
        packed_bytes=sum(len(pack_row(_KEY, targets)) for _, targets in rows) / tokens,
        streams=_streams(rows, tokens),
        write_tokens=tokens / written,
        read_tokens=tokens / seconds,
        read_tokens_numpy=some / _least(in_numpy, 1),
        reader=native.name(),
        different_ids=float(np.mean([len(np.unique(targets.ids)) for _, targets in rows])),
        tail_mass=float(np.mean([np.exp(targets.tails[1.0]).mean() for _, targets in rows])),
    )


def gradient_error(
    logits: Tensor, *, k: int, temperature: float, distance: float, levels: GradedLevels = GRADED, seed: int = 0
) -> float:
    """|gradient from stored rows - gradient from the rows as given| / |the latter|, over the student's logits.

    ``logits`` [N, V] are the teacher's; the student's are the same with normal noise of ``distance`` nats added. The
    gradient is that of the KD term alone, computed by the reference backend in fp64.
    """
    (row,) = sequence_rows(*topk_rows(logits, k, [temperature]), sequences=1)
    stored = unpack_row(_KEY, pack_row(_KEY, row, levels=levels), temperatures=(temperature,))
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    student = logits.double() + distance * noise
    labels = torch.zeros(len(logits), dtype=torch.int64)

    def gradient(targets: SequenceTargets) -> Tensor:
        tail = torch.from_numpy(targets.tails[temperature])
        given = TopKTargets(torch.from_numpy(targets.ids), torch.from_numpy(targets.logprobs), tail)
        return gradient_of(
            student,
            given,
            labels,
            temperature=temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            denominator=float(len(logits)),
            backend="reference",
        )

    exact = gradient(row)
    return float((gradient(stored) - exact).norm() / exact.norm())


def _streams(rows: Rows, tokens: int) -> dict[str, float]:
    """Bytes a token of each part of the rows: the tokens of each stream after zstd, the bits, head and checksum."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=3, write_content_size=False, write_checksum=False)
    sizes = dict.fromkeys(("scalars", "gaps", "places", "falls", "bits"), 0)
    whole = 0
    for _, targets in rows:
        _, streams, bits = packing.pack(targets.ids, targets.logprobs, targets.tails, GRADED)
        for name, stream in zip(sizes, streams, strict=False):
            sizes[name] += len(compressor.compress(stream.tobytes()))
        sizes["bits"] += len(bits)
        whole += len(pack_row(_KEY, targets))
    parts = {name: size / tokens for name, size in sizes.items()}
    return {**parts, "head": whole / tokens - sum(parts.values())}


def _least(work: Callable[[], None], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)
