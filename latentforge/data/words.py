"""The ids of words, remembered: the vocabulary's model is asked once a word, and most words of a text come again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tokenizers

Places = npt.NDArray[np.int64]

_SLOTS_BITS = 19
_WORDS = 1 << 18
"""So many words are remembered; then all are forgotten, so that memory has a bound."""

# A word of up to 15 bytes is its two numbers: its first eight bytes; the others and, on top, how many it has.
_SHORT = 15
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(8)] + [(1 << 64) - 1], dtype=np.uint64)
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0xD6E8FEB86659FD93))
PADDING = bytes(16)
"""What must follow a text's bytes in memory."""


def _byte_characters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()
"""How byte-level vocabularies write bytes: printable ones as themselves, the others by characters from U+0100."""


class Words:
    """Ids of words by their bytes, as the library's model gives them; ``fixed`` are ids that no word stands for."""

    def __init__(self, model: tokenizers.models.Model, fixed: Sequence[int]) -> None:
        self._model = model
        self._fixed = fixed
        self._forget()

    def _forget(self) -> None:
        self._entries: dict[bytes, int] = {}
        # Entry 0 has no ids; each fixed id has an entry of its own after it.
        self._ids = np.zeros(1 << 12, dtype=np.uint32)
        self._begin = np.zeros(1 << 12, dtype=np.int32)
        self._count = np.zeros(1 << 12, dtype=np.int32)
        self._used, self._used_ids = 1, 0
        for number in self._fixed:
            self._append([number])
        # Direct-mapped: who comes first stays, who finds the slot taken is looked up in the dictionary.
        self._low = np.zeros(1 << _SLOTS_BITS, dtype=np.uint64)
        self._high = np.zeros(1 << _SLOTS_BITS, dtype=np.uint64)
        self._slot = np.zeros(1 << _SLOTS_BITS, dtype=np.int32)

    def ids(self, content: bytes, begin: Places, fixed: Places, which: Places) -> tuple[npt.NDArray[np.uint32], Places]:
        """(ids uint32 of all words, where each word's ids end).

        ``content`` are the text's bytes and PADDING; word ``n`` is ``[begin[n], begin[n + 1])`` of them, the last one
        ends where PADDING begins. The words at ``fixed`` are not looked up: ``which`` counts them among the fixed ids,
        from 1; 0 has no ids.
        """
        if self._used > _WORDS:
            self._forget()
        length = np.diff(begin, append=len(content) - len(PADDING))
        raw = np.frombuffer(content, dtype=np.uint8)
        eight = np.ndarray((len(raw) - 7,), dtype="<u8", buffer=content, strides=(1,))
        low = eight[begin] & _MASKS[np.minimum(length, 8)]
        rest = np.clip(length - 8, 0, 7)
        high = eight[np.minimum(begin + 8, len(eight) - 1)] & _MASKS[rest]
        high |= np.minimum(length, _SHORT + 1).astype(np.uint64) << np.uint64(56)
        mixed = ((low * _MIX[0]) ^ (high * _MIX[1])) * _MIX[2]
        slot = (mixed >> np.uint64(64 - _SLOTS_BITS)).astype(np.int64)
        found = (self._low[slot] == low) & (self._high[slot] == high) & (length <= _SHORT)
        entry = np.where(found, self._slot[slot], 0)
        found[fixed] = True
        entry[fixed] = which
        missing = np.flatnonzero(~found)
        if len(missing):
            entry[missing] = self._look_up(content, begin[missing], length[missing])
            short = missing[length[missing] <= _SHORT]
            short = short[self._high[slot[short]] == 0]
            # Of words that share a slot the last one stays, with its own numbers.
            at = slot[short]
            self._slot[at], self._low[at], self._high[at] = entry[short], low[short], high[short]
        return self._gather(entry)

    def _gather(self, entry: Places) -> tuple[npt.NDArray[np.uint32], Places]:
        count = self._count[entry].astype(np.int64)
        end = np.cumsum(count)
        at = np.repeat(self._begin[entry] - (end - count), count)
        at += np.arange(len(at))
        return self._ids[at], end

    def _look_up(self, content: bytes, begin: Places, length: Places) -> list[int]:
        known = self._entries
        found = []
        for start, size in zip(begin.tolist(), length.tolist(), strict=True):
            word = content[start : start + size]
            entry = known.get(word)
            if entry is None:
                text = word.decode("latin-1").translate(BYTE_CHARACTERS)
                entry = known[word] = self._append([token.id for token in self._model.tokenize(text)])
            found.append(entry)
        return found

    def _append(self, ids: list[int]) -> int:
        self._ids = _room(self._ids, self._used_ids + len(ids))
        self._begin, self._count = _room(self._begin, self._used + 1), _room(self._count, self._used + 1)
        self._ids[self._used_ids : self._used_ids + len(ids)] = ids
        self._begin[self._used], self._count[self._used] = self._used_ids, len(ids)
        self._used += 1
        self._used_ids += len(ids)
        return self._used - 1


def _room(array: npt.NDArray[np.generic], wanted: int) -> npt.NDArray[np.generic]:
    if wanted <= len(array):
        return array
    return np.concatenate([array, np.zeros(max(len(array), wanted - len(array)), dtype=array.dtype)])
