"""A teacher behind a store: what is stored is not asked again, what is asked is stored at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.targets import TopKTargets
from latentforge.targets.description import Rounding
from latentforge.targets.making import ExistsError
from latentforge.targets.row import SequenceTargets
from latentforge.targets.store import MissingError, TargetStore
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.flow import FlowControl, flow_of
from latentforge.teachers.protocol import (
    Capability,
    Limits,
    Scorer,
    TeacherIdentity,
    Tokens,
)
from latentforge.teachers.store import StoreTeacher, scored_batch

_ANOTHER = "name another file in teacher.cache"


class CachedTeacher:
    """``store`` first, ``teacher`` for what it lacks; an answer is written before it is given (not where read-only).

    While everything is stored, the teacher is never asked, not even what it can do: a teacher that is gone is then no
    obstacle. Where it fails, the stored rows have been given, and the failure follows.
    """

    def __init__(self, store: TargetStore, teacher: Scorer) -> None:
        if store.identity != teacher.identity.as_json():
            raise RefusedError(
                f"{store.path} was filled by another teacher ({store.identity.get('model')}, "
                f"{str(store.identity.get('sha256'))[:12]}…)",
                next=_ANOTHER,
            )
        self.store = store
        self.teacher = teacher
        self._stored = StoreTeacher(store)
        self._from_store = self._asked = 0
        self._closed = False

    @classmethod
    def open(
        cls,
        path: Path,
        teacher: Scorer,
        *,
        k: int,
        temperatures: tuple[float, ...],
        readonly: bool = False,
        rounding: Rounding | None = None,
    ) -> CachedTeacher:
        """The store at ``path``, made where there is none; ``readonly`` writes nothing and needs one that exists.

        One that exists must hold the top-k rows of this teacher, at least ``k`` entries wide, for ``temperatures``;
        ``rounding`` must be its own, where None takes any, and makes one that rounds.
        """
        identity, path = teacher.identity.as_json(), Path(path)
        if not path.is_file() and (readonly or path.exists()):
            why = "it is no file" if path.exists() else "there is no such store, and one that is only read is not made"
            raise RefusedError(
                f"teacher.cache = {path}: {why}",
                next=f"fill it by a run without --kd-cache-ro (teacher.cache_readonly), or {_ANOTHER}",
            )
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RefusedError(
                    f"teacher.cache = {path}: its folder cannot be made: {error.strerror}", next=_ANOTHER
                ) from None
            with suppress(ExistsError):  # another run has just made it: it is theirs and ours
                made = TargetStore.create(
                    path, identity, k, temperatures, vocab_size=teacher.vocab_size, rounding=rounding or "fine"
                )
                return cls(made, teacher)
        # Drawn rows are no top-k rows, also where they are as wide.
        store = TargetStore.open(
            path, readonly=readonly, identity=identity, mode="topk", rounding=rounding, instead=_ANOTHER
        )
        try:
            _require_room(store, k, temperatures)
            return cls(store, teacher)
        except BaseException:
            store.close()
            raise

    @property
    def asked(self) -> int:
        """How many sequences the teacher has been asked for."""
        return self._asked

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Scores; whatever else the teacher can do does not pass through the store."""
        return frozenset({"score"})

    @property
    def identity(self) -> TeacherIdentity:
        """The teacher's."""
        return self.teacher.identity

    @property
    def vocab_size(self) -> int:
        """The teacher's."""
        return self.teacher.vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """The teacher's, and where its answers are kept."""
        kept = "is read, nothing is written" if self.store.readonly else "keeps every answer"
        return (*self.teacher.notes, f"{self.store.path.name} {kept}")

    @property
    def limits(self) -> Limits:
        """The store's entries and temperatures; the teacher's own bounds show when it is asked."""
        return Limits(self.store.k, None, self.store.temperatures)

    @property
    def flow(self) -> FlowControl | None:
        """The gate before the teacher, where it is a remote one."""
        return flow_of(self.teacher)

    def metrics(self) -> dict[str, Any]:
        """The teacher's, where it counts, with how many sequences came from the store."""
        inner = getattr(self.teacher, "metrics", None)
        total = self._from_store + self._asked
        return {
            **(inner() if inner is not None else {}),
            "hit_rate": self._from_store / total if total else 0.0,
            "rows_from_store": self._from_store,
        }

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Stored sequences first, then the others as the teacher answers; equal sequences are asked once."""
        keys = [self.store.key(tokens) for tokens in sequences]
        present = self.store.present(keys)
        stored, missing = 0, dict[bytes, list[int]]()
        for number, key in enumerate(keys):
            targets = self._kept(sequences[number]) if key in present else None
            if targets is None:
                missing.setdefault(key, []).append(number)
                continue
            stored += 1
            self._from_store += 1
            yield number, self._stored.narrowed(targets, k=k, temperatures=temperatures)
        if not missing:
            return
        wanted = [sequences[numbers[0]] for numbers in missing.values()]
        places = list(missing.values())
        self._asked += len(wanted)
        self._from_store += sum(map(len, places)) - len(places)
        # Whole rows are asked and stored, whatever k this caller wants of them.
        try:
            for at, targets in self.teacher.score(wanted, k=self.store.k, temperatures=self.store.temperatures):
                if not self.store.readonly:
                    # Given as it will be read again: a run that resumes from here sees the same bits.
                    self.store.put_many([(wanted[at], targets)])
                    targets = self._kept(wanted[at]) or targets
                for number in places[at]:
                    yield number, self._stored.narrowed(targets, k=k, temperatures=temperatures)
        except TeacherFailure as failure:
            failure.add_note(f"{stored} of {len(keys)} sequences were given from {self.store.path.name}")
            raise

    def _kept(self, tokens: Tokens) -> SequenceTargets | None:
        """The stored row; None where it is not there any more: too old by now, or another run's took its room."""
        try:
            return self.store.get(tokens)
        except MissingError:
            return None

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> TopKTargets:
        """Top-k rows of ``tokens`` int64 ``[B, L]``, on the device of ``tokens``."""
        return scored_batch(self, tokens, temperature=temperature, k=self.store.k if k is None else k)

    def close(self) -> None:
        """Close the store and the teacher."""
        if not self._closed:
            self._closed = True
            self.store.close()
            self.teacher.close()


def _require_room(store: TargetStore, k: int, temperatures: tuple[float, ...]) -> None:
    """Refuse a cache whose rows are narrower than those that are asked, or lack a temperature."""
    if k > store.k:
        raise RefusedError(
            f"teacher.cache = {store.path} holds {store.k} entries a row, and score.k = {k}",
            next=f"set score.k = {store.k} or less, or {_ANOTHER}",
        )
    lacking = [t for t in temperatures if t not in store.temperatures]
    if lacking:
        held = ", ".join(f"{t:g}" for t in store.temperatures)
        raise RefusedError(
            f"teacher.cache = {store.path} holds tails for T = {held}, and none for T = {lacking[0]:g}", next=_ANOTHER
        )
