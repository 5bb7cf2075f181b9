"""Serves the cross-built extension to the tests: runs in the arm64 Python under qemu, on the standard library alone.

    python guest.py <path of _native.so>

Frames (8 bytes of length, then a pickle) come in on stdin and go out on stdout. A request is a function's name, its
arguments and the blocks of memory that they point into; the reply is the result and what the blocks hold afterwards.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pickle
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

GUARD = 4096  # bytes around each block that no kernel may touch
_PATTERN = b"\xa5" * GUARD


class Block:
    """A copy of a block of the caller's memory, at an address with the same last bits, between two guards."""

    def __init__(self, data: bytes, address: int) -> None:
        self.size = len(data)
        self._buffer = ctypes.create_string_buffer(self.size + 2 * GUARD + 4096)
        start = ctypes.addressof(self._buffer) + GUARD
        self.address = start + (address - start) % 4096
        ctypes.memmove(self.address - GUARD, _PATTERN, GUARD)
        ctypes.memmove(self.address, data, self.size)
        ctypes.memmove(self.address + self.size, _PATTERN, GUARD)

    def content(self) -> bytes:
        """The block as it is now; raises if something was written outside it."""
        for side, start in (("before", self.address - GUARD), ("behind", self.address + self.size)):
            if ctypes.string_at(start, GUARD) != _PATTERN:
                raise MemoryError(f"the kernel wrote {side} a block of {self.size} bytes")
        return ctypes.string_at(self.address, self.size)


def resolved(value: Any, module: Any, blocks: list[Block]) -> Any:
    """An argument as the extension wants it: addresses point into the blocks, objects are made by replaying."""
    match value:
        case ("address", int(index), int(offset)):
            return blocks[index].address + offset
        case ("object", str(name), list(steps)):
            made = getattr(module, name)()
            for kind, attribute, given in steps:
                if kind == "set":
                    setattr(made, attribute, resolved(given, module, blocks))
                else:
                    getattr(made, attribute)(*[resolved(one, module, blocks) for one in given])
            return made
    return value


def answer(module: Any, request: Any) -> tuple[str, Any, list[bytes]]:
    """What is sent back for one request."""
    name, positional, named, memory = request
    try:
        if name is None:
            found = {key: isinstance(getattr(module, key), type) for key in dir(module) if not key.startswith("__")}
            return "ok", found, []
        blocks = [Block(data, address) for data, address in memory]
        given = [resolved(one, module, blocks) for one in positional]
        result = getattr(module, name)(*given, **{k: resolved(v, module, blocks) for k, v in named.items()})
        return "ok", result, [block.content() for block in blocks]
    except Exception as error:
        return type(error).__name__, str(error), []


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame; None where the stream ends."""
    head = stream.read(8)
    return stream.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None


def write_frame(stream: BinaryIO, data: bytes) -> None:
    """One frame."""
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def main(path: str) -> None:
    """Answer until stdin ends."""
    spec = importlib.util.spec_from_file_location("_native", Path(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        write_frame(sys.stdout.buffer, pickle.dumps(answer(module, pickle.loads(frame)), protocol=4))


if __name__ == "__main__":
    main(sys.argv[1])
