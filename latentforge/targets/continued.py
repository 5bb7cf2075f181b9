"""What a teacher went on with after each chunk of one sequence, and the bytes that keep it (LFC1)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import zstandard

from latentforge.errors import RefusedError
from latentforge.targets import sealing

MAGIC = b"LFC1"
ABSENT = -1

# magic, bytes of an id, temperatures, contexts that are continued, draws, chunk, bytes of the frame
_HEAD = struct.Struct("<4sBBIIII")

Ids = npt.NDArray[np.int32]
Tokens = npt.NDArray[np.int64]


def contexts(tokens: npt.NDArray[np.integer], chunk: int, eos_id: int) -> npt.NDArray[np.bool_]:
    """Which contexts of rows ``tokens`` [..., C * chunk] are continued, bool [..., C - 1]: those that end inside a
    document. After a chunk that holds EOS another document begins, of which nothing can be foretold.

    RefusedError where ``chunk`` does not divide a row.
    """
    length = tokens.shape[-1]
    if chunk < 1 or length % chunk or not length:
        raise RefusedError(
            f"rows of {length} tokens do not split into chunks of {chunk}",
            next="set data.sequence_length to a multiple of data.chunk",
        )
    chunks = np.asarray(tokens).reshape(*tokens.shape[:-1], length // chunk, chunk)
    return np.asarray((chunks[..., :-1, :] != eos_id).all(axis=-1))


def absorbed(ids: Ids, eos_id: int) -> Ids:
    """``ids`` [..., K] with everything after the first EOS replaced by EOS: a text that has ended is one outcome."""
    ended = np.logical_or.accumulate(ids == eos_id, axis=-1)
    return np.where(ended, np.int32(eos_id), ids).astype(np.int32)


def check_drawn(
    drawn: Mapping[float, Ids],
    given: npt.NDArray[np.bool_],
    *,
    temperatures: tuple[float, ...],
    count: int,
    chunk: int,
    vocab_size: int,
) -> None:
    """Refuse what cannot be a teacher's continuations of one sequence, whose contexts ``given`` bool [C - 1] says.

    ``drawn`` maps each temperature to whole numbers [C - 1, count, chunk]: ids below ``vocab_size``, and -1 in every
    place of a context that is not continued.
    """
    if tuple(drawn) != temperatures:
        raise RefusedError(f"continuations are for T = {list(drawn)}; {list(temperatures)} was asked")
    for temperature, ids in drawn.items():
        if ids.shape != (len(given), count, chunk) or ids.dtype.kind != "i":
            raise RefusedError(
                f"continuations at T = {temperature:g} are {ids.dtype} {list(ids.shape)}; whole numbers "
                f"[{len(given)}, {count}, {chunk}] were asked"
            )
        there = ids[given]
        if there.size and (there.min() < 0 or there.max() >= vocab_size):
            raise RefusedError(
                f"continuations at T = {temperature:g} hold ids {there.min()}..{there.max()}, outside the vocabulary "
                f"of {vocab_size} tokens"
            )
        if (ids[~given] != ABSENT).any():
            raise RefusedError(
                f"continuations at T = {temperature:g} hold tokens after a chunk in which a document ends"
            )


def pack(key: bytes, drawn: Mapping[float, Ids], given: npt.NDArray[np.bool_], *, vocab_size: int) -> bytes:
    """The bytes of a checked row: head, checksum, ids of the continued contexts, temperature by temperature."""
    kind = _kind(vocab_size)
    ids = np.stack([values[given] for values in drawn.values()]).astype(kind)
    frame = sealing.compressor().compress(ids.tobytes())
    temperatures, many, count, chunk = ids.shape
    head = _HEAD.pack(MAGIC, kind.itemsize, temperatures, many, count, chunk, len(frame))
    return head + sealing.checksum(key, head, frame) + frame


def unpack(key: bytes, value: bytes, *, temperatures: tuple[float, ...], vocab_size: int) -> dict[float, Ids]:
    """The ids of the continued contexts, int32 [contexts, draws, chunk] by temperature; RefusedError where a single bit
    is not what was written under this key."""
    begin = _HEAD.size + sealing.CHECK_BYTES
    head, frame = value[: _HEAD.size], value[begin:]
    if len(value) < begin or value[_HEAD.size : begin] != sealing.checksum(key, head, frame):
        raise sealing.damaged(key, "continuations", "the same with --attempt next: damaged rows are drawn anew")
    magic, size, many, given, count, chunk, length = _HEAD.unpack(head)
    kind = _kind(vocab_size)
    if magic != MAGIC or size != kind.itemsize or many != len(temperatures) or length != len(frame):
        raise RefusedError(f"row {key.hex()[:12]}… is of another format ({magic!r}, {many} temperatures)")
    shape = many, given, count, chunk
    wanted = size * many * given * count * chunk
    try:
        content = sealing.decompressor().decompress(frame, max_output_size=wanted) if wanted else b""
        ids = np.frombuffer(content, kind).reshape(shape).astype(np.int32)
    except (ValueError, zstandard.ZstdError) as error:
        # Its checksum is right: whoever wrote it wrote something else than this format.
        raise RefusedError(f"row {key.hex()[:12]}… contradicts itself ({error})") from None
    return dict(zip(temperatures, ids, strict=True))


def _kind(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype(np.min_scalar_type(vocab_size - 1)).newbyteorder("<")
