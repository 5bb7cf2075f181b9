"""Documents of a corpus: Python's standard library, or a folder, .txt or .jsonl of the user's."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentforge.errors import RefusedError
from latentforge.evidence.digests import tree_files, tree_sha256

CorpusKind = Literal["stdlib", "folder", "txt", "jsonl"]
BUILTIN = "stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
ASK_FOR = "name a folder with .txt .md .rst .py or .jsonl files, a .txt file, a .jsonl file, or 'stdlib'"

# Not sources of the library: third-party packages, caches, and tests (some are broken or not UTF-8 on purpose).
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# A lone .txt is cut into pieces, so that it can have a held-out part: at a blank line once a piece has this many
# bytes, at any line end once it has four times as many.
_PIECE_BYTES = 8192
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus under a name that does not depend on where the corpus lies."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a document lies: bytes ``[start, start + length)`` of ``path``; ``sha256`` is that of its UTF-8 text."""

    name: str
    path: Path
    start: int
    length: int
    jsonl: bool
    sha256: bytes


@dataclass(frozen=True)
class Corpus:
    """An indexed corpus: every file read and checked once, documents without text left out.

    ``sha256`` is the content digest by the rule of :func:`latentforge.evidence.digests.tree_sha256` (of the standard
    library: over the selected files), ``files`` and ``bytes`` count what was read. ``entries`` are sorted by name.
    ``names`` are the files' own, below the corpus; a corpus that is one file calls it ``corpus`` with its ending,
    wherever it lies.
    """

    kind: CorpusKind
    sha256: str
    files: int
    bytes: int
    entries: tuple[Entry, ...]
    empty: int
    names: Mapping[Path, str]

    @classmethod
    def open(cls, ref: str | os.PathLike[str]) -> Corpus:
        """Index ``'stdlib'``, a folder, a .txt or a .jsonl file; RefusedError names what cannot be read and why."""
        if ref == BUILTIN:
            return _index_stdlib()
        path = Path(ref)
        if not path.exists():
            raise RefusedError(f"corpus {str(ref)!r} does not exist", next=ASK_FOR)
        if path.is_dir():
            return _index_folder(path)
        if path.suffix not in (".txt", ".jsonl"):
            raise RefusedError(f"corpus {str(ref)!r} is neither a folder nor a .txt or .jsonl file", next=ASK_FOR)
        jsonl = path.suffix == ".jsonl"
        indexed = [(f"corpus{path.suffix}", path, _index_lines(path, "", jsonl=jsonl))]
        return _corpus("jsonl" if jsonl else "txt", tree_sha256(path), indexed)

    def read(self, entry: Entry) -> Document:
        """The document of an entry; refused where the file has changed since it was indexed."""
        with open(entry.path, "rb") as stream:
            stream.seek(entry.start)
            content = stream.read(entry.length)
        if entry.jsonl:
            try:
                text = str(json.loads(content)["text"])
            except (ValueError, KeyError, TypeError):
                raise _changed(entry) from None
            content = text.encode("utf-8", "surrogatepass")
        if hashlib.sha256(content).digest() != entry.sha256:
            raise _changed(entry)
        return Document(entry.name, content.decode("utf-8"))

    def documents(self) -> Iterator[Document]:
        """All documents that have text, by name."""
        for entry in self.entries:
            yield self.read(entry)


def documents(ref: str | os.PathLike[str]) -> Iterator[Document]:
    """The documents of ``'stdlib'``, a folder, a .txt or a .jsonl file, by name; the whole corpus is checked first."""
    return Corpus.open(ref).documents()


def _changed(entry: Entry) -> RefusedError:
    return RefusedError(f"{entry.path} changed while it was read (document {entry.name!r})", next="run again")


def _corpus(kind: CorpusKind, sha256: str, indexed: list[tuple[str, Path, list[Entry]]]) -> Corpus:
    entries = [entry for _, _, found in indexed for entry in found]
    whole = tuple(sorted((entry for entry in entries if entry.length), key=lambda entry: entry.name))
    if not whole:
        raise RefusedError(f"corpus has no text in its {len(indexed)} file(s)", next=ASK_FOR)
    size = sum(path.stat().st_size for _, path, _ in indexed)
    names = {path: name for name, path, _ in indexed}
    return Corpus(kind, sha256, len(indexed), size, whole, len(entries) - len(whole), names)


def _index_stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256()
    indexed = []
    for name, path in sorted(_stdlib_files(root)):
        content = path.read_bytes()
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        indexed.append((name, path, [_index_text(path, name, content)]))
    if not indexed:
        raise RefusedError(
            f"corpus 'stdlib': no .py file in {root} (this Python came without its sources)", next=ASK_FOR
        )
    return _corpus("stdlib", digest.hexdigest(), indexed)


def _stdlib_files(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        for name in files:
            path = Path(folder) / name
            # _sysconfigdata* is written when Python is built, with that machine's paths; links lead to site files.
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and not path.is_symlink():
                yield path.relative_to(root).as_posix(), path


def _index_folder(root: Path) -> Corpus:
    chosen = [(name, path) for name, path in tree_files(root) if path.suffix in SUFFIXES]
    if not chosen:
        raise RefusedError(f"corpus folder {str(root)!r} holds no {' '.join(SUFFIXES)} file", next=ASK_FOR)
    indexed = []
    for name, path in chosen:
        if path.suffix == ".jsonl":
            indexed.append((name, path, _index_lines(path, name, jsonl=True)))
        else:
            indexed.append((name, path, [_index_text(path, name, path.read_bytes())]))
    return _corpus("folder", tree_sha256(root), indexed)


def _index_text(path: Path, name: str, content: bytes) -> Entry:
    start = len(_BOM) if content.startswith(_BOM) else 0
    text = content[start:]
    _check_utf8(text, path, start)
    return _entry(name, path, start, text)


def _entry(name: str, path: Path, start: int, text: bytes) -> Entry:
    length = len(text) if text.strip() else 0
    return Entry(name, path, start, length, False, hashlib.sha256(text).digest())


def _check_utf8(text: bytes, path: Path, start: int) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"{path} is not UTF-8: byte 0x{text[error.start]:02x} at offset {start + error.start}",
            next="convert it:  iconv -f <its encoding> -t UTF-8",
        ) from None


def _index_lines(path: Path, prefix: str, *, jsonl: bool) -> list[Entry]:
    """Index a .jsonl (one document a line) or a lone .txt (pieces), without holding the file in memory.

    Names hold the number of the line, not the file's own name: renaming a corpus file changes nothing.
    """
    found: list[Entry] = []
    piece = bytearray()
    piece_start = piece_line = offset = 0
    try:
        stream = open(path, "rb")  # noqa: SIM115 (closed by the with below; only the opening is guarded)
    except OSError as error:
        raise RefusedError(f"cannot read corpus {path}: {error.strerror}") from error
    with stream:
        for number, line in enumerate(stream, start=1):
            start = offset
            offset += len(line)
            if number == 1 and line.startswith(_BOM):
                line, start = line[len(_BOM) :], len(_BOM)
            if jsonl:
                if line.strip():
                    found.append(_json_entry(f"{prefix}#{number:09d}", path, start, line, number))
                continue
            if not piece:
                piece_start, piece_line = start, number
            piece += line
            size = len(piece)
            if (size >= _PIECE_BYTES and not line.strip()) or size >= 4 * _PIECE_BYTES:
                _check_utf8(bytes(piece), path, piece_start)
                found.append(_entry(f"{prefix}#{piece_line:09d}", path, piece_start, bytes(piece)))
                piece.clear()
    if piece:
        _check_utf8(bytes(piece), path, piece_start)
        found.append(_entry(f"{prefix}#{piece_line:09d}", path, piece_start, bytes(piece)))
    return found


def _json_entry(name: str, path: Path, start: int, line: bytes, number: int) -> Entry:
    remedy = 'each line is one JSON object with the document in "text", as {"text": "…"}'
    _check_utf8(line, path, start)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path} line {number} is not JSON: {error}", next=remedy) from None
    if not isinstance(value, dict) or "text" not in value:
        shown = ", ".join(map(repr, sorted(value))) if isinstance(value, dict) else type(value).__name__
        raise RefusedError(f'{path} line {number} has no "text" (it has: {shown or "nothing"})', next=remedy)
    text = value["text"]
    if not isinstance(text, str):
        raise RefusedError(f'{path} line {number}: "text" is {type(text).__name__}, not a string', next=remedy)
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedError(
            f'{path} line {number}: "text" holds a lone surrogate at character {error.start}', next=remedy
        ) from None
    return Entry(name, path, start, len(line) if text.strip() else 0, True, hashlib.sha256(content).digest())
