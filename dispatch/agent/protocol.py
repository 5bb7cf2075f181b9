"""The agent's side of the wire: one request on stdin, one framed reply on stdout, errors as values."""

from __future__ import annotations

import json
import re
from typing import Any, BinaryIO, NamedTuple

MAX_REQUEST_LINE = 32 << 20
_LONGEST_QUOTE = 200
_BEGIN = re.compile(rb"\n=LF-BEGIN ([0-9]{1,12})=\n")
_END = b"\n=LF-END=\n"
HERE = b"\n=LF-HERE=\n"
"""What the bootstrap says at once: the login shell is over, the agent begins."""

# The exit codes of the command line, as far as the agent speaks of them.
PASS, FAIL, REFUSED, UNKNOWN, CRASHED, BUSY = 0, 1, 2, 3, 5, 7


class AgentError(Exception):
    """A refusal or unknown outcome: `kind` for programs, a message for people, `next` to do, `code` the exit code."""

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        next: str | None = None,
        code: int = REFUSED,
        detail: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.next = next
        self.code = code
        self.detail = detail or {}

    def as_json(self) -> dict[str, Any]:
        """The `error` object of a reply."""
        return {"kind": self.kind, "message": self.message, "next": self.next, "code": self.code, "detail": self.detail}


class Payload:
    """The bytes that follow a request, read at most once and never beyond their announced length."""

    def __init__(self, stream: BinaryIO, length: int) -> None:
        self._stream = stream
        self.length = length
        self.left = length

    def read(self, size: int = 1 << 20) -> bytes:
        """Up to `size` bytes; empty at the end; an early end of the stream is refused, never taken for the end."""
        if self.left == 0:
            return b""
        # What has come, not the whole of it: what a cut leaves behind must be on disk, and a slow link is heard.
        read = getattr(self._stream, "read1", self._stream.read)
        chunk: bytes = read(min(size, self.left))
        if not chunk:
            raise AgentError(
                "payload",
                f"the payload ended after {self.length - self.left} of {self.length} bytes",
                next="send it again",
            )
        self.left -= len(chunk)
        return chunk

    def drain(self) -> None:
        """Read and drop the rest, so that the sender does not meet a closed pipe."""
        while self.read():
            pass


class Request(NamedTuple):
    """One request: the verb, the state root (None: the host's default), the verb's arguments and payload."""

    verb: str
    root: str | None
    args: dict[str, Any]
    payload: Payload


class Reply(NamedTuple):
    """What a verb gives back: a JSON object and optional raw bytes after the frame."""

    result: dict[str, Any]
    payload: bytes = b""


def shown(value: object) -> str:
    """A value as a refusal quotes it: its beginning, however long it is."""
    text = value if isinstance(value, str) else repr(value)
    short = text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"
    return repr(short) if isinstance(value, str) else short


def read_request(stream: BinaryIO) -> Request:
    """Parse the request line; AgentError(kind="protocol") names what is wrong with it."""
    line = stream.readline(MAX_REQUEST_LINE)
    if not line.endswith(b"\n"):
        raise AgentError("protocol", f"the request line is incomplete ({len(line)} bytes without an end of line)")
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AgentError("protocol", f"the request is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise AgentError("protocol", "the request is not a JSON object")
    extra = sorted(set(document) - {"verb", "root", "args", "payload_bytes"})
    if extra:
        raise AgentError("protocol", f"the request has an unknown field {extra[0]!r}")
    verb, root = document.get("verb"), document.get("root")
    args, length = document.get("args", {}), document.get("payload_bytes", 0)
    if not isinstance(verb, str):
        raise AgentError("protocol", f"verb={shown(verb)} is not a string")
    if root is not None and not isinstance(root, str):
        raise AgentError("protocol", f"root={shown(root)} is neither null nor a path")
    if not isinstance(args, dict):
        raise AgentError("protocol", f"args={shown(args)} is not an object")
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise AgentError("protocol", f"payload_bytes={shown(length)} is not a byte count")
    return Request(verb, root, args, Payload(stream, length))


def encode_request(
    verb: str, *, root: str | None = None, args: dict[str, Any] | None = None, payload: bytes = b""
) -> bytes:
    """The bytes of one request, for the side that asks."""
    document = {"verb": verb, "root": root, "args": args or {}, "payload_bytes": len(payload)}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n" + payload


def encode_reply(document: dict[str, Any], payload: bytes = b"") -> bytes:
    """The framed reply with its payload."""
    body = json.dumps({**document, "payload_bytes": len(payload)}, separators=(",", ":")).encode()
    return b"\n=LF-BEGIN %d=\n" % len(body) + body + _END + payload


class Frame(NamedTuple):
    """A reply found in a byte stream: the noise before it, the document, the payload (whole) and whatever follows."""

    noise: bytes
    document: dict[str, Any]
    payload: bytes
    rest: bytes


def find_frame(data: bytes) -> Frame | None:
    """The first whole frame in `data`, whatever a login shell printed before it; None when there is none (yet)."""
    for match in _BEGIN.finditer(data):
        start, length = match.end(), int(match.group(1))
        stop = start + length
        if data[stop : stop + len(_END)] != _END:
            continue
        try:
            document = json.loads(data[start:stop])
        except ValueError:
            continue
        if not isinstance(document, dict) or "ok" not in document:
            continue
        body = stop + len(_END)
        size = document.get("payload_bytes", 0)
        if not isinstance(size, int) or len(data) < body + size:
            return None
        return Frame(data[: match.start()].replace(HERE, b""), document, data[body : body + size], data[body + size :])
    return None


class Arguments:
    """A verb's arguments, taken one by one with their types; what is missing, wrong or left over is refused by name."""

    def __init__(self, verb: str, args: dict[str, Any]) -> None:
        self._verb = verb
        self._args = dict(args)

    def _take(self, name: str, kinds: tuple[type, ...], default: Any, required: bool, what: str) -> Any:
        if name not in self._args:
            if required:
                raise AgentError("protocol", f"{self._verb}: {name} is missing")
            return default
        value = self._args.pop(name)
        if value is None and not required:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            told = "what was given" if name == "secrets" else shown(value)
            raise AgentError("protocol", f"{self._verb}: {name}={told} is not {what}")
        return value

    def text(self, name: str) -> str:
        """A required string."""
        return str(self._take(name, (str,), None, True, "a string"))

    def optional_text(self, name: str) -> str | None:
        """A string or None."""
        value: str | None = self._take(name, (str,), None, False, "a string")
        return value

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """A finite number within [low, high]."""
        value = self._take(name, (int, float), default, False, "a number")
        if not low <= value <= high:
            raise AgentError("protocol", f"{self._verb}: {name}={shown(value)} is outside {low} to {high}")
        return float(value)

    def flag(self, name: str) -> bool:
        """A boolean, False when absent."""
        return bool(self._take(name, (bool,), False, False, "true or false"))

    def table(self, name: str, *, required: bool = False) -> dict[str, Any]:
        """An object, empty when absent."""
        value: dict[str, Any] = self._take(name, (dict,), {}, required, "an object")
        return value

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A list of objects, empty when absent."""
        value = self._take(name, (list,), [], False, "a list")
        for item in value:
            if not isinstance(item, dict):
                raise AgentError("protocol", f"{self._verb}: {name} holds {shown(item)}, which is not an object")
        return list(value)

    def texts(self, name: str) -> list[str]:
        """A list of strings, empty when absent."""
        value = self._take(name, (list,), [], False, "a list")
        for item in value:
            if not isinstance(item, str):
                raise AgentError("protocol", f"{self._verb}: {name} holds {shown(item)}, which is not a string")
        return list(value)

    def has(self, name: str) -> bool:
        """Whether the argument was given."""
        return self._args.get(name) is not None

    def done(self) -> None:
        """Refuse arguments that nobody took."""
        if self._args:
            raise AgentError("protocol", f"{self._verb}: unknown argument {sorted(self._args)[0]!r}")
