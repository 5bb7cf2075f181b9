"""Checks that contracts name: nothing that is held out is ever trained on."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from latentforge.contracts import Finding


def heldout_is_never_trained_on(*, split_by: str = "text") -> Finding:
    """No text lies on both sides of the split though many occur twice, and adding documents moves none.

    ``split_by="name"`` plants the split by a document's name, under which copies of one text fall on both sides.
    """
    from latentforge.data.corpus import Corpus, Entry
    from latentforge.data.split import is_heldout

    def entries() -> list[Entry]:
        corpus = Corpus.open(folder)
        return [*corpus.entries(heldout=False), *corpus.entries(heldout=True)]

    def heldout(entry: Entry) -> bool:
        by = entry.sha256 if split_by == "text" else hashlib.sha256(entry.name.encode()).digest()
        return is_heldout(by)

    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        folder = Path(name)
        for number in range(200):
            # Each text twice, under two names.
            (folder / f"{number}.txt").write_text(f"text {number // 2}")
        before = entries()
        sides = {entry.name: heldout(entry) for entry in before}
        train = {entry.sha256 for entry in before if not sides[entry.name]}
        both = {entry.sha256 for entry in before if sides[entry.name]} & train
        for number in range(50):
            (folder / f"more {number}.txt").write_text(f"more text {number}")
        moved = sum(heldout(entry) != sides.get(entry.name, heldout(entry)) for entry in entries())
    count = sum(sides.values())
    text = f"{len(both)} texts on both sides of a split of {len(sides)} documents ({count} held out), {moved} moved"
    return Finding(not both and not moved and count > 0, text, {"both": len(both), "moved": moved, "heldout": count})


def heldout_shapes_nothing_trained(*, other: str = "heldout") -> Finding:
    """Two corpora that differ in held-out documents alone give one tokenizer and the same training rows.

    ``other="train"`` plants corpora that differ in training documents.
    """
    from latentforge.data.build import build_shards
    from latentforge.data.split import is_heldout

    def texts(word: str, *, heldout: bool, count: int) -> list[str]:
        many = (f"{word} {number} " + f"{word} and more {word}, " * 30 for number in range(10_000))
        side = (text for text in many if is_heldout(hashlib.sha256(text.encode()).digest()) is heldout)
        return [next(side) for _ in range(count)]

    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        made = []
        for word in ("zqzqzq", "xkvw"):
            corpus = Path(name) / word
            corpus.mkdir()
            train = texts("ordinary" if other == "heldout" else word, heldout=False, count=12)
            heldout = texts(word if other == "heldout" else "ordinary", heldout=True, count=4)
            for number, text in enumerate([*train, *heldout]):
                (corpus / f"{number}.txt").write_text(text)
            out = Path(name) / f"{word} built"
            made.append(
                build_shards(corpus, out, vocab_size=280, sequence_length=16, train_sequences=40, heldout_sequences=8)
            )
        records = [one.record for one in made]
    tokenizer = records[0]["tokenizer_sha256"] == records[1]["tokenizer_sha256"]
    rows = records[0]["shards"]["train.bin"] == records[1]["shards"]["train.bin"]
    heldout_rows = records[0]["shards"]["heldout.bin"] != records[1]["shards"]["heldout.bin"]
    same = {True: "the same", False: "another"}
    text = f"{same[tokenizer]} tokenizer, {same[rows]} training rows, {same[not heldout_rows]} held-out rows"
    return Finding(tokenizer and rows and heldout_rows, text, {"tokenizer": tokenizer, "train": rows})
