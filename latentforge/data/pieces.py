"""The bytes that each token of a vocabulary stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from latentforge.data.tokenizer import Tokenizer
from latentforge.data.words import BYTE_CHARACTERS
from latentforge.errors import RefusedError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>\Z")
_BLANK = "▁"


@dataclass(frozen=True)
class TokenBytes:
    """``pieces[id]`` are the bytes of a token; None for special tokens and ids without a token.

    A piece need not be valid UTF-8: a byte-level BPE cuts characters. ``ids`` maps bytes to the ids that stand for
    them, ascending; ``special`` the text of special tokens to their ids.
    """

    pieces: tuple[bytes | None, ...]
    special: dict[str, int]
    ids: dict[bytes, tuple[int, ...]] = field(repr=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenBytes:
        """Read byte-level vocabularies (GPT-2's alphabet) and SentencePiece's (blanks as U+2581, ``<0x0A>``).

        RefusedError where the tokenizer's decoder is of another kind: then a token has no bytes of its own.
        """
        content = json.loads(tokenizer.backend.to_str())
        kinds = set(_kinds(content.get("decoder")))
        if "ByteLevel" in kinds:
            to_bytes = _byte_level
        elif kinds & {"Metaspace", "ByteFallback"}:
            to_bytes = _sentencepiece
        else:
            raise RefusedError(
                f"{tokenizer.folder}: its decoder ({', '.join(sorted(kinds)) or 'none'}) gives tokens no bytes of "
                "their own; byte-level and SentencePiece vocabularies have them",
                next="use the teacher's tokenizer for the student",
            )
        pieces: list[bytes | None] = [None] * tokenizer.vocab_size
        for text, number in tokenizer.backend.get_vocab(with_added_tokens=False).items():
            pieces[number] = to_bytes(text)
        special = {}
        for number, token in tokenizer.backend.get_added_tokens_decoder().items():
            pieces[number] = None if token.special else token.content.encode()
            if token.special:
                special[token.content] = number
        ids: dict[bytes, tuple[int, ...]] = {}
        for number, piece in enumerate(pieces):
            if piece:
                ids[piece] = (*ids.get(piece, ()), number)
        return cls(tuple(pieces), special, ids)

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of ids; RefusedError at an id that has none."""
        found = []
        for number in ids:
            piece = self.pieces[number] if 0 <= number < len(self.pieces) else None
            if piece is None:
                raise RefusedError(f"token {number} stands for no bytes: it is special, or not in the vocabulary")
            found.append(piece)
        return b"".join(found)

    def widths(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Bytes of each id, int64; a token without bytes of its own counts 1, so that it keeps its place."""
        return np.array([1 if (piece := self.pieces[i]) is None else len(piece) for i in ids.tolist()], dtype=np.int64)


def _kinds(decoder: Any) -> Iterable[str]:
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for inner in decoder.get("decoders", ()):
            yield from _kinds(inner)


_ALPHABET = {character: byte for byte, character in BYTE_CHARACTERS.items()}


def _byte_level(text: str) -> bytes | None:
    try:
        return bytes(_ALPHABET[character] for character in text)
    except KeyError:
        return None


def _sentencepiece(text: str) -> bytes:
    one = _BYTE_TOKEN.match(text)
    return bytes([int(one[1], 16)]) if one else text.replace(_BLANK, " ").encode()
