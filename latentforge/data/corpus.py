"""Documents of a corpus: Python's standard library, or a folder, .txt or .jsonl of the user's."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from latentforge.data.index import Index, Place
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256, tree_files, tree_sha256

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
_BLOCK = 1 << 20

Progress = Callable[[int, int], None]
"""Told how many bytes are done, of how many."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus under a name that does not depend on where the corpus lies."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a document lies: bytes ``[start, start + length)`` of ``path``, the corpus's file of number ``file``.

    ``sha256`` is that of its UTF-8 text.
    """

    name: str
    path: Path
    file: int
    start: int
    length: int
    jsonl: bool
    sha256: bytes


@dataclass(frozen=True)
class Corpus:
    """An indexed corpus: every file read and checked once, documents without text left out.

    ``sha256`` is the content digest by the rule of :func:`latentforge.evidence.digests.tree_sha256` (of the standard
    library: over the selected files), ``bytes`` counts what was read. ``names`` are the files' own, below the corpus;
    a corpus that is one file (``lone``) calls it ``corpus`` with its ending, wherever it lies. Memory holds the names
    of files, no text, and of the index of documents a bounded part.
    """

    kind: CorpusKind
    sha256: str
    bytes: int
    index: Index
    empty: int
    root: Path
    names: tuple[str, ...]
    lone: bool

    @classmethod
    def open(
        cls, ref: str | os.PathLike[str], *, scratch: Path | None = None, progress: Progress = lambda done, total: None
    ) -> Corpus:
        """Index ``'stdlib'``, a folder, a .txt or a .jsonl file; RefusedError names what cannot be read and why.

        The index lies in ``scratch``, or where temporary files lie; ``progress`` is told bytes read, of bytes.
        """
        if ref == BUILTIN:
            return _index_stdlib(scratch, progress)
        path = Path(ref)
        if not path.exists():
            raise RefusedError(f"corpus {str(ref)!r} does not exist", next=ASK_FOR)
        if path.is_dir():
            return _index_folder(path, scratch, progress)
        if path.suffix not in (".txt", ".jsonl"):
            raise RefusedError(f"corpus {str(ref)!r} is neither a folder nor a .txt or .jsonl file", next=ASK_FOR)
        names = (f"corpus{path.suffix}",)
        reading = _Reading(path, names, scratch, progress)
        reading.lines("", 0)
        return reading.corpus("jsonl" if path.suffix == ".jsonl" else "txt", tree_sha256(path))

    @property
    def files(self) -> int:
        """Files that were read."""
        return len(self.names)

    @property
    def documents(self) -> int:
        """Documents that have text."""
        return self.index.count(heldout=False) + self.index.count(heldout=True)

    def entries(self, *, heldout: bool) -> Iterator[Entry]:
        """The documents of a side of the split, in the order in which they are packed."""
        file, name, path = -1, "", self.root
        for place in self.index.places(heldout=heldout):
            if place.file != file:
                file = place.file
                name = self.names[file]
                path = self.root if self.lone else self.root / name
            document = _document_name("" if self.lone else name, place.line)
            jsonl = name.endswith(".jsonl")
            yield Entry(document, path, file, place.start, place.length, jsonl, place.sha256)


def read(entry: Entry) -> Document:
    """The document of an entry; refused where the file has changed since it was indexed."""
    return next(read_all([entry]))


def read_all(entries: Iterable[Entry]) -> Iterator[Document]:
    """The documents of entries, read as they are asked for; refused where a file has changed since it was indexed."""
    with ExitStack() as opened:
        path = stream = None
        for entry in entries:
            if entry.path != path or stream is None:
                opened.close()
                path, stream = entry.path, opened.enter_context(_opened(entry.path))
            stream.seek(entry.start)
            yield Document(entry.name, _text(entry, stream.read(entry.length)))


def _text(entry: Entry, content: bytes) -> str:
    if entry.jsonl:
        try:
            text = str(json.loads(content)["text"])
        except (ValueError, KeyError, TypeError):
            raise _changed(entry) from None
        content = text.encode("utf-8", "surrogatepass")
    if hashlib.sha256(content).digest() != entry.sha256:
        raise _changed(entry)
    return content.decode("utf-8")


def _document_name(file: str, line: int) -> str:
    """Names hold the number of the line, not the name of a lone file: renaming a corpus file changes nothing."""
    return f"{file}#{line:09d}" if line else file


def _changed(entry: Entry) -> RefusedError:
    return RefusedError(f"{entry.path} changed while it was read (document {entry.name!r})", next="run again")


def _index_stdlib(scratch: Path | None, progress: Progress) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = tuple(sorted(_stdlib_files(root)))
    if not names:
        raise RefusedError(
            f"corpus 'stdlib': no .py file in {root} (this Python came without its sources)", next=ASK_FOR
        )
    reading = _Reading(root, names, scratch, progress)
    digest = hashlib.sha256()
    for number, name in enumerate(names):
        digest.update(f"{name}\0{file_sha256(root / name)}\n".encode())
        reading.text(number)
    return reading.corpus("stdlib", digest.hexdigest())


def _stdlib_files(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        for name in files:
            path = Path(folder) / name
            # _sysconfigdata* is written when Python is built, with that machine's paths; links lead to site files.
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def _index_folder(root: Path, scratch: Path | None, progress: Progress) -> Corpus:
    names = tuple(name for name, path in tree_files(root) if path.suffix in SUFFIXES)
    if not names:
        raise RefusedError(f"corpus folder {str(root)!r} holds no {' '.join(SUFFIXES)} file", next=ASK_FOR)
    reading = _Reading(root, names, scratch, progress)
    for number, name in enumerate(names):
        if name.endswith(".jsonl"):
            reading.lines(name, number)
        else:
            reading.text(number)
    return reading.corpus("folder", tree_sha256(root))


class _Reading:
    """A corpus while its files are read: their documents go into the index."""

    def __init__(self, root: Path, names: tuple[str, ...], scratch: Path | None, progress: Progress) -> None:
        self.root = root
        self.names = names
        self.lone = root.is_file()
        self.index = Index(scratch)
        self.empty = self.bytes = 0
        self._progress = progress
        self._total = sum(self._path(number).stat().st_size for number in range(len(names)))

    def corpus(self, kind: CorpusKind, sha256: str) -> Corpus:
        corpus = Corpus(kind, sha256, self.bytes, self.index, self.empty, self.root, self.names, self.lone)
        if not corpus.documents:
            raise RefusedError(f"corpus has no text in its {len(self.names)} file(s)", next=ASK_FOR)
        return corpus

    def text(self, file: int) -> None:
        """A file that is one document, read in blocks."""
        path, digest, blank = self._path(file), hashlib.sha256(), True
        decoder = codecs.getincrementaldecoder("utf-8")()
        with _opened(path) as stream:
            start = at = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
            stream.seek(start)
            self._read(start)
            while block := stream.read(_BLOCK):
                _check_utf8(block, path, at, decoder)
                digest.update(block)
                blank = blank and not block.strip()
                at += len(block)
                self._read(len(block))
            _check_utf8(b"", path, at, decoder)
        self._add(self.names[file], Place(file, 0, start, at - start, digest.digest()), blank)

    def lines(self, prefix: str, file: int) -> None:
        """A .jsonl (one document a line) or a lone .txt (pieces)."""
        path = self._path(file)
        piece = bytearray()
        piece_start = piece_line = offset = 0
        with _opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                start = offset
                offset += len(line)
                self._read(len(line))
                if number == 1 and line.startswith(_BOM):
                    line, start = line[len(_BOM) :], len(_BOM)
                if path.suffix == ".jsonl":
                    if line.strip():
                        text = _json_text(path, start, line, number)
                        place = Place(file, number, start, len(line), hashlib.sha256(text.encode()).digest())
                        self._add(_document_name(prefix, number), place, not text.strip())
                    continue
                if not piece:
                    piece_start, piece_line = start, number
                piece += line
                size = len(piece)
                if (size >= _PIECE_BYTES and not line.strip()) or size >= 4 * _PIECE_BYTES:
                    self._add_piece(prefix, file, piece_line, piece_start, bytes(piece))
                    piece.clear()
        if piece:
            self._add_piece(prefix, file, piece_line, piece_start, bytes(piece))

    def _add_piece(self, prefix: str, file: int, line: int, start: int, content: bytes) -> None:
        _check_utf8(content, self._path(file), start)
        place = Place(file, line, start, len(content), hashlib.sha256(content).digest())
        self._add(_document_name(prefix, line), place, not content.strip())

    def _add(self, name: str, place: Place, blank: bool) -> None:
        if blank:
            self.empty += 1
        else:
            self.index.add(name, place)

    def _path(self, file: int) -> Path:
        return self.root if self.lone else self.root / self.names[file]

    def _read(self, size: int) -> None:
        self.bytes += size
        self._progress(self.bytes, self._total)


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise RefusedError(
            f"cannot read corpus file {path}: {error.strerror}", next="make it readable, or take it out of the corpus"
        ) from error


def _check_utf8(text: bytes, path: Path, start: int, decoder: codecs.IncrementalDecoder | None = None) -> None:
    """Refuse bytes that are not UTF-8; ``decoder`` has what the bytes before ``start`` left open, none at the end."""
    left = len(decoder.getstate()[0]) if decoder else 0
    try:
        if decoder is None:
            text.decode("utf-8")
        else:
            decoder.decode(text, final=not text)
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {start - left + error.start}",
            next="convert it:  iconv -f <its encoding> -t UTF-8",
        ) from None


def _json_text(path: Path, start: int, line: bytes, number: int) -> str:
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
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedError(
            f'{path} line {number}: "text" holds a lone surrogate at character {error.start}', next=remedy
        ) from None
    return text
