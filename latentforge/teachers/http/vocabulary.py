"""Whether a server reads text as the local tokenizer does: ids alone say nothing of what they stand for there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from latentforge.data.tokenizer import Tokenizer
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.probes import PROBE_TEXTS

Call = Callable[[Callable[[], Any]], Any]
_CHARACTERS = 1 << 18
_BEYOND = 64
# What a server, or a gateway that passes scoring alone, says of a path that it does not have.
_NOT_OFFERED = ("model-not-found", "unauthorized", "refused-request", "malformed", "server-error")
_NEXT = "name the folder of the served model's own tokenizer (teacher.model, --tokenizer)"


@dataclass(frozen=True)
class Compared:
    """Texts that the server read as they are read here: ``tokens`` in all, ``ids`` different ones of ``vocab_size``."""

    tokens: int
    ids: int
    vocab_size: int


def compare_served(root: HttpClient, model: str, tokenizer: Tokenizer, *, rows: int, call: Call) -> Compared | None:
    """Compare what ``/tokenize`` and ``/detokenize`` below ``root`` (no ``/v1``) say with ``tokenizer``.

    Texts that hold every token that has a text of its own are read on both sides. Added tokens, which text need not
    become, are spelt, and so are the ids up to ``rows`` (those of the model, padding included) and a few more that are
    no token here. Two tokens that are swapped, or one that only one side has, are a TeacherFailure (``wrong-ids``).
    ``call`` makes each request. None where the server does not offer to say.
    """
    sha256 = f"tokenizer.json {tokenizer.sha256[:12]}…"
    tokens, ids = 0, set[int]()
    for text in _texts(tokenizer):
        value = _asked(root, "/tokenize", {"model": model, "prompt": text, "add_special_tokens": False}, call)
        theirs = value.get("tokens") if isinstance(value, dict) else None
        if not isinstance(theirs, list) or not theirs or not all(type(one) is int for one in theirs):
            return None  # no text here is empty: who says so did not read it
        mine = tokenizer.backend.encode(text, add_special_tokens=False)
        if mine.ids != theirs:
            at = next(i for i, (a, b) in enumerate(zip([*mine.ids, -1], [*theirs, -1], strict=False)) if a != b)
            begin = mine.offsets[at][0] if at < len(mine.ids) else len(text)
            here, there = (f"id {one[at]}" if at < len(one) else "nothing" for one in (mine.ids, theirs))
            _differs(root, f"{text[begin : begin + 24]!r} begins with {here} here and with {there} there ({sha256})")
        tokens += len(theirs)
        ids.update(theirs)
    added = sorted(tokenizer.backend.get_added_tokens_decoder())
    silent = {*range(rows + _BEYOND)}.difference(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    for asked, known in ((added, added), (sorted(silent), [])):
        value = _asked(root, "/detokenize", {"model": model, "tokens": asked}, call)
        spelt = value.get("prompt") if isinstance(value, dict) else None
        if not isinstance(spelt, str):
            break
        # Some decoders put blanks between such tokens.
        here, there = ("".join(one.split()) for one in (tokenizer.backend.decode(asked, False), spelt))
        if here != there:
            at = next(i for i, (a, b) in enumerate(zip(f"{here}\0", f"{there}\0", strict=False)) if a != b)
            shown = [repr(one[max(0, at - 12) : at + 24]) for one in (here, there)]
            _differs(root, f"ids {_listed(asked)} spell {shown[0]} here and {shown[1]} there ({sha256})")
        ids.update(known)
    return Compared(tokens, len(ids), tokenizer.vocab_size)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (f" … {numbers[-1]}" if len(numbers) > 4 else "")


def _differs(root: HttpClient, what: str) -> None:
    root.failure("wrong-ids", f"another tokenizer: {what}", next=_NEXT)


def _asked(root: HttpClient, path: str, body: dict[str, Any], call: Call) -> Any:
    """The server's answer; None where it does not have the path."""

    def once() -> Any:
        try:
            return root.post(path, body)
        except TeacherFailure as failure:
            if failure.kind in _NOT_OFFERED:
                return None
            raise

    return call(once)


def _texts(tokenizer: Tokenizer) -> Iterator[str]:
    """The probe texts, then every token of the vocabulary on a line of its own, then all of them between blanks."""
    special = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.content]
    # A server may read a part of the text as a special token, which is never done to documents here.
    reserved = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    words = [tokenizer.backend.decode([number], skip_special_tokens=True) for number in range(tokenizer.vocab_size)]
    # An id that is no whole character spells nothing of its own.
    words = [word for word in words if word and "\ufffd" not in word and not reserved.search(word)]
    probes = [text for text in PROBE_TEXTS if text and not reserved.search(text)]
    yield from _blocks([*probes, *words], "\n")
    yield from _blocks(words, " ")


def _blocks(words: Sequence[str], between: str) -> Iterator[str]:
    """The words with ``between`` among them, in texts of about ``_CHARACTERS``."""
    block: list[str] = []
    size = 0
    for word in words:
        block.append(word)
        size += len(word) + len(between)
        if size >= _CHARACTERS:
            yield between.join(block)
            block, size = [], 0
    if block:
        yield between.join(block)
