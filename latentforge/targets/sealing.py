"""What keeps a store's row from being read wrong: a checksum over key and content; and how its streams are packed."""

from __future__ import annotations

import hashlib
import threading

import zstandard

from latentforge.errors import RefusedError

CHECK_BYTES = 16
_ZSTD_LEVEL = 3
_PER_THREAD = threading.local()


def checksum(key: bytes, head: bytes, body: bytes | memoryview) -> bytes:
    """16 bytes over a row's key (a moved row is refused), head and body."""
    digest = hashlib.sha256(key + head)  # the processors in question have instructions for it
    digest.update(body)
    return digest.digest()[:CHECK_BYTES]


def compressor() -> zstandard.ZstdCompressor:
    """What packs the streams of a row: each is one frame, whose length the row's own head gives."""
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=False, write_checksum=False)


def decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: making one costs half of what decompressing a row does, and it must not be shared."""
    if not hasattr(_PER_THREAD, "decompressor"):
        _PER_THREAD.decompressor = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _PER_THREAD.decompressor
    return found


def damaged(key: bytes, what: str, next: str) -> RefusedError:
    """The refusal of a row whose checksum is not that of its content; ``what`` names the store."""
    return RefusedError(f"row {key.hex()[:12]}… of the store of {what} is damaged (checksum)", next=next)
