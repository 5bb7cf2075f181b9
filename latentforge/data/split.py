"""Which documents are held out, and the order in which documents are packed: functions of each document alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from latentforge.data.corpus import Entry

HELDOUT_PART = 16
"""One document in this many is held out, by expectation."""


def is_heldout(text_sha256: bytes) -> bool:
    """Whether a document is held out, by the digest of its text.

    The text decides, not the name: two copies of a text fall on the same side, so nothing that is held out is ever
    trained on; and adding documents to a corpus moves none of the others.
    """
    return int.from_bytes(text_sha256[:8], "big") % HELDOUT_PART == 0


def packing_order(entries: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
    """(training, held-out) documents, each ordered by sha256 of the name: a fixed shuffle without a seed."""
    ordered = sorted(entries, key=lambda entry: hashlib.sha256(entry.name.encode()).digest())
    train = [entry for entry in ordered if not is_heldout(entry.sha256)]
    heldout = [entry for entry in ordered if is_heldout(entry.sha256)]
    return train, heldout
