"""One HTTP server: requests over a pool of connections, every way of failing told apart, the key never shown."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx2

from latentforge.errors import RefusedError
from latentforge.teachers.failures import FailureKind, TeacherFailure, public_url

LARGEST_ANSWER = 1 << 30
_CONNECT_SECONDS = 10.0
_SHOWN = 240
_TOO_LONG = re.compile(r"context length|maximum model length|max_model_len|too long|maximum length|input_tokens", re.I)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")


class HttpClient:
    """``POST`` and ``GET`` of JSON below ``url`` (``https://host/v1``).

    ``key`` is sent as a bearer token and to this host only: redirects are not followed. It stands in no error, no log
    and no ``repr``. ``timeout`` (seconds) bounds a whole answer, its headers too, however slowly it drips. Certificates
    are verified always; ``SSL_CERT_FILE`` names authorities of one's own. Safe to use from several threads, each of
    which has its own deadline.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60.0, connections: int = 8) -> None:
        parts = _checked(url)
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._key = key
        headers = {"Accept": "application/json"}
        if key is not None:
            # Blanks around it are lost on the way: the server would repeat a key that is not the one to hide.
            if not key.isascii() or not key.isprintable() or key != key.strip() or not key:
                raise RefusedError(f"the key for {public_url(url)} holds characters that no header can carry")
            headers["Authorization"] = f"Bearer {key}"
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._due = threading.local()
        local = _is_loopback(parts.hostname or "")
        self.clear_text = parts.scheme == "http" and key is not None and not local
        try:
            self._client = httpx2.Client(
                headers=headers,
                timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS), pool=None),
                limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
                follow_redirects=False,
                # A proxy of the environment cannot reach this machine's own loopback.
                trust_env=not local,
                verify=ssl_context() if parts.scheme == "https" else False,
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            # Only the kind of the error: a proxy's URL may hold a password.
            raise RefusedError(
                f"the proxy that this environment names cannot be used ({type(error).__name__})",
                next="mend or unset ALL_PROXY, HTTP_PROXY, HTTPS_PROXY (http:// proxies are known)",
            ) from None

    def __repr__(self) -> str:
        return f"HttpClient({public_url(self.url)!r})"

    def close(self) -> None:
        """Close every connection; a request in flight in another thread fails at once."""
        with self._lock:
            open_ones = list(self._sockets)
        for one in open_ones:
            # To close a socket does not wake who waits for its bytes; to shut it down does.
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._client.close()

    def above(self) -> HttpClient:
        """A client of the same server one level above ``/v1``, where it answers what OpenAI's API does not know."""
        return HttpClient(self.url.removesuffix("/v1"), key=self._key, timeout=self.timeout, connections=1)

    def _remember(self, event: str, info: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._bound(info["return_value"])
            opened = info["return_value"].get_extra_info("socket")
            if opened is not None:
                with self._lock:
                    self._sockets.add(opened)

    def _bound(self, stream: Any) -> None:
        """Let each read and write of a connection end when the request that it is for must: httpx bounds each alone."""

        def ending(call: Callable[..., Any]) -> Callable[..., Any]:
            def bounded(what: Any, timeout: float | None = None) -> Any:
                left = self._due.at - time.monotonic()
                if left <= 0:
                    raise httpx2.ReadTimeout("the deadline of the whole answer")
                return call(what, timeout=left if timeout is None else min(left, timeout))

            return bounded

        stream.read, stream.write = ending(stream.read), ending(stream.write)

    @contextmanager
    def hiding(self) -> Iterator[None]:
        """Hide the key in what is said of an answer that is read within: servers repeat it in answers of 200 too."""
        try:
            yield
        except TeacherFailure as failure:
            failure.args = (self._shown(str(failure)),)
            raise

    def get(self, path: str) -> Any:
        """The JSON value at ``path`` (``/models``). Raises TeacherFailure."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON value that the server answers to ``body``. Raises TeacherFailure."""
        return self._ask("POST", path, body)

    def failure(self, kind: FailureKind, what: str, *, status: int | None = None, next: str | None = None) -> NoReturn:
        """Raise what is wrong with this server's answer."""
        raise TeacherFailure(kind, self._shown(what), url=self.url, status=status, next=next) from None

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        deadline = self._due.at = time.monotonic() + self.timeout
        content = None if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        typed = {} if content is None else {"Content-Type": "application/json"}
        began = False
        try:
            traced = {"trace": self._remember}
            with self._client.stream(
                method, self.url + path, content=content, headers=typed, extensions=traced
            ) as answer:
                began = True
                raw = self._read(answer, deadline)
                status, headers = answer.status_code, answer.headers
        except httpx2.ConnectTimeout:
            self.failure("timeout", f"no connection within {min(self.timeout, _CONNECT_SECONDS):g} s")
        except httpx2.TimeoutException:
            self.failure("timeout", f"no whole answer within {self.timeout:g} s")
        except httpx2.ConnectError as error:
            if _is_tls(error):
                self.failure("tls", f"the certificate is not accepted: {_reason(error)}")
            self.failure("connection", f"cannot be reached: {_reason(error)}")
        except httpx2.ProxyError as error:
            self.failure("connection", f"the proxy of this environment refused: {_reason(error)}")
        except httpx2.DecodingError as error:
            self.failure("malformed", f"the body cannot be decompressed: {_reason(error)}")
        except (httpx2.TransportError, httpx2.StreamError, ssl.SSLError, OSError) as error:
            where = "in the middle of its answer" if began else "before it answered"
            self.failure("cut", f"the server went away {where}: {_reason(error)}")
        except RuntimeError as error:  # httpx says so where the client was closed by another thread
            self.failure("cut", f"the client was closed: {_reason(error)}")
        if status != 200:
            self._refuse(status, headers, raw)
        try:
            # Python's reader takes NaN and Infinity, which JSON has not: they come through and are told as not finite.
            return json.loads(raw, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            said = _shown(raw, self._shown)
            self.failure("malformed", f"the answer is not JSON ({_reason(error)}): {said}", status=status)

    def _read(self, answer: httpx2.Response, deadline: float) -> bytes:
        parts, size = [], 0
        for part in answer.iter_bytes():
            parts.append(part)
            size += len(part)
            if size > LARGEST_ANSWER:
                self.failure("malformed", f"the answer is larger than {LARGEST_ANSWER >> 20} MiB")
            if time.monotonic() > deadline:
                self.failure("timeout", f"no whole answer within {self.timeout:g} s ({size} bytes of it came)")
        return b"".join(parts)

    def _refuse(self, status: int, headers: Mapping[str, str], raw: bytes) -> NoReturn:
        message = _message(raw, self._shown)
        kind: FailureKind = "refused-request"
        hint = None
        if status in (401, 403):
            kind = "unauthorized"
        elif status == 404:
            kind = "model-not-found"
            if "model" not in message.lower():
                hint = "check teacher.url: it usually ends in /v1"
        elif status == 408:
            kind = "timeout"
        elif status == 429:
            kind = "rate-limited"
        elif status >= 500:
            kind = "server-error"
        elif 300 <= status < 400:
            message = f"answers from another place: {public_url(headers.get('location', ''))}"
            hint = "name that URL in teacher.url, if you trust it"
        elif _TOO_LONG.search(message):
            kind = "too-long"
        failure = TeacherFailure(kind, self._shown(message), url=self.url, status=status, next=hint)
        failure.retry_after = retry_after(headers)
        raise failure

    def _shown(self, text: str) -> str:
        # Servers like to repeat the key that they refuse.
        hidden = text if self._key is None else text.replace(self._key, "•••")
        # JSON can spell half of a character, which nothing can print.
        return _CONTROL.sub(" ", hidden.encode("utf-8", "replace").decode())


def ssl_context() -> ssl.SSLContext:
    """Certificates verified against this machine's authorities, or those of ``SSL_CERT_FILE``."""
    try:
        context = httpx2.create_ssl_context()
    except (OSError, ssl.SSLError) as error:
        raise RefusedError(
            f"the authorities that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read: {_reason(error)}",
            next="name a file of certificates in PEM form, or unset it",
        ) from None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    return context


def retry_after(headers: Mapping[str, str], *, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that ``Retry-After`` asks to wait: a number, or a date (against the server's own ``Date``); else None."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return min(float(value), 1e9)
    until = _seconds(value)
    if until is None:
        return None
    # A clock that is wrong on either side does not matter where the server says what it thinks the time is.
    said = _seconds(headers.get("date", ""))
    return max(0.0, until - (now() if said is None else said))


def _seconds(date: str) -> float | None:
    try:
        value = parsedate_to_datetime(date)
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _checked(url: str) -> Any:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        fits = fits and not any(character.isspace() for character in url)
        httpx2.URL(url)  # is stricter: blanks, control characters, names that are no host's
    except (ValueError, httpx2.InvalidURL):
        fits = False
    if not fits:
        raise RefusedError(f"teacher.url {public_url(url)!r} is not an http(s) URL", next="https://host:port/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RefusedError(
            f"teacher.url {public_url(url)!r} carries a user, a password or a query: it would stand in logs",
            next="put the key into an environment variable and its name into teacher.api_key_env",
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_tls(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLError):
            return True
        seen = seen.__cause__ or seen.__context__
    return "CERTIFICATE" in str(error).upper() or "[SSL" in str(error)


def _reason(error: BaseException) -> str:
    return ((str(error).strip() or type(error).__name__).splitlines())[0][:_SHOWN]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that is there twice is refused: one of the two would be lost in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has one key twice")
    return found


def _message(raw: bytes, hide: Callable[[str], str]) -> str:
    """What an error body says: ``error.message`` as OpenAI and vLLM write it, else its beginning.

    ``hide`` sees all of it before it is cut: half of a key is a secret too.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return _shown(raw, hide)
    for path in (("error", "message"), ("message",), ("detail",), ("error",)):
        found = value
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str) and found.strip():
            return hide(found).strip()[:_SHOWN]
    return _shown(raw, hide)


def _shown(raw: bytes, hide: Callable[[str], str]) -> str:
    text = hide(raw[: 1 << 16].decode("utf-8", "replace")).strip()
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…") if text else "no text"
