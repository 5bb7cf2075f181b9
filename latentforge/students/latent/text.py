"""Tokens to text as they come: a character whose bytes are not all there yet is held back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers

_UNKNOWN = "\ufffd"


class TextStream:
    """The text after a prompt, piece by piece; special tokens have none.

    The pieces with that of ``end`` are the text of all the tokens, however they are pushed: nothing is sent that a
    later token changes. Bytes that make no character are a U+FFFD each. Where a decoder makes one of all bytes that
    they follow too, those keep the characters that were sent.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The tokens of the last piece, which say how the next one begins (with a blank, say), and those held back.
        self._said: list[int] = []
        self._held: list[int] = []
        self._of_prompt = ""
        self.push(prompt)
        self._of_prompt = self._new()

    def push(self, tokens: Iterable[int]) -> str:
        """What of the text is certain now, and was not said before."""
        found = []
        for token in tokens:
            self._held.append(token)
            piece = self._new()
            if piece and not piece.endswith(_UNKNOWN):
                found.append(self._say(piece))
        return "".join(found)

    def end(self) -> str:
        """What was held back, with U+FFFD for bytes that make no character."""
        return self._say(self._new())

    def _new(self) -> str:
        """The text of the tokens that are held back."""
        said, both = self._decode(self._said), self._decode(self._said + self._held)
        return both.removeprefix(said) if both.startswith(said) else self._decode(self._held)

    def _say(self, piece: str) -> str:
        # A prompt may end with some bytes of a character, or with a U+FFFD of its own.
        own, self._of_prompt = self._of_prompt, ""
        self._said, self._held = self._held, []
        return piece.removeprefix(own if piece.startswith(own) else own.rstrip(_UNKNOWN))

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
