"""Which documents are held out: a function of each document alone."""

from __future__ import annotations

HELDOUT_PART = 16
"""One document in this many is held out, by expectation."""


def is_heldout(text_sha256: bytes) -> bool:
    """Whether a document is held out, by the digest of its text.

    The text decides, not the name: two copies of a text fall on the same side, so nothing that is held out is ever
    trained on; and adding documents to a corpus moves none of the others.
    """
    return int.from_bytes(text_sha256[:8], "big") % HELDOUT_PART == 0
