"""Tokens to text as they come: a character whose bytes are not all there yet is held back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text after a prompt, piece by piece; special tokens have none.

    The pieces with that of ``end`` are the text of all the tokens: nothing is sent that a later token changes.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []
        # Walked through, not given as a whole: a prompt that ends inside a character would be repeated.
        self.push(prompt)

    def push(self, tokens: Iterable[int]) -> str:
        """What of the text is certain now, and was not said before."""
        found = []
        for token in tokens:
            self._held.append(token)
            piece = self._stream.step(self._tokenizer, token)
            if piece is not None:
                found.append(piece)
                self._held.clear()
        return "".join(found)

    def end(self) -> str:
        """What was held back, with U+FFFD for bytes that make no character."""
        left, self._held = self._held, []
        return str(self._tokenizer.decode(left, skip_special_tokens=True))
