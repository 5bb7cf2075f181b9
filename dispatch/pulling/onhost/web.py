"""A server that speaks as the hub does: questions that are asked again, files that go on where they were cut."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import http.client
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ATTEMPTS = 6
"""How often in a row something may fail without bringing the file forward."""
LONGEST_WAIT = 30.0
CHUNK = 1 << 20
_SILENCE = 30.0


class Again(Exception):
    """A failure that may pass by itself; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, why: str, wait: float = 0.0, status: int | None = None) -> None:
        super().__init__(why)
        self.wait = wait
        self.status = status


class Refused(Exception):
    """A failure that will not pass by itself; ``next`` is what to do about it."""

    def __init__(self, why: str, next: str | None = None) -> None:
        super().__init__(why)
        self.next = next


class Hub:
    """A server that speaks as the hub does: files by revision and path, in ranges, behind redirects."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.url = str(asked["url"])
        self.moved = self.restarts = 0
        self._silence = float(asked.get("silence", _SILENCE))
        self._token = read_token(self.url, asked.get("token"))
        self._opener = urllib.request.build_opener(_Redirects(), *_no_other_schemes())

    def finish(self, pieces: list[str]) -> None:
        """There is nothing to drop."""

    def open(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """The server's answer; Again for what may pass, Refused for what will not."""
        request = urllib.request.Request(
            url, headers={"User-Agent": "latentforge", "Accept-Encoding": "identity", **headers}
        )
        if self._token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            reply: http.client.HTTPResponse = self._opener.open(request, timeout=self._silence)
        except urllib.error.HTTPError as error:
            with error:
                here = _origin(error.url or url) == _origin(url)
                raise _judged(error, url, has_token=self._token is not None, at_hub=here) from None
        except (OSError, http.client.HTTPException) as error:
            raise Again(f"no answer ({_words(error)})") from None
        except ValueError as error:
            raise Refused(f"the server redirects to what is no address ({error})") from None
        if (encoding := reply.headers.get("Content-Encoding", "identity")) != "identity":
            reply.close()
            raise Refused(
                f"{urllib.parse.urlsplit(reply.url).netloc} packs what it sends ({encoding}) though it was asked "
                "not to, so that neither sizes nor ranges mean anything",
                "is there a proxy between that changes what passes? Name the server in no_proxy",
            )
        return reply

    def get(self, path: str, size: int, part: Path) -> None:
        """Append what is missing of a file; from its beginning where the server ignores ranges or the file changed."""
        have, note = part.stat().st_size if part.exists() else 0, part.with_suffix(".etag")
        headers = {}
        if have > size:
            part.unlink()
            have = 0
        if have:
            headers["Range"] = f"bytes={have}-"
            with contextlib.suppress(FileNotFoundError):
                headers["If-Range"] = note.read_text()
        try:
            opened = self.open(self.url + urllib.parse.quote(path), headers)
        except Again as error:
            if error.status == 416:  # what is here is longer than what the server has
                part.unlink(missing_ok=True)
            raise
        with opened as reply:
            begin = self._begins(reply, size, have, part)
            self.restarts += bool(have and not begin)
            etag = reply.headers.get("ETag", "")
            if etag.startswith('"'):
                note.write_text(etag)
            elif not begin:
                note.unlink(missing_ok=True)
            with open(part, "ab" if begin else "wb") as stream:
                have = begin
                try:
                    while have <= size and (chunk := reply.read(min(CHUNK, size - have + 1))):
                        stream.write(chunk)
                        have += len(chunk)
                        self.moved += len(chunk)
                except (OSError, http.client.HTTPException) as error:
                    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    raise Again(f"cut after {have} of {size} bytes ({_words(error)})") from None
        if have > size:
            part.unlink()
            raise Again(f"the server sends more than the {size} bytes of the list")
        if have < size:
            raise Again(f"cut after {have} of {size} bytes")

    def _begins(self, reply: http.client.HTTPResponse, size: int, have: int, part: Path) -> int:
        """At which byte the answer begins: where we are, or at the beginning."""
        if reply.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
            if found and int(found[1]) == have and found[2] in ("*", str(size)):
                return have
            part.unlink(missing_ok=True)
            raise Again(f"asked for bytes {have}-, the server sends {reply.headers.get('Content-Range')!r}")
        length = reply.headers.get("Content-Length")
        if reply.status != 200 or (length is not None and length != str(size)):
            raise Again(f"the server offers {length} bytes (status {reply.status}), the list says {size}")
        return 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; a token goes along only to the same server, and nothing goes from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request that follows a redirect."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise Refused(f"the server redirects from https to {urllib.parse.urlsplit(newurl).scheme}")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if following is not None and token is not None and _origin(req.full_url) == _origin(newurl):
            following.add_unredirected_header("Authorization", token)
        return following


def _no_other_schemes() -> list[urllib.request.BaseHandler]:
    """Handlers that replace those for files, FTP and data URLs: a redirect leads to a web server or nowhere."""

    class NoFiles(urllib.request.FileHandler):
        def file_open(self, req: urllib.request.Request) -> Any:
            raise Refused(f"{req.type} is no web address")

    class NoFtp(urllib.request.FTPHandler):
        def ftp_open(self, req: urllib.request.Request) -> Any:
            raise Refused(f"{req.type} is no web address")

    class NoData(urllib.request.DataHandler):
        def data_open(self, req: urllib.request.Request) -> Any:
            raise Refused(f"{req.type} is no web address")

    return [NoFiles(), NoFtp(), NoData()]


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _judged(error: urllib.error.HTTPError, asked: str, *, has_token: bool, at_hub: bool) -> Exception:
    code = error.code
    if code in (408, 416, 425, 429) or code >= 500:
        return Again(f"the hub answers {code}", _asked_wait(error.headers.get("Retry-After")), code)
    if not at_hub and code in (401, 403, 404, 410):
        # Addresses in the stores of large files are signed for a while: the hub gives another when asked again.
        return Again(f"{urllib.parse.urlsplit(error.url).netloc}, where the hub leads, answers {code}", status=code)
    said = error.headers.get("X-Error-Code") or ""
    told = f"{code} ({said})" if re.fullmatch("[A-Za-z]{1,40}", said) else str(code)
    page = _page(asked)
    if code in (401, 403):
        known = "its token was not accepted" if has_token else "there is no token here (HF_TOKEN, or `hf auth login`)"
        return Refused(
            f"the hub answers {told}: the model is gated, private or absent, and {known}",
            f"look at {page} and accept its terms where it asks for that; then the same command with HF_TOKEN set",
        )
    path = urllib.parse.urlsplit(error.url).path
    return Refused(f"the hub answers {told} for {path}", f"look whether the model and its revision are there:  {page}")


def _page(url: str) -> str:
    """The page of a model for people, from an address of its files or its list."""
    found = re.match(r"(.+?)/(?:resolve|tree|revision)/", url.replace("/api/models/", "/", 1))
    return found[1] if found else url


def _asked_wait(value: str | None) -> float:
    if value is None:
        return 0.0
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _words(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return f"{type(reason).__name__}: {reason}".rstrip(": ")


def read_token(url: str, name: str | None) -> str | None:
    """The token of this machine, from the variable of that name or the file that the hub's own client keeps.

    It is given to the hub over https, or within this machine; over a plain connection nobody gets it.
    """
    parts = urllib.parse.urlsplit(url)
    if name is None or (parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "::1", "localhost")):
        return None
    if value := os.environ.get(name, "").strip():
        return value
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        value = Path(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")).read_text().strip()
    return value if value and value.isprintable() else None


def repeatedly(what: str, ask: Callable[[], Any], wait: float, tell: Callable[[str], None]) -> Any:
    """The answer of a question that is asked again while it fails in ways that may pass."""
    attempt = 1
    while True:
        try:
            return ask()
        except Again as error:
            if attempt == ATTEMPTS:
                raise Again(f"{what}: {error}; given up after {attempt} attempts") from None
            pause(what, error, attempt, wait, tell)
        attempt += 1


def pause(what: str, error: Again, attempt: int, wait: float, tell: Callable[[str], None]) -> None:
    """Say what failed, and wait: longer each time, and at least as long as the server asks, within bounds."""
    seconds = min(LONGEST_WAIT, max(error.wait, wait * 2.0 ** (attempt - 1) * random.uniform(0.75, 1.25)))
    tell(f"{what}: {error}; again in {seconds:.1f} s")
    time.sleep(seconds)


def say(line: str) -> None:
    """One line for the log."""
    print(line, flush=True)
