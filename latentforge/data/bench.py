"""How fast a corpus becomes packed rows on one core, and how much memory that takes.

Seconds are the processor's, of all threads of this process: other work on the machine changes them little.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from latentforge.data.corpus import Corpus, Entry, read_all
from latentforge.data.encoding import Encoded, encode_all, why_not
from latentforge.data.shards import pack
from latentforge.data.tokenizer import Tokenizer, copy_tokenizer, train_bpe
from latentforge.data.workers import Encoding


@dataclass(frozen=True)
class DataSpeed:
    """What was measured. MB are 10^6 bytes of text (of files, where the corpus is indexed); a core's speed counts the
    processor's seconds.

    ``slow_because`` says why the tokenizer's words are not encoded one by one, None where they are.
    ``library_mb_s`` is the tokenizers library's own speed on one core, on a part of the text.
    """

    megabytes: float
    tokens: int
    index_mb_s: float
    encode_mb_s: float
    mb_s_a_core: float
    tokens_s_a_core: float
    library_mb_s: float
    peak_memory_mb: float
    slow_because: str | None

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for people."""
        rows = [
            ("index the corpus (read, check, digest)", f"{self.index_mb_s:8.1f} MB/s a core"),
            ("read and encode", f"{self.encode_mb_s:8.1f} MB/s a core"),
            ("read, encode, pack, write", f"{self.mb_s_a_core:8.1f} MB/s a core"),
            ("", f"{self.tokens_s_a_core / 1e6:8.2f} M tokens/s a core"),
            ("the tokenizers library alone", f"{self.library_mb_s:8.1f} MB/s a core"),
            ("peak memory of this process", f"{self.peak_memory_mb:8.0f} MB"),
        ]
        found = [f"{self.megabytes:.1f} MB of text, {self.tokens} tokens"]
        found += [f"{name:<40}{value}" for name, value in rows]
        return found + ([f"words are not encoded one by one: {self.slow_because}"] if self.slow_because else [])


def measure(
    corpus_ref: str | Path, *, tokenizer_folder: Path | None, vocab_size: int, megabytes: int, sequence_length: int
) -> DataSpeed:
    """Measure ``megabytes`` of a corpus's training documents in this process, in a folder that is removed again.

    A BPE of ``vocab_size`` is learnt where no tokenizer is given. RefusedError where the corpus is not readable.
    """
    with tempfile.TemporaryDirectory(prefix="latentforge-data-bench-") as name:
        scratch = Path(name)
        begin = time.process_time()
        corpus = Corpus.open(corpus_ref, scratch=scratch)
        indexed = corpus.bytes / (time.process_time() - begin)
        if tokenizer_folder is not None:
            tokenizer = copy_tokenizer(tokenizer_folder, scratch / "tokenizer")
        else:
            texts = (document.text for document in read_all(corpus.entries(heldout=False)))
            tokenizer = train_bpe(texts, vocab_size, scratch / "tokenizer")

        def documents(limit: int) -> Iterator[Entry]:
            left = limit
            for entry in corpus.entries(heldout=False):
                yield entry
                left -= entry.length
                if left <= 0:
                    return

        def encoded() -> Iterator[Encoded]:
            return (found for _, found in Encoding(tokenizer, None, 1)(documents(megabytes * 1_000_000)))

        begin = time.process_time()
        size = sum(found for found, _ in encoded())
        encode = size / (time.process_time() - begin)
        # Opened again: what the first pass remembers of words is no part of the second.
        tokenizer = Tokenizer.open(tokenizer.folder)
        begin = time.process_time()
        packed = pack(
            encoded(),
            scratch / "train.bin",
            vocab_size=tokenizer.vocab_size,
            sequence_length=sequence_length,
            limit=None,
        )
        whole = time.process_time() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        part = [document.text for document in read_all(documents(2_000_000))]
        begin = time.process_time()
        by_library = sum(found for found, _ in encode_all(tokenizer.backend, part)) / (time.process_time() - begin)
    return DataSpeed(
        megabytes=size / 1e6,
        tokens=packed.tokens,
        index_mb_s=indexed / 1e6,
        encode_mb_s=encode / 1e6,
        mb_s_a_core=size / whole / 1e6,
        tokens_s_a_core=packed.tokens / whole,
        library_mb_s=by_library / 1e6,
        peak_memory_mb=peak / 1e6,
        slow_because=why_not(tokenizer.backend),
    )
