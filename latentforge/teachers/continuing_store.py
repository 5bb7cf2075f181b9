"""A teacher's continuations of the rows of a data run, written to a store as they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from latentforge.data.shards import ShardSet
from latentforge.errors import RefusedError
from latentforge.targets.continuations import ContinuationStore
from latentforge.targets.continued import Ids
from latentforge.targets.store import Coverage
from latentforge.teachers.continuing import Continuer, Continuing
from latentforge.teachers.continuing_agreement import check_draws
from latentforge.teachers.protocol import Tokens

_LOOKED_AT = 1024
Progress = Callable[[int, int], None]


def check_rows(data: ShardSet, rows: int | None) -> None:
    """Refuse to continue more training rows than ``data`` has."""
    if rows is not None and rows > len(data.train):
        raise RefusedError(
            f"continuations.rows = {rows}: there are {len(data.train)} training rows",
            next=f"set continuations.rows = {len(data.train)} or less, or leave it out",
        )


def continued_rows(data: ShardSet, rows: int | None, *, block: int = _LOOKED_AT) -> Iterator[list[Tokens]]:
    """The first ``rows`` training rows (None: all), then all held-out rows, int64 [L] each, ``block`` at a time."""
    check_rows(data, rows)
    for shard, end in ((data.train, len(data.train) if rows is None else rows), (data.heldout, len(data.heldout))):
        for begin in range(0, end, block):
            yield list(shard.rows(np.arange(begin, min(begin + block, end))))


def coverage(store: ContinuationStore, data: ShardSet, rows: int | None) -> Coverage:
    """How many of the rows that are to be continued have a row in the store."""
    return store.coverage(store.key(tokens) for block in continued_rows(data, rows) for tokens in block)


def continue_all(
    teacher: Continuer,
    data: ShardSet,
    store: ContinuationStore,
    asked: Continuing,
    *,
    rows: int | None = None,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> int:
    """Draw what the store lacks; returns how many rows are new. Stopped anywhere, it resumes.

    Each row is stored as soon as it is drawn, so whoever kills this loses what was being drawn and nothing else.
    ``batch_size`` rows are handed to the teacher at a time. The first that it draws is compared before it is stored
    (:func:`check_draws`): nothing more is paid for where it fails. TeacherFailure leaves everything stored that was
    answered.
    """
    total = (len(data.train) if rows is None else rows) + len(data.heldout)
    done = new = 0
    for block in continued_rows(data, rows):
        found = {store.key(tokens): tokens for tokens in block}
        present = store.present(found)
        # One of equal rows is enough.
        wanted = [tokens for key, tokens in found.items() if key not in present]
        done += len(block) - len(wanted)
        progress(done, total)
        for at in range(0, len(wanted), batch_size):
            batch = wanted[at : at + batch_size]
            for number, drawn in teacher.continuations(batch, asked):
                if not new:
                    check_draws(teacher, [(batch[number], drawn)], asked)
                new += store.put(batch[number], drawn)
                done += 1
                progress(done, total)
    return new


def sampled(
    store: ContinuationStore, data: ShardSet, rows: int | None, *, sample: int
) -> Iterator[tuple[Tokens, dict[float, Ids]]]:
    """About ``sample`` rows of the store, spread evenly over all that are continued, with what was drawn for them."""
    total = sum(len(block) for block in continued_rows(data, rows))
    wanted = {int(at) for at in np.linspace(0, total - 1, num=min(sample, total))}
    seen = 0
    for block in continued_rows(data, rows):
        for number in sorted(at - seen for at in wanted if seen <= at < seen + len(block)):
            yield block[number], store.get(block[number])
        seen += len(block)
