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

    def heldout(entry: Entry) -> bool:
        by = entry.sha256 if split_by == "text" else hashlib.sha256(entry.name.encode()).digest()
        return is_heldout(by)

    with tempfile.TemporaryDirectory(prefix="latentforge-check-") as name:
        folder = Path(name)
        for number in range(200):
            # Each text twice, under two names.
            (folder / f"{number}.txt").write_text(f"text {number // 2}")
        before = Corpus.open(folder)
        sides = {entry.name: heldout(entry) for entry in before.entries}
        train = {entry.sha256 for entry in before.entries if not sides[entry.name]}
        both = {entry.sha256 for entry in before.entries if sides[entry.name]} & train
        for number in range(50):
            (folder / f"more {number}.txt").write_text(f"more text {number}")
        moved = sum(heldout(entry) != sides.get(entry.name, heldout(entry)) for entry in Corpus.open(folder).entries)
    count = sum(sides.values())
    text = f"{len(both)} texts on both sides of a split of {len(sides)} documents ({count} held out), {moved} moved"
    return Finding(not both and not moved and count > 0, text, {"both": len(both), "moved": moved, "heldout": count})
