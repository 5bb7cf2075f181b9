"""From a corpus to the product of a data run: tokenizer, packed shards, data.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.data.corpus import Corpus, Entry
from latentforge.data.shards import Packed, ShardSet, pack, shard_dtype
from latentforge.data.special import BosRule, bos_of
from latentforge.data.split import packing_order
from latentforge.data.tokenizer import Tokenizer, copy_tokenizer, train_bpe
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.spec.run import write_record

READ_ORDER = "corpus.jsonl"
"""The files that were read, in order; in the product of a data run that asks nobody."""

Phase = Callable[[str], AbstractContextManager[None]]


def build_shards(
    corpus_ref: str | Path,
    out: Path,
    *,
    vocab_size: int,
    sequence_length: int,
    train_sequences: int | None,
    heldout_sequences: int,
    tokenizer_folder: Path | None = None,
    bos: BosRule = "none",
    chunk: int = 1,
    phase: Phase = lambda name: nullcontext(),
) -> ShardSet:
    """Write ``tokenizer/``, ``train.bin``, ``heldout.bin``, ``corpus.jsonl`` and ``data.json`` into ``out``.

    The same inputs give the same bytes. ``tokenizer_folder`` is used unchanged where given, ``vocab_size`` then not.
    ``bos = "add"`` begins each document with the tokenizer's BOS; see :func:`latentforge.data.special.bos_of`. With
    ``chunk`` each document begins at a multiple of it; see :func:`latentforge.data.shards.pack`. RefusedError where the
    corpus is not readable, or too small (with both numbers), or where a row would end inside a chunk.
    """
    if chunk < 1 or sequence_length % chunk:
        raise RefusedError(
            f"sequence_length = {sequence_length} is not a multiple of chunk = {chunk}: a row would end inside a chunk",
            next="set data.sequence_length to a multiple of data.chunk",
        )
    out.mkdir(parents=True, exist_ok=True)
    with phase("corpus"):
        corpus = Corpus.open(corpus_ref)
        train, heldout = packing_order(corpus.entries)
    if not train or not heldout:
        raise RefusedError(
            f"corpus has {len(corpus.entries)} document(s) with text: {len(train)} to train on, {len(heldout)} held "
            "out; both need at least one",
            next="give a corpus of more documents (files, or lines of a .jsonl)",
        )
    with phase("tokenizer"):
        if tokenizer_folder is not None:
            tokenizer = copy_tokenizer(tokenizer_folder, out / "tokenizer")
        else:
            # Learnt from training documents alone: held-out text has no part in anything that is trained.
            tokenizer = train_bpe(_texts(corpus, train), vocab_size, out / "tokenizer")
        bos_id = bos_of(tokenizer.folder, bos, tokenizer)
    with phase("tokenize"):
        packing = _Packing(tokenizer, sequence_length, bos_id, chunk)
        packed_heldout = packing.write(corpus, heldout, out / "heldout.bin", heldout_sequences)
        _check_enough("heldout_sequences", heldout_sequences, packed_heldout, sequence_length, len(heldout))
        packed_train = packing.write(corpus, train, out / "train.bin", train_sequences)
        _check_enough("train_sequences", train_sequences or 1, packed_train, sequence_length, len(train))
    splits = {"heldout": heldout[: packed_heldout.documents], "train": train[: packed_train.documents]}
    write_read_order(out / READ_ORDER, corpus, splits)
    record = record_of(corpus, tokenizer, sequence_length, packed_train, packed_heldout) | {
        "bos": bos,
        "bos_id": bos_id,
        "chunk": chunk,
    }
    return finished(out, record)


def write_read_order(path: Path, corpus: Corpus, splits: Mapping[str, Sequence[Entry]]) -> None:
    """Write the files that the rows come from, in the order in which each split began to read them.

    A JSON object a line: ``split``, ``name`` below the corpus, ``bytes``, ``sha256`` of the file. ``splits`` holds the
    documents that were packed, in their order.
    """
    digests: dict[Path, str] = {}
    lines = []
    for split, entries in splits.items():
        for source in dict.fromkeys(entry.path for entry in entries):
            if source not in digests:
                digests[source] = file_sha256(source)
            size, name = source.stat().st_size, corpus.names[source]
            lines.append({"split": split, "name": name, "bytes": size, "sha256": digests[source]})
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def finished(out: Path, record: dict[str, Any]) -> ShardSet:
    """Write ``data.json``, whole or not at all, last of what makes a folder of packed rows; opens the folder."""
    write_record(out / "data.json", record)
    return ShardSet.open(out)


def _texts(corpus: Corpus, entries: Sequence[Entry]) -> Iterator[str]:
    return (corpus.read(entry).text for entry in entries)


@dataclass(frozen=True)
class _Packing:
    """How documents become rows, the same for both splits."""

    tokenizer: Tokenizer
    sequence_length: int
    bos_id: int | None
    chunk: int

    def write(self, corpus: Corpus, entries: Sequence[Entry], path: Path, limit: int | None) -> Packed:
        """Tokenize and pack the documents of ``entries`` into ``path``, at most ``limit`` rows."""
        encoded = self.tokenizer.encode(_texts(corpus, entries), bos_id=self.bos_id)
        return pack(
            encoded,
            path,
            vocab_size=self.tokenizer.vocab_size,
            sequence_length=self.sequence_length,
            limit=limit,
            chunk=self.chunk,
        )


def _check_enough(field: str, wanted: int, packed: Packed, length: int, documents: int) -> None:
    if packed.rows < wanted:
        raise RefusedError(
            f"{field} = {wanted}: the corpus has only {packed.rows} rows of {length} tokens for it "
            f"({packed.tokens} tokens in {documents} documents)",
            next=f"give a larger corpus, or lower data.{field} or data.sequence_length",
        )


def record_of(corpus: Corpus, tokenizer: Tokenizer, length: int, train: Packed, heldout: Packed) -> dict[str, Any]:
    """What data.json says of two packed splits, of the corpus and of the tokenizer."""
    tokens = train.tokens + heldout.tokens
    return {
        "vocab_size": tokenizer.vocab_size,
        "sequence_length": length,
        "dtype": shard_dtype(tokenizer.vocab_size).name,
        "train_sequences": train.rows,
        "heldout_sequences": heldout.rows,
        "tokens": (train.rows + heldout.rows) * length,
        "documents": {
            "corpus": len(corpus.entries),
            "without_text": corpus.empty,
            "train": train.documents,
            "heldout": heldout.documents,
        },
        "bytes_per_token": (train.bytes + heldout.bytes) / tokens,
        "eos_id": tokenizer.eos_id,
        "corpus": {"kind": corpus.kind, "sha256": corpus.sha256, "files": corpus.files, "bytes": corpus.bytes},
        "tokenizer_sha256": tokenizer.sha256,
        "shards": {"train.bin": train.sha256, "heldout.bin": heldout.sha256},
    }
