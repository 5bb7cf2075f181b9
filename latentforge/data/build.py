"""From a corpus to the product of a data run: tokenizer, packed shards, data.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from latentforge.data.corpus import Corpus, Entry, read_all
from latentforge.data.encoding import Encoded, why_not
from latentforge.data.shards import Packed, ShardSet, pack, shard_dtype
from latentforge.data.special import BosRule, bos_of
from latentforge.data.telling import SILENT, Telling, Told
from latentforge.data.tokenizer import Tokenizer, copy_tokenizer, train_bpe
from latentforge.data.workers import Encoding, processes_for
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.spec.run import write_record

READ_ORDER = "corpus.jsonl"
"""The files that were read, in order; in the product of a data run that asks nobody."""


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
    processes: int | None = None,
    telling: Telling = SILENT,
) -> ShardSet:
    """Write ``tokenizer/``, ``train.bin``, ``heldout.bin``, ``corpus.jsonl`` and ``data.json`` into ``out``.

    The same inputs give the same bytes, in however many ``processes`` (None: as many as the text is worth here). Of the
    corpus a few batches of documents are in memory at a time. A call that was killed leaves no shard that is not whole,
    and the same call begins anew. ``tokenizer_folder`` is used unchanged where given, ``vocab_size`` then not.
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
    with telling.phase("corpus"):
        corpus = Corpus.open(corpus_ref, scratch=out, progress=Told(telling, "corpus"))
    train, heldout = (corpus.index.count(heldout=side) for side in (False, True))
    if not train or not heldout:
        raise RefusedError(
            f"corpus has {corpus.documents} document(s) with text: {train} to train on, {heldout} held out; both need "
            "at least one",
            next="give a corpus of more documents (files, or lines of a .jsonl)",
        )
    with telling.phase("tokenizer"):
        if tokenizer_folder is not None:
            tokenizer = copy_tokenizer(tokenizer_folder, out / "tokenizer")
        else:
            # Learnt from training documents alone: held-out text has no part in anything that is trained.
            texts = (document.text for document in read_all(corpus.entries(heldout=False)))
            tokenizer = train_bpe(texts, vocab_size, out / "tokenizer")
        bos_id = bos_of(tokenizer.folder, bos, tokenizer)
        if (reason := why_not(tokenizer.backend)) is not None:
            telling.say(f"documents are encoded by the tokenizers library, slowly: {reason}")
    with telling.phase("tokenize"):
        packing = _Packing(corpus, tokenizer, sequence_length, bos_id, chunk, processes, Told(telling, "tokenize"))
        packed_heldout = packing.write(out / "heldout.bin", heldout_sequences, heldout=True)
        _check_enough("heldout_sequences", heldout_sequences, packed_heldout, sequence_length, heldout)
        packed_train = packing.write(out / "train.bin", train_sequences, heldout=False)
        _check_enough("train_sequences", train_sequences or 1, packed_train, sequence_length, train)
    write_read_order(out / READ_ORDER, corpus, heldout=packed_heldout.documents, train=packed_train.documents)
    record = record_of(corpus, tokenizer, sequence_length, packed_train, packed_heldout) | {
        "bos": bos,
        "bos_id": bos_id,
        "chunk": chunk,
    }
    return finished(out, record)


def write_read_order(path: Path, corpus: Corpus, *, heldout: int, train: int) -> None:
    """Write the files that the rows come from, in the order in which each split began to read them.

    A JSON object a line: ``split``, ``name`` below the corpus, ``bytes``, ``sha256`` of the file. ``heldout`` and
    ``train`` are how many documents of each were packed.
    """
    with open(path, "w", encoding="utf-8") as stream:
        for split, documents in (("heldout", heldout), ("train", train)):
            seen = bytearray(corpus.files)
            for entry in islice(corpus.entries(heldout=split == "heldout"), documents):
                if not seen[entry.file]:
                    seen[entry.file] = True
                    size, sha256 = entry.path.stat().st_size, file_sha256(entry.path)
                    line = {"split": split, "name": corpus.names[entry.file], "bytes": size, "sha256": sha256}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def finished(out: Path, record: dict[str, Any]) -> ShardSet:
    """Write ``data.json``, whole or not at all, last of what makes a folder of packed rows; opens the folder."""
    write_record(out / "data.json", record)
    return ShardSet.open(out)


@dataclass
class _Packing:
    """How documents become rows, the same for both splits."""

    corpus: Corpus
    tokenizer: Tokenizer
    sequence_length: int
    bos_id: int | None
    chunk: int
    processes: int | None
    progress: Callable[[int, int], None]

    def write(self, path: Path, limit: int | None, *, heldout: bool) -> Packed:
        """Tokenize and pack the documents of a side into ``path``, at most ``limit`` rows."""
        total = self.corpus.index.bytes(heldout=heldout)
        # A row's text is guessed at four bytes a token; all that depends on it is whether processes are begun.
        wanted = total if limit is None else min(total, 4 * limit * self.sequence_length)
        processes = processes_for(wanted) if self.processes is None else self.processes
        encoding = Encoding(self.tokenizer, self.bos_id, processes)
        with closing(encoding(self.corpus.entries(heldout=heldout))) as encoded:
            return pack(
                self._told(encoded, total),
                path,
                vocab_size=self.tokenizer.vocab_size,
                sequence_length=self.sequence_length,
                limit=limit,
                chunk=self.chunk,
            )

    def _told(self, encoded: Iterable[tuple[Entry, Encoded]], total: int) -> Iterator[Encoded]:
        done = 0
        for entry, found in encoded:
            yield found
            done += entry.length
            self.progress(done, total)


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
            "corpus": corpus.documents,
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
