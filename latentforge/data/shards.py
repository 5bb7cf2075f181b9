"""Packed rows of tokens on disk: written once, memory-mapped, refused where they are not what data.json says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256

SHARDS = ("train.bin", "heldout.bin")
_TOKENS_AT_ONCE = 1 << 18
_AGAIN = "run the data run again; its folder was altered or is incomplete"


def shard_dtype(vocab_size: int) -> np.dtype[Any]:
    """The little-endian dtype that holds every id: uint16 up to 65536 tokens, uint32 above."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class Packed:
    """What packing one split consumed and wrote: ``documents`` begun, their ``bytes`` of UTF-8 text and ``tokens``."""

    rows: int
    documents: int
    bytes: int
    tokens: int
    sha256: str


def pack(
    encoded: Iterable[tuple[int, npt.NDArray[np.uint32]]],
    path: Path,
    *,
    vocab_size: int,
    sequence_length: int,
    limit: int | None,
    chunk: int = 1,
) -> Packed:
    """Concatenate documents (each ending in EOS) and cut the stream into rows of ``sequence_length`` tokens.

    With ``chunk`` each document begins at a multiple of it, which divides ``sequence_length``: what its last chunk
    has left is filled with its EOS, and counted as tokens nowhere. ``encoded`` yields (UTF-8 bytes, ids) a document.
    Writes ``[rows, sequence_length]`` to ``path`` and stops once ``limit`` rows are written; what is left of the stream
    and does not fill a row is dropped. The bytes and tokens counted are those of whole documents, the last one
    included.
    """
    documents = size = tokens = 0
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as stream:
        writer = _RowWriter(stream, vocab_size, sequence_length, limit)
        for bytes_read, ids in encoded if limit != 0 else ():
            documents += 1
            size += bytes_read
            tokens += len(ids)
            writer.add(ids)
            if fill := -len(ids) % chunk:
                writer.add(np.full(fill, ids[-1]))
            if writer.full:
                break
        writer.write()
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    return Packed(writer.rows, documents, size, tokens, writer.digest.hexdigest())


class _RowWriter:
    """Writes whole rows, many at once and at most ``limit`` in all; holds what does not fill one yet."""

    def __init__(self, stream: BinaryIO, vocab_size: int, length: int, limit: int | None) -> None:
        self.rows = 0
        self.digest = hashlib.sha256()
        self._stream = stream
        self._vocab_size = vocab_size
        self._length = length
        self._limit = limit
        self._held: list[npt.NDArray[Any]] = []
        self._tokens = 0

    @property
    def full(self) -> bool:
        """Whether there are tokens for all rows that are wanted."""
        return self._limit is not None and self.rows + self._tokens // self._length >= self._limit

    def add(self, ids: npt.NDArray[np.uint32]) -> None:
        self._held.append(ids)
        self._tokens += len(ids)
        if self._tokens >= _TOKENS_AT_ONCE:
            self.write()

    def write(self) -> None:
        """Write the rows that are full."""
        if not self._tokens:
            return
        ids = np.concatenate(self._held)
        if ids.max() >= self._vocab_size:
            raise RefusedError(f"token id {ids.max()} is outside the vocabulary of {self._vocab_size} tokens")
        rows = len(ids) // self._length
        if self._limit is not None:
            rows = min(rows, self._limit - self.rows)
        content = ids[: rows * self._length].astype(shard_dtype(self._vocab_size)).tobytes()
        self._stream.write(content)
        self.digest.update(content)
        self.rows += rows
        self._held = [ids[rows * self._length :]]
        self._tokens = len(self._held[0])


class PackedShard:
    """Rows of tokens, memory-mapped: shape ``[n, sequence_length]``."""

    def __init__(self, path: Path, n: int, sequence_length: int, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.sequence_length = sequence_length
        expected = n * sequence_length * dtype.itemsize
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise RefusedError(f"{path} is missing", next=_AGAIN) from None
        if found != expected:
            raise RefusedError(
                f"{path} has {found} bytes, data.json says {n} x {sequence_length} x {dtype.itemsize} = {expected}",
                next=_AGAIN,
            )
        self._tokens: npt.NDArray[Any] = np.memmap(path, dtype=dtype, mode="r", shape=(n, sequence_length))

    def __len__(self) -> int:
        return len(self._tokens)

    def rows(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The rows of ``indices`` (int ``[b]``) as int64 ``[b, sequence_length]``; refused outside the shard."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise RefusedError(f"row {wanted.min()}..{wanted.max()} of {self.path.name} asked; it has {len(self)}")
        return np.asarray(self._tokens[wanted], dtype=np.int64)


@dataclass(frozen=True)
class ShardSet:
    """The product of a data run: training and held-out rows, their tokenizer, and what data.json says of them."""

    folder: Path
    train: PackedShard
    heldout: PackedShard
    vocab_size: int
    sequence_length: int
    eos_id: int
    tokenizer_dir: Path
    tokenizer_sha256: str
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> ShardSet:
        """Open the ``out`` folder of a data run; a shard whose size does not fit data.json is refused."""
        folder = Path(folder)
        record = _load_record(folder / "data.json")
        length, vocab = record["sequence_length"], record["vocab_size"]
        dtype = shard_dtype(vocab)
        if record["dtype"] != dtype.name:
            raise RefusedError(
                f"{folder / 'data.json'}: dtype {record['dtype']!r}, but {vocab} tokens are kept as {dtype.name}"
            )
        return cls(
            folder=folder,
            train=PackedShard(folder / "train.bin", record["train_sequences"], length, dtype),
            heldout=PackedShard(folder / "heldout.bin", record["heldout_sequences"], length, dtype),
            vocab_size=vocab,
            sequence_length=length,
            eos_id=record["eos_id"],
            tokenizer_dir=folder / "tokenizer",
            tokenizer_sha256=record["tokenizer_sha256"],
            record=record,
        )

    @property
    def chunk(self) -> int:
        """The tokens of a chunk, at a multiple of which each document begins; 1 where documents follow each other."""
        return int(self.record.get("chunk", 1))

    def verify(self) -> None:
        """Read every byte of the shards and the tokenizer; RefusedError names the file whose digest is another."""
        for name, recorded in self.record["shards"].items():
            _check_digest(self.folder / name, recorded)
        _check_digest(self.tokenizer_dir / "tokenizer.json", self.tokenizer_sha256)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made these rows."""
        return Tokenizer.open(self.tokenizer_dir)


def _check_digest(path: Path, recorded: str) -> None:
    found = file_sha256(path)
    if found != recorded:
        raise RefusedError(f"{path}: sha256 {recorded[:12]}… recorded, {found[:12]}… found", next=_AGAIN)


_FIELDS: dict[str, type] = {
    "vocab_size": int,
    "sequence_length": int,
    "dtype": str,
    "train_sequences": int,
    "heldout_sequences": int,
    "eos_id": int,
    "tokenizer_sha256": str,
    "shards": dict,
}


def _load_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RefusedError(f"{path} is missing: {path.parent} is not the product of a data run") from None
    except ValueError as error:
        raise RefusedError(f"{path} is not JSON: {error}", next=_AGAIN) from None
    for name, kind in _FIELDS.items():
        if not isinstance(record, dict) or type(record.get(name)) is not kind:
            raise RefusedError(f"{path} has no usable {name!r}", next=_AGAIN)
    if min(record["vocab_size"], record["sequence_length"]) < 1 or set(record["shards"]) != set(SHARDS):
        raise RefusedError(
            f"{path}: vocab_size {record['vocab_size']}, sequence_length {record['sequence_length']}, "
            f"shards {sorted(record['shards'])} are not those of a data run",
            next=_AGAIN,
        )
    return record
