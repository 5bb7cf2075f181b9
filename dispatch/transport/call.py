"""The agent's protocol from the laptop's side: verbs, replies, and errors raised with the agent's own exit code."""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from dispatch import agent_package
from dispatch.agent.protocol import HERE, Frame, encode_request, find_frame
from dispatch.hosts.inventory import Host
from dispatch.transport.frames import FrameReader
from dispatch.transport.link import LinkError, LinkLostError, told
from latentforge.errors import BusyError, LatentForgeError, RefusedError
from latentforge.verdicts import ExitCode

READING = frozenset({"probe", "status", "read", "follow", "collect", "fetch"})
"""The verbs that create nothing on a host: all that a preview may use."""

CALL_SECONDS = 30.0
_CANNOT = re.compile(rb"(?i)not found|no such file|unknown command|permission denied|cannot execute|is a directory")
_SEEN = 4096
# The words of nologin, of OpenSSH's internal-sftp, and of restricted shells.
_NO_COMMANDS = re.compile(rb"(?i)account is (?:currently )?not available|sftp connections only|restricted")


@dataclass(frozen=True)
class Reply:
    """What the agent answered; ``noise`` is what a login shell printed before it."""

    result: dict[str, Any]
    payload: bytes
    agent: str
    noise: bytes


@dataclass(frozen=True)
class Exchange:
    """One remote process: what it wrote, and its exit status (None where the link broke before it was known)."""

    stdout: bytes
    stderr: bytes
    status: int | None


class _AgentGoneError(Exception):
    """The installed agent is not there any more."""


class Transport(ABC):
    """A host's agent, called verb by verb.

    A read-only transport permits the reading verbs alone and pipes the agent through stdin, so that a preview leaves no
    trace. Otherwise the agent is piped until ``install`` has put it on the host, and run from there afterwards.
    """

    def __init__(self, host: Host, *, readonly: bool = False) -> None:
        self.host = host
        self.readonly = readonly
        self._installed = False

    @property
    def agent(self) -> str:
        """sha256 of the agent that this laptop ships."""
        return agent_package.agent_sha256()

    @abstractmethod
    def exchange(self, argv: list[str], stdin: bytes, *, timeout: float) -> Exchange:
        """Run a program on the host with these bytes on stdin; LinkLostError where the link breaks."""

    @abstractmethod
    def pieces(self, argv: list[str], stdin: bytes, *, silence: float) -> Generator[bytes, None, Exchange]:
        """Run a program on the host and yield what it writes, as it comes; returns how it ended.

        LinkLostError where the link breaks, or nothing comes for ``silence`` seconds. To close it ends the program.
        """

    def open(self) -> None:
        """Connect now, where that takes time, rather than within the next call."""
        return

    @abstractmethod
    def close(self) -> None:
        """Give back what the connection holds; the next call opens it again."""

    def call(self, verb: str, args: dict[str, Any], payload: bytes = b"", *, timeout: float = CALL_SECONDS) -> Reply:
        """One request and its reply; errors of the agent are raised with their own message, remedy and exit code."""
        if self.readonly and verb not in READING:
            raise RefusedError(f"verb {verb!r} was asked of {self.host.name} in a preview, which only reads")
        request = encode_request(verb, root=self.host.root, args=args, payload=payload)
        argv = self._argv
        if self._installed:
            try:
                return self._reply(
                    self.exchange(argv, agent_package.installed(self.host.root) + request, timeout=timeout)
                )
            except _AgentGoneError:
                self._installed = False
        return self._reply(self.exchange(argv, agent_package.carried(verb) + request, timeout=timeout))

    def ahead(self, verb: str) -> None:  # noqa: B027 (to do nothing is right for most)
        """Begin what the first call will need, if it is to be of this verb; errors are raised by that call.

        The host is asked nothing by that. A carrier that gains nothing does nothing here.
        """

    @property
    def _argv(self) -> list[str]:
        return agent_package.bootstrap_argv(self.host.python)

    def stream(self, verb: str, args: dict[str, Any], *, silence: float) -> Iterator[Reply]:
        """One request to a verb that answers again and again, to the answer that says that it is the last."""
        if self.readonly and verb not in READING:
            raise RefusedError(f"verb {verb!r} was asked of {self.host.name} in a preview, which only reads")
        request = encode_request(verb, root=self.host.root, args=args)
        if self._installed:
            try:
                yield from self._replies(agent_package.installed(self.host.root) + request, silence)
                return
            except _AgentGoneError:
                self._installed = False
        yield from self._replies(agent_package.carried() + request, silence)

    def _replies(self, stdin: bytes, silence: float) -> Iterator[Reply]:
        frames, pieces, seen = FrameReader(), self.pieces(self._argv, stdin, silence=silence), bytearray()
        try:
            while True:
                piece = next(pieces)
                if len(seen) < _SEEN:
                    seen += piece[: _SEEN - len(seen)]
                for frame in frames.feed(piece):
                    reply = self._taken(frame)
                    yield reply
                    if reply.result.get("last"):
                        return
        except StopIteration as ended:
            how: Exchange = ended.value
            raise self._no_reply(Exchange(bytes(seen), how.stderr, how.status)) from None
        finally:
            pieces.close()

    def install(self) -> None:
        """Put the agent on the host under its own digest; later calls run it from there."""
        if not self._installed:
            self.call("install", {})
            self._installed = True

    def _reply(self, ended: Exchange) -> Reply:
        frame = find_frame(ended.stdout)
        if frame is None:
            raise self._no_reply(ended)
        return self._taken(frame)

    def _taken(self, frame: Frame) -> Reply:
        if not frame.document["ok"]:
            if (frame.document.get("error") or {}).get("kind") in ("agent-missing", "agent-corrupt"):
                raise _AgentGoneError
            raise _agent_error(frame.document.get("error") or {}, self.host)
        return Reply(frame.document["result"], frame.payload, str(frame.document.get("agent", "")), frame.noise)

    def _no_reply(self, ended: Exchange) -> LatentForgeError:
        name, said = self.host.name, told(ended.stderr.strip() or ended.stdout.replace(HERE, b""))
        if ended.status is None or b"=LF-BEGIN" in ended.stdout:
            return LinkLostError(f"{name}: the connection ended within a reply")
        if HERE.strip() in ended.stdout:
            return LinkLostError(f"{name}: the agent ended (status {ended.status}) within a call; it said: {said}")
        if _says_no(ended.stderr, self.host.python):
            return LinkError(
                "no python",
                f"{name}: {self.host.python!r} cannot be run there ({said})",
                next=f"latentforge dispatch enrol {name} --python PATH",
            )
        by_hand = shlex.join(["ssh", *(["-p", str(self.host.port)] if self.host.port else []), _login(self.host)])
        if _NO_COMMANDS.search(ended.stdout + ended.stderr):
            return LinkError(
                "no commands",
                f"{name}: the account may log in there, but may not run commands; its shell said: {said}",
                next=f"another user:  latentforge dispatch enrol {name} --user USER",
            )
        return LinkError(
            "shell noise",
            f"{name}: the login shell ended (status {ended.status}) without running the agent; it said: {said}",
            next=f"{by_hand} true   must succeed and print nothing; look for `exit`, `read` and `exec` in its rc files",
        )


def _says_no(stderr: bytes, python: str) -> bool:
    """Whether a shell says that it cannot run the program: each in its words, not all of them with status 127."""
    wanted = python.encode()
    return any(wanted in line and _CANNOT.search(line) for line in stderr.splitlines())


def _login(host: Host) -> str:
    return f"{host.user}@{host.address}" if host.user else host.address


def _agent_error(error: dict[str, Any], host: Host) -> LatentForgeError:
    try:
        code = ExitCode(int(error.get("code", ExitCode.UNKNOWN)))
    except ValueError:
        code = ExitCode.UNKNOWN
    message = str(error.get("message", "the agent failed without a message"))
    if not host.is_local:
        message = f"{host.name}: {message}"
    kind = BusyError if code is ExitCode.BUSY else LatentForgeError
    return kind(message, next=error.get("next"), code=code)
