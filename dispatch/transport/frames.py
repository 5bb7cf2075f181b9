"""Frames out of a byte stream that comes in pieces: for a verb that answers again and again over one channel."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from dispatch.agent.protocol import Frame

_BEGIN = re.compile(rb"\n=LF-BEGIN ([0-9]{1,12})=\n")
_END = b"\n=LF-END=\n"
_MARK = b"\n=LF-BEGIN "
_HEAD = len(_MARK) + 14
_MOST_NOISE = 1 << 20


class FrameReader:
    """Finds whole frames, wherever the pieces are cut and whatever a login shell printed before the first.

    What is held is one frame at most (an answer's payload is bounded by the request) and the last MiB of noise.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = 0
        self.noise = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that these bytes complete."""
        self._buffer += data
        while len(self._buffer) >= self._needed and (frame := self._whole()) is not None:
            yield frame

    def _whole(self) -> Frame | None:
        buffer, self._needed, at = self._buffer, 0, -1
        while (at := buffer.find(_MARK, at + 1)) >= 0:
            head = _BEGIN.match(bytes(buffer[at : at + _HEAD]))
            if head is None:
                if len(buffer) < at + _HEAD:
                    return None
                continue
            start = at + head.end()
            stop = start + int(head[1])
            body = stop + len(_END)
            if len(buffer) < body:
                if buffer.find(_MARK, start) < 0:
                    return None
                continue  # noise that looks like a beginning must not hide the real one behind it
            if buffer[stop:body] != _END:
                continue
            try:
                document = json.loads(buffer[start:stop])
                size = int(document["payload_bytes"])
            except (ValueError, KeyError, TypeError):
                continue
            if len(buffer) < body + size:
                self._needed = body + size
                return None
            noise = bytes(buffer[:at])
            self.noise = self.noise or noise
            with memoryview(buffer) as view:
                payload = bytes(view[body : body + size])
            del buffer[: body + size]
            return Frame(noise, document, payload, b"")
        if len(buffer) > _MOST_NOISE:
            del buffer[:-_MOST_NOISE]
        return None
