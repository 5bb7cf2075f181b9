"""What a model consists of: its files with sizes and sha256, known before anything is moved."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dispatch.pulling.onhost.place import check_names
from dispatch.pulling.onhost.web import Again, Hub, Refused, repeatedly
from dispatch.pulling.refs import COMMIT, ModelRef
from latentforge.errors import RefusedError, UnknownOutcomeError
from latentforge.spec.canonical import canonical_bytes

PUBLIC_HUB = "https://huggingface.co"
TOKEN = "HF_TOKEN"
"""The name of the token; its value is read where it is used, and crosses no wire but the one to the hub."""

WANTED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
"""What is taken of a repository: weights that are no pickle, configuration, vocabulary. The rest is told, not moved."""

_SMALL = 64 << 20
_LARGEST_PAGE = 64 << 20
_MOST_PAGES = 1000
WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class ModelFile:
    """One file of a model; ``pieces`` are the objects that a laptop sends it in."""

    path: str
    bytes: int
    sha256: str
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The files of a pinned model, and how many others its repository has."""

    ref: ModelRef
    files: tuple[ModelFile, ...]
    left_out: int = 0
    left_out_bytes: int = 0
    config: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """Its config.json, where that was read."""

    @property
    def vocab_size(self) -> int | None:
        """As its config.json says."""
        config = self.config or {}
        inner = config.get("text_config")
        found = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
        return found if isinstance(found, int) else None

    @property
    def weights(self) -> int:
        """The size of its weights."""
        return sum(file.bytes for file in self.files if file.path.endswith(".safetensors"))

    @property
    def size(self) -> int:
        """The size of the model."""
        return sum(file.bytes for file in self.files)

    @cached_property
    def tree_sha256(self) -> str:
        """The content digest of the folder, by the rule of ``latentforge.evidence.digests.tree_sha256``."""
        lines = (f"{file.path}\0{file.sha256}\n" for file in sorted(self.files, key=lambda one: one.path.encode()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def content(self) -> bytes:
        """The list as the host gets it."""
        rows: list[dict[str, Any]] = [
            {"path": file.path, "bytes": file.bytes, "sha256": file.sha256}
            | ({"pieces": list(file.pieces)} if file.pieces else {})
            for file in self.files
        ]
        return canonical_bytes({"model": str(self.ref), "sha256": self.tree_sha256, "files": rows})

    @property
    def sha256(self) -> str:
        """The digest that addresses the list itself."""
        return hashlib.sha256(self.content).hexdigest()


def endpoint_of(env: Mapping[str, str]) -> str:
    """The hub to ask: ``HF_ENDPOINT``, or the public one; refused where it is no web address, or carries a secret."""
    url = (env.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password:
        raise RefusedError(
            f"HF_ENDPOINT holds a user name or a password for {parts.hostname}: it would be seen in logs",
            next=f"leave them out, and give the token by {TOKEN}",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise RefusedError(f"HF_ENDPOINT={url!r} is not the address of a hub", next=f"HF_ENDPOINT={PUBLIC_HUB}")
    return url


def resolve_url(endpoint: str, ref: ModelRef) -> str:
    """Where the files of a pinned model are had from, up to their paths."""
    return f"{endpoint}/{ref.repo}/resolve/{ref.revision}/"


class Catalogue:
    """A hub as a laptop asks it: commits of branches, and lists of files."""

    def __init__(
        self,
        endpoint: str,
        *,
        wait: float | None = None,
        tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        self.endpoint = endpoint
        self._wait = WAIT_SECONDS if wait is None else wait
        self._tell = tell
        self._hub = Hub({"url": endpoint, "token": TOKEN})
        self._config: bytes | None = None

    def pinned(self, ref: ModelRef) -> ModelRef:
        """The model at the commit that its branch or tag names now."""
        if ref.pinned:
            return ref
        revision = urllib.parse.quote(ref.revision, safe="")
        answer, _next = self._json(f"{self.endpoint}/api/models/{ref.repo}/revision/{revision}", f"revision of {ref}")
        commit = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise RefusedError(f"{self.endpoint} names no commit for {ref} (it says {commit!r})")
        return ref.at(commit)

    def files_of(self, ref: ModelRef) -> Listing:
        """The list of a pinned model, whole or not at all; small files are read: the hub gives no sha256 of them."""
        assert ref.pinned
        rows: list[Any] = []
        url: str | None = f"{self.endpoint}/api/models/{ref.repo}/tree/{ref.revision}?recursive=true"
        for _ in range(_MOST_PAGES):
            page, url = self._json(str(url), f"files of {ref}")
            if not isinstance(page, list):
                raise RefusedError(f"{self.endpoint} gives no list of the files of {ref}")
            rows += page
            if url is None:
                break
        else:
            raise RefusedError(f"the list of the files of {ref} does not end after {_MOST_PAGES} pages")
        return self._listing(ref, rows)

    def _listing(self, ref: ModelRef, rows: Iterable[Any]) -> Listing:
        files, others, other_bytes = [], 0, 0
        for row in rows:
            try:
                if row["type"] == "directory":
                    continue
                path, lfs = str(row["path"]), row.get("lfs") or {}
                size, oid = int(lfs.get("size", row["size"])), str(lfs.get("oid") or row["oid"])
            except (KeyError, TypeError, ValueError, AttributeError):
                raise RefusedError(f"{self.endpoint} lists of {ref} what is no file: {row!r}") from None
            if not path.endswith(WANTED):
                others, other_bytes = others + 1, other_bytes + size
            elif lfs:
                files.append(ModelFile(path, size, oid.removeprefix("sha256:")))
            else:
                files.append(ModelFile(path, size, self._digest_of_small(ref, path, size, oid)))
        if not any(file.path.endswith(".safetensors") for file in files):
            raise RefusedError(
                f"{ref} has no .safetensors file ({len(files)} other files; {others} of formats that are not read)",
                next="take a revision whose weights are safetensors",
            )
        files.sort(key=lambda one: one.path.encode("utf-8", "surrogatepass"))
        return checked(Listing(ref, tuple(files), others, other_bytes, _object(self._config)))

    def _digest_of_small(self, ref: ModelRef, path: str, size: int, oid: str) -> str:
        """The sha256 of a file that git itself keeps, once its bytes are those of its git digest."""
        if size > _SMALL:
            raise RefusedError(f"{path} of {ref} has {size} bytes and no sha256 in the hub's list")

        def ask() -> bytes:
            content = self._read(resolve_url(self.endpoint, ref) + urllib.parse.quote(path), size)
            if hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() != oid:
                raise Again(f"{path} came with other bytes ({len(content)} of {size}) than its git digest {oid[:12]}…")
            return content

        content: bytes = self._ask(f"{path} of {ref}", ask)
        if path == "config.json":
            self._config = content
        return hashlib.sha256(content).hexdigest()

    def _json(self, url: str, what: str) -> tuple[Any, str | None]:
        def ask() -> tuple[Any, str | None]:
            with self._hub.open(url, {}) as reply:
                link = reply.headers.get("Link")
                length = reply.headers.get("Content-Length")
                content = reply.read(_LARGEST_PAGE)
            if length is not None and len(content) != int(length):
                raise Again(f"cut after {len(content)} of {length} bytes")
            try:
                return json.loads(content), self._next(link)
            except ValueError as error:
                raise Again(f"the answer is not JSON ({error})") from None

        found: tuple[Any, str | None] = self._ask(what, ask)
        return found

    def _next(self, link: str | None) -> str | None:
        """The address of the list's next page, which must be the same hub's."""
        found = re.search(r'<([^>]+)>\s*;\s*rel="?next"?', link or "")
        if found is None:
            return None
        url = str(urllib.parse.urljoin(self.endpoint + "/", found[1]))
        if urllib.parse.urlsplit(url)[:2] != urllib.parse.urlsplit(self.endpoint)[:2]:
            raise Refused(f"the list goes on at {urllib.parse.urlsplit(url).netloc}, another server")
        return url

    def _read(self, url: str, size: int) -> bytes:
        with self._hub.open(url, {}) as reply:
            return reply.read(size + 1)

    def _ask(self, what: str, ask: Callable[[], Any]) -> Any:
        def guarded() -> Any:
            import http.client

            try:
                return ask()
            except (OSError, http.client.HTTPException) as error:
                raise Again(f"cut ({type(error).__name__}: {error})") from None

        try:
            return repeatedly(what, guarded, self._wait, self._tell)
        except Again as error:
            raise UnknownOutcomeError(
                f"{self.endpoint}: {error}; nothing was moved", next="the same command again"
            ) from None
        except Refused as error:
            raise RefusedError(f"{self.endpoint}: {what}: {error}", next=error.next) from None


def _object(content: bytes | None) -> dict[str, Any] | None:
    try:
        value = json.loads(content or b"null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def checked(listing: Listing) -> Listing:
    """The list itself, refused where a name or a digest in it cannot be right."""
    try:
        check_names([file.path for file in listing.files])
    except Refused as error:
        raise RefusedError(f"{listing.ref}: {error}") from None
    for file in listing.files:
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256) or file.bytes < 0:
            raise RefusedError(f"{listing.ref}: {file.path} has size {file.bytes} and sha256 {file.sha256!r}")
    if not listing.files:
        raise RefusedError(f"{listing.ref} has no file")
    return listing


def hub_of(env: Mapping[str, str] | None = None) -> Catalogue:
    """The hub that this laptop's environment names."""
    return Catalogue(endpoint_of(os.environ if env is None else env))
