"""Where the pre-tokenizer of a byte-level BPE cuts a text, found for all of its characters at once.

A pre-tokenizer's pattern is matched from left to right, a word at a time. The patterns here cut by the classes of
neighbouring characters, so the cuts of a whole text are a few operations on arrays. Which class a character has is
asked of ``tokenizers`` itself: its tables of Unicode decide, not Python's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import pre_tokenizers

Classes = npt.NDArray[np.uint8]

# The low three bits of a class are its kind; the others tell characters apart that the patterns name.
_KIND = 7
LETTER, NUMBER, OTHER, BLANK, END = 1, 2, 3, 4, 5
_SPACE, _NEWLINE = BLANK | 1 << 3, BLANK | 2 << 3
_APOSTROPHE = OTHER | 1 << 3
# After an apostrophe: 's 't 'm 'd; 're 've; 'll.
_ALONE, _BEFORE_E, _E, _L = (LETTER | n << 3 for n in range(1, 5))
_UNKNOWN = 0

_CONTRACTED = {"s": _ALONE, "t": _ALONE, "m": _ALONE, "d": _ALONE, "r": _BEFORE_E, "v": _BEFORE_E, "e": _E, "l": _L}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rule:
    """How a pattern cuts: GPT-2's, or that of cl100k, Llama 3 and Qwen; ``digits`` a word of numbers, 0 for any."""

    family: Literal["gpt2", "cl100k"]
    digits: int


RULES = {
    _GPT2: Rule("gpt2", 0),
    _CL100K.replace("NUMBERS", r"\p{N}"): Rule("cl100k", 1),
    _CL100K.replace("NUMBERS", r"\p{N}{1,3}"): Rule("cl100k", 3),
}
"""The patterns that are known, as tokenizer.json writes them."""


def rule_of(pre_tokenizer: Any) -> Rule | None:
    """The rule of a pre-tokenizer (its part of tokenizer.json); None where it is not one of those known here."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return RULES[_GPT2]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return RULES.get(pattern)
    return None


class Cutter:
    """Cuts texts by a rule.  Remembers the class of each character that it has met."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._classes = np.zeros(0x110000, dtype=np.uint8)
        self._learn("".join(map(chr, range(128))))
        self._ascii = self._classes[:256].tobytes()

    def classes(self, text: str, encoded: bytes) -> Classes:
        """The class of each character, uint8 ``[len(text)]``, to be written to; ``encoded`` is the text in UTF-8."""
        if len(encoded) == len(text):
            return np.frombuffer(bytearray(encoded.translate(self._ascii)), dtype=np.uint8)
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        classes = self._classes[points]
        unknown = classes == _UNKNOWN
        if unknown.any():
            self._learn("".join(map(chr, np.unique(points[unknown]).tolist())))
            classes = self._classes[points]
        return classes

    def words(self, classes: Classes) -> npt.NDArray[np.int64]:
        """Where words begin, ascending.  ``classes`` ends with END, and each END is a word and the end of a text."""
        kind = classes & _KIND
        cut = np.empty(len(kind), dtype=bool)
        cut[0] = True
        np.not_equal(kind[1:], kind[:-1], out=cut[1:])
        cut |= kind == END
        self._cut_numbers(cut, kind)
        # The last blank of several goes with the word after it, or stands alone; at the end of a text all are one word.
        blank = kind == BLANK
        ends = np.flatnonzero(blank[:-1] & ~blank[1:])
        last = ends[kind[ends + 1] != END]
        if self.rule.family == "gpt2":
            cut[last] = True
            cut[last[classes[last] == _SPACE] + 1] = False
            opens = np.flatnonzero(cut[:-1] & (classes[:-1] == _APOSTROPHE) & (kind[1:] == LETTER))
        else:
            last = last[classes[last] != _NEWLINE]
            cut[last] = True
            after = kind[last + 1]
            taken = (after == LETTER) | ((after == OTHER) & (classes[last] == _SPACE))
            cut[last[taken] + 1] = False
            self._cut_newlines(cut, classes, kind, ends)
            opens = np.flatnonzero(cut[:-1] & (kind[:-1] == OTHER) & (kind[1:] == LETTER))
            cut[opens + 1] = False
            opens = opens[classes[opens] == _APOSTROPHE]
        one, two = classes[opens + 1], classes[opens + 2]
        long = ((one == _BEFORE_E) & (two == _E)) | ((one == _L) & (two == _L))
        width = np.where(one == _ALONE, 2, np.where(long, 3, 0))
        opens, width = opens[width > 0], width[width > 0]
        cut[opens + 1] = False
        cut[opens + width] = True
        return np.flatnonzero(cut)

    def _cut_numbers(self, cut: npt.NDArray[np.bool_], kind: Classes) -> None:
        if self.rule.digits == 1:
            cut |= kind == NUMBER
        elif self.rule.digits:
            at = np.flatnonzero(kind == NUMBER)
            begun = np.maximum.accumulate(np.where(cut[at], at, 0))
            cut[at[(at - begun) % self.rule.digits == 0]] = True

    @staticmethod
    def _cut_newlines(
        cut: npt.NDArray[np.bool_], classes: Classes, kind: Classes, blanks_end: npt.NDArray[np.int64]
    ) -> None:
        """Line ends right after punctuation go with it; blanks up to the last line end among them are one word."""
        at = np.flatnonzero(classes == _NEWLINE)
        if not len(at):
            return
        apart = np.diff(at) > 1
        first, last = at[np.concatenate([[True], apart])], at[np.concatenate([apart, [True]])]
        follows = (first > 0) & (kind[first - 1] == OTHER)
        cut[first[follows]] = False
        cut[last[follows] + 1] = True
        end = blanks_end[np.searchsorted(blanks_end, last)]
        final = np.append(end[1:] != end[:-1], True)
        cut[last[final] + 1] = True

    def _learn(self, characters: str) -> None:
        """Ask the library for the classes of characters."""
        points = np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
        kinds = np.full(len(points), OTHER, dtype=np.uint8)
        for kind, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (BLANK, r"\s")):
            kinds[_matching(pattern, characters)] = kind
        self._classes[points] = kinds
        fold = self.rule.family == "cl100k"
        named = {" ": _SPACE, "\r": _NEWLINE, "\n": _NEWLINE, "'": _APOSTROPHE} | _CONTRACTED
        for text, known in named.items():
            if text in _CONTRACTED and fold:
                found = _matching(f"(?i:{text})", characters)
            else:
                found = points == ord(text)
            self._classes[points[found]] = known
        if self.rule.family == "gpt2":
            self._classes[[ord("\r"), ord("\n")]] = BLANK


def _matching(pattern: str, characters: str) -> npt.NDArray[np.bool_]:
    """Which characters ``tokenizers`` takes for a pattern of one character, bool ``[len(characters)]``."""
    found = np.ones(len(characters), dtype=bool)
    for _, (start, end) in pre_tokenizers.Split(tokenizers.Regex(pattern), "removed").pre_tokenize_str(characters):
        found[start:end] = False
    return found
