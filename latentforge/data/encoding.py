"""Texts to ids for whole corpora: what ``tokenizers`` gives, to the id, many times as fast.

A byte-level BPE encodes each word of its pre-tokenizer by itself, so a word's ids can be remembered. Where a tokenizer
is built so, texts are cut here (:mod:`latentforge.data.cutting`), words that were met before cost a look in a table
(:mod:`latentforge.data.words`), and the others are asked of the library's own model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from latentforge.data.cutting import END, Cutter, rule_of
from latentforge.data.words import PADDING, Words
from latentforge.errors import RefusedError

Encoded = tuple[int, npt.NDArray[np.uint32]]

# A window is encoded at once. The first one is small, each later one twice as large: a small run reads little more than
# it needs.
_WINDOW_CHARACTERS = (1 << 14, 1 << 18)
# No word of the patterns holds a letter or digit with a space after it, and none looks further: here a text can be cut.
_CUT = re.compile(r"(?<=[0-9A-Za-z]) ")
# NFC changes no text of these characters: none of them is a mark, decomposes, or joins another one.
_COMPOSED = re.compile(
    "[\x00-\u02ff\u0400-\u0481\u048a-\u052f\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2190-\u21ff\u2500-\u27bf"
    "\u3001-\u3029\u3041-\u3096\u30a0-\u30fa\u4e00-\u9fff\uac00-\ud7a3\uff01-\uffef]*"
)


def why_not(backend: tokenizers.Tokenizer) -> str | None:
    """What in a tokenizer forbids that its words are encoded one by one; None where nothing does."""
    if not isinstance(backend.model, tokenizers.models.BPE):
        return f"its model is {type(backend.model).__name__}, not BPE"
    if _part(backend.normalizer) not in (None, {"type": "NFC"}):
        return f"its normalizer is {_part(backend.normalizer).get('type')}"
    if rule_of(_part(backend.pre_tokenizer)) is None:
        return "the pattern of its pre-tokenizer is none of those known here"
    if not backend.encode_special_tokens:
        return "it takes quoted special tokens for themselves"
    for token in backend.get_added_tokens_decoder().values():
        if not token.special and (token.normalized or token.lstrip or token.rstrip or token.single_word):
            return f"its added token {token.content!r} is looked for in another way than by its text alone"
    return None


class WordEncoder:
    """Encodes texts word by word; RefusedError where the tokenizer does not permit it (:func:`why_not`)."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        rule = rule_of(_part(backend.pre_tokenizer))
        if (reason := why_not(backend)) is not None or rule is None:
            raise RefusedError(f"words of this tokenizer cannot be encoded one by one: {reason}")
        self._normalizer = backend.normalizer
        self._cutter = Cutter(rule)
        added = {token.content: token for token in backend.get_added_tokens_decoder().values() if not token.normalized}
        self._entries = {text: n for n, text in enumerate((t for t, one in added.items() if not one.special), start=1)}
        fixed = [backend.token_to_id(text) for text in self._entries]
        self._words = Words(backend.model, fixed)
        longest = sorted(added, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest))) if self._entries else None

    def __call__(self, texts: Iterable[str]) -> Iterator[Encoded]:
        """(UTF-8 bytes, ids uint32) of each text in order, no special token parsed or added; lazily, in windows."""
        window: list[_Piece] = []
        size, (limit, largest) = 0, _WINDOW_CHARACTERS
        document = _Document()
        for piece in self._pieces(texts):
            window.append(piece)
            size += len(piece.text)
            if size >= limit:
                yield from self._encode(window, document)
                window, size, limit = [], 0, min(2 * limit, largest)
        yield from self._encode(window, document)

    def _pieces(self, texts: Iterable[str]) -> Iterator[_Piece]:
        for text in texts:
            found = self._split(text)
            for number, (part, entry, token_size) in enumerate(found, start=1):
                cut = list(_cut(part))
                for index, piece in enumerate(cut, start=1):
                    last = index == len(cut)
                    size = len(piece) if piece.isascii() else len(piece.encode())
                    yield _Piece(
                        self._normalized(piece),
                        size + (token_size if last else 0),
                        entry if last else 0,
                        last and number == len(found),
                    )

    def _split(self, text: str) -> list[tuple[str, int, int]]:
        """(text between added tokens, entry of the token after it or 0 for none, that token's bytes)."""
        found, begin = [], 0
        if self._added is not None:
            for match in self._added.finditer(text):
                # A special token that is quoted is text as any other.
                if entry := self._entries.get(match[0]):
                    found.append((text[begin : match.start()], entry, len(match[0].encode())))
                    begin = match.end()
        return [*found, (text[begin:], 0, 0)]

    def _normalized(self, text: str) -> str:
        if self._normalizer is None or text.isascii() or _COMPOSED.fullmatch(text):
            return text
        return str(self._normalizer.normalize_str(text))

    def _encode(self, window: list[_Piece], document: _Document) -> Iterator[Encoded]:
        if not window:
            return
        text = "\0".join(piece.text for piece in window) + "\0"
        content = text.encode()
        ends = np.cumsum([len(piece.text) + 1 for piece in window]) - 1
        classes = self._cutter.classes(text, content)
        classes[ends] = END
        begin = self._cutter.words(classes)
        fixed = np.searchsorted(begin, ends)
        if len(content) != len(text):
            begin = _byte_offsets(text)[begin]
        ids, id_ends = self._words.ids(content + PADDING, begin, fixed, np.array([piece.entry for piece in window]))
        done = 0
        for piece, end in zip(window, id_ends[fixed].tolist(), strict=True):
            document.add(piece.size, ids[done:end])
            done = end
            if piece.last:
                yield document.take()


def encode_all(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> Iterator[Encoded]:
    """The same as :class:`WordEncoder` gives, by the library's own way, for any tokenizer."""
    batch: list[str] = []
    size, (limit, largest) = 0, _WINDOW_CHARACTERS
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= limit:
            yield from _encode_batch(backend, batch)
            batch, size, limit = [], 0, min(2 * limit, largest)
    yield from _encode_batch(backend, batch)


def _encode_batch(backend: tokenizers.Tokenizer, batch: list[str]) -> Iterator[Encoded]:
    encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
    for text, encoding in zip(batch, encoded, strict=True):
        yield len(text.encode()), np.array(encoding.ids, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A text that is encoded by itself: bytes that it had, the entry that follows it, whether it ends a document."""

    text: str
    size: int
    entry: int
    last: bool


class _Document:
    """The pieces of the document that is being encoded; a long one lies in several windows."""

    def __init__(self) -> None:
        self._size, self._ids = 0, list[npt.NDArray[np.uint32]]()

    def add(self, size: int, ids: npt.NDArray[np.uint32]) -> None:
        self._size += size
        self._ids.append(ids)

    def take(self) -> Encoded:
        size, ids = self._size, self._ids
        self._size, self._ids = 0, []
        return size, ids[0] if len(ids) == 1 else np.concatenate(ids)


def _cut(text: str) -> Iterator[str]:
    """A text in pieces of a window each, where the patterns surely cut; longer ones where there is no such place."""
    begin, size = 0, _WINDOW_CHARACTERS[1]
    while len(text) - begin > size and (place := _CUT.search(text, begin + size)):
        yield text[begin : place.start()]
        begin = place.start()
    yield text[begin:]


def _byte_offsets(text: str) -> npt.NDArray[np.int64]:
    """Where each character of a text begins in its UTF-8, int64 ``[len(text)]``."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    width = 1 + (points >= 0x80).astype(np.int8) + (points >= 0x800) + (points >= 0x10000)
    return np.cumsum(width, dtype=np.int64) - width


def _part(part: Any) -> Any:
    """What tokenizer.json says of a part of a tokenizer; None where it has none."""
    return None if part is None else json.loads(part.__getstate__())
