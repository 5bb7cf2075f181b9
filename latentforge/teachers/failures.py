"""What can go wrong with a teacher that answers over a wire, told apart by kind."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args
from urllib.parse import urlsplit, urlunsplit

from latentforge.errors import LatentForgeError
from latentforge.verdicts.exitcode import ExitCode

FailureKind = Literal[
    "unauthorized",  # 401, 403
    "model-not-found",  # 404, or a list of models without the wanted one
    "rate-limited",  # 429 after all retries
    "server-error",  # 5xx after all retries
    "timeout",  # no answer in time
    "tls",  # the certificate was not accepted
    "connection",  # nobody listens, or the name is not known
    "cut",  # the answer ended in its middle
    "malformed",  # the answer is not what the protocol says: no JSON, wrong types
    "refused-request",  # 400, 422 and their like: the server does not take the question
    "no-logprobs",  # HTTP 200 without log-probabilities
    "too-few",  # fewer entries a position than were asked
    "collapsed",  # entries keyed by strings that stand for several tokens
    "shifted",  # the echo's log-probabilities belong to the neighbouring position
    "wrong-ids",  # the echoed token ids are not those that were sent
    "not-finite",  # NaN, infinite or positive log-probabilities, or more mass than 1
    "too-long",  # the sequence is longer than the server takes
    "budget",  # one more request would exceed the budget
]
KINDS: tuple[str, ...] = get_args(FailureKind)

RETRIED = frozenset({"rate-limited", "server-error", "timeout", "connection", "cut", "malformed"})
"""Kinds that may pass by themselves; the others give the same answer when they are asked again."""

_CODES: Mapping[str, ExitCode] = MappingProxyType(
    {
        "unauthorized": ExitCode.TRANSPORT,
        "tls": ExitCode.TRANSPORT,
        "connection": ExitCode.TRANSPORT,
        "model-not-found": ExitCode.REFUSED,
        "refused-request": ExitCode.REFUSED,
        "too-long": ExitCode.REFUSED,
        "budget": ExitCode.REFUSED,
        "rate-limited": ExitCode.UNKNOWN,
        "server-error": ExitCode.UNKNOWN,
        "timeout": ExitCode.UNKNOWN,
        "cut": ExitCode.UNKNOWN,
    }
)
_NEXT: Mapping[str, str] = MappingProxyType(
    {
        "unauthorized": "set the key in the environment variable that teacher.api_key_env names",
        "model-not-found": "latentforge teacher check    lists the models that the server has",
        "rate-limited": "run it again later; what was scored is kept. Or lower teacher.concurrency",
        "server-error": "look at the server's log, then run it again; what was scored is kept",
        "timeout": "raise teacher.timeout, or lower teacher.concurrency, then run it again; what was scored is kept",
        "tls": "use the name that the certificate is for, or install its authority on this machine",
        "connection": "start the server (latentforge teacher serve), then run it again; what was scored is kept",
        "cut": "run it again; what was scored is kept",
        "too-long": "lower data.sequence_length, or start the server with a larger --max-model-len",
        "too-few": "lower score.k, or start the server with a larger --max-logprobs",
        "budget": "raise teacher.max_requests or teacher.max_tokens, then run it again; what was scored is kept",
    }
)
_OTHERWISE = "latentforge teacher check    tells what this server can do"


class TeacherFailure(LatentForgeError):
    """A teacher that did not answer, or whose answer is refused. Nothing that was stored before is lost.

    ``kind`` is one of :data:`KINDS`, ``what`` went wrong, ``url`` where it was asked (without user, password and
    query), ``status`` the HTTP status where there was one, ``retry_after`` the seconds that the server asked to wait.
    Exit code 6 only where nothing was sent; 3 where the server may answer another time; 1 where its answer was refused;
    2 where the question was.
    """

    default_code = ExitCode.FAIL

    def __init__(
        self,
        kind: FailureKind,
        what: str,
        *,
        url: str | None = None,
        status: int | None = None,
        next: str | None = None,
        code: ExitCode | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of failure {kind!r}")
        self.kind: FailureKind = kind
        self.what = what
        self.url = None if url is None else public_url(url)
        self.status = status
        self.retry_after: float | None = None
        place = "" if self.url is None else f" {self.url}"
        answer = "" if status is None else f" (HTTP {status})"
        super().__init__(
            f"teacher{place}{answer}: {what} [{kind}]",
            next=next or _NEXT.get(kind, _OTHERWISE),
            code=_CODES.get(kind, ExitCode.FAIL) if code is None else code,
        )

    @property
    def passing(self) -> bool:
        """Whether the same question may be answered another time."""
        return self.kind in RETRIED


def public_url(url: str) -> str:
    """The URL without user, password, query and fragment: what may stand in a log."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return "(an URL that cannot be read)"
    if not parts.netloc and "@" in parts.path:  # a user and a password, perhaps, before which the http:// is missing
        return "(an URL without a host)"
    return urlunsplit((parts.scheme, f"[{host}]{port}" if ":" in host else f"{host}{port}", parts.path, "", ""))
