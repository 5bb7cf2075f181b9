"""What is inside corpora and tokenizers: that text is text, and that two models mean the same token by the same id."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from pathlib import Path

READ_AT_MOST = 256 << 20
"""Bytes of a corpus that a probe looks into: a few seconds of work. The data run looks into all of it."""
_CHUNK = 1 << 20
_LINE = 'each line is one JSON object with the document in "text", as {"text": "…"}'


class Unfit(Exception):
    """Why a path cannot serve, with the value in it, and the remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def check_text(paths: Iterable[Path]) -> None:
    """Unfit for the first file that is not UTF-8, or a .jsonl with a line that is no document."""
    left = READ_AT_MOST
    for path in paths:
        if left <= 0:
            return
        left -= _check_lines(path, left) if path.suffix == ".jsonl" else _check_utf8(path, left)


def read_vocabulary(folder: Path) -> dict[int, str]:
    """Token by id as a folder's tokenizer.json says, added tokens included; Unfit where it cannot be read."""
    file = folder / "tokenizer.json"
    try:
        value = json.loads(file.read_bytes())
        model = value["model"]["vocab"]
        # A unigram model lists [token, score] in order, the others map tokens to ids.
        ids = {row[0]: number for number, row in enumerate(model)} if isinstance(model, list) else dict(model)
        for added in value.get("added_tokens") or []:
            ids.setdefault(added["content"], added["id"])
        return {number: text for text, number in ids.items()}
    except FileNotFoundError:
        raise Unfit(
            f"model {folder} has no tokenizer.json", "save its tokenizer into it with save_pretrained"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Unfit(f"{file} is not a tokenizer: {error!r}", "copy tokenizer.json again, whole") from None


def check_same_tokens(teacher: Path, student: Path) -> None:
    """Unfit at the first id that the two tokenizers give to different tokens."""
    ours, theirs = read_vocabulary(student), read_vocabulary(teacher)
    first = min((one for one in {*ours, *theirs} if ours.get(one) != theirs.get(one)), default=None)
    if first is not None:
        raise Unfit(
            f"vocabularies differ first at id {first}: teacher {teacher} has {_shown(theirs, first)} "
            f"({len(theirs)} tokens), student {student} has {_shown(ours, first)} ({len(ours)} tokens)",
            "use the teacher's tokenizer for the student",
        )


def _shown(vocabulary: dict[int, str], number: int) -> str:
    return repr(vocabulary[number]) if number in vocabulary else "none"


def _check_utf8(path: Path, limit: int) -> int:
    """Decode up to `limit` bytes; the number that was read."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while read < limit and (chunk := file.read(min(_CHUNK, limit - read))):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, read - held) from None
            read += len(chunk)
        if not file.read(1):
            try:
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, read - len(decoder.getstate()[0])) from None
    return read


def _check_lines(path: Path, limit: int) -> int:
    read = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            start, read = read, read + len(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                value = json.loads(text) if text.strip() else {"text": ""}
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, start) from None
            except (ValueError, RecursionError) as error:
                raise Unfit(f"{path} line {number} is not JSON: {error}", _LINE) from None
            if not isinstance(value, dict) or "text" not in value:
                shown = ", ".join(map(repr, sorted(value))) if isinstance(value, dict) else type(value).__name__
                raise Unfit(f'{path} line {number} has no "text" (it has: {shown or "nothing"})', _LINE)
            if not isinstance(value["text"], str):
                raise Unfit(f'{path} line {number}: "text" is {type(value["text"]).__name__}, not a string', _LINE)
            if read >= limit:
                break
    return read


def _not_utf8(path: Path, error: UnicodeDecodeError, start: int) -> Unfit:
    byte = error.object[error.start]
    return Unfit(
        f"{path} is not UTF-8: byte 0x{byte:02x} at offset {start + error.start}",
        "convert it:  iconv -f <its encoding> -t UTF-8",
    )
