"""Heads of the ledger, written down and signed: what shows that a ledger was cut, or chained anew, since."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import FailedError, LatentForgeError, RefusedError
from latentforge.evidence.ledger import LEDGER, Chain
from latentforge.evidence.once import write_once
from latentforge.evidence.signatures import SUFFIX, Signature, check_signature, sign_bytes
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.reading import UnreadableError, parse_json, read_regular

HEADS = "heads"
"""The folder beside the ledger that holds its signed heads: ``<entry>.json`` and ``<entry>.json.sig``."""

_LARGEST = 1 << 12  # a head has about a hundred bytes


@dataclass(frozen=True)
class Head:
    """What a signature of the ledger covers: its first ``entry`` lines, the last of which has the sha256 ``head``."""

    entry: int
    head: str

    @property
    def content(self) -> bytes:
        """The canonical bytes that are signed."""
        return canonical_bytes({"entry": self.entry, "head": self.head})

    @property
    def name(self) -> str:
        """The name of its file in ``heads``."""
        return f"{self.entry:08d}.json"


@dataclass(frozen=True)
class SignedHead:
    """A head that holds: the ledger's first ``entry`` lines are those that were signed."""

    entry: int
    signature: Signature


def sign_head(folder: Path, chain: Chain, key: Path) -> tuple[Head, Path]:
    """Sign the head of ``chain``, the ledger in ``folder`` as it was verified; returns it and its signature's file.

    RefusedError where the ledger is empty, or this head is signed already, or another lies under its name.
    """
    if not chain.entries:
        raise RefusedError(f"{folder / LEDGER} has no entries: there is nothing to sign")
    head = Head(len(chain.entries), chain.head)
    path = folder / HEADS / head.name
    signature = path.with_name(path.name + SUFFIX)
    if os.path.lexists(signature):
        raise RefusedError(
            f"entry {head.entry} of {folder / LEDGER} is signed already: {signature}",
            next=f"latentforge evidence verify {folder}/ --signers FILE",
        )
    written = os.path.lexists(path)  # a crash may have left it without its signature
    if written and read_head(path, chain) != head:
        raise RefusedError(f"{path} is another head than entry {head.entry}: it was put there", next=f"rm {path}")
    content = sign_bytes(head.content, key)
    if not written:
        _make_heads(path.parent)
        write_once(path, head.content)
    write_once(signature, content)
    return head, signature


def check_heads(
    folder: Path, chain: Chain, signers: Path | None, kept: Sequence[Path] = ()
) -> Iterable[SignedHead | tuple[str, Exception]]:
    """Each head in ``folder`` and in ``kept`` (copies that lay elsewhere): as signed, or its name and what is wrong.

    A head without its signature must hold as well; it vouches for nothing, and is not among the results.
    """
    try:
        names = _names(folder / HEADS)
    except OSError as error:
        yield HEADS, UnreadableError.of(folder / HEADS, error)
        names = []
    for path in [*(folder / HEADS / name for name in names), *kept]:
        inside = path not in kept
        name = f"{HEADS}/{path.name}" if inside else str(path)
        try:
            head = read_head(path, chain)
            if inside and path.name != head.name:
                raise FailedError(f"is the head of entry {head.entry}: it was put there")
            signature = path.with_name(path.name + SUFFIX)
            if os.path.lexists(signature):
                yield SignedHead(head.entry, check_signature(head.content, signature, signers, name=f"{name}{SUFFIX}"))
            elif not inside:
                raise FailedError(f"{signature} is missing: a head that is not signed shows nothing")
        except LatentForgeError as error:
            yield name, error


def _names(heads: Path) -> list[str]:
    """The names of the heads in a folder, those included of which only the signature is left; none without a folder."""
    if not os.path.lexists(heads):
        return []
    found = [name.removesuffix(SUFFIX) for name in os.listdir(heads)]
    return sorted({name for name in found if name.endswith(".json") and not name.startswith(".")})


def _make_heads(heads: Path) -> None:
    try:
        heads.mkdir(exist_ok=True)
    except OSError as error:
        raise RefusedError(f"{heads} cannot be made: {error.strerror}") from error


def read_head(path: Path, chain: Chain) -> Head:
    """A written head, held against the ledger; FailedError where the ledger is not the one that it names."""
    try:
        content = read_regular(path, largest=_LARGEST)
        value: Any = parse_json(content)
    except FileNotFoundError:
        raise FailedError("is missing") from None
    except ValueError as error:
        raise FailedError(f"is not JSON: it was altered ({error})") from None
    if not isinstance(value, dict) or set(value) != {"entry", "head"} or canonical_bytes(value) != content:
        raise FailedError("is no head of a ledger in canonical form: it was altered")
    entry, sha256 = value["entry"], value["head"]
    if not isinstance(entry, int) or isinstance(entry, bool) or entry < 1 or not isinstance(sha256, str):
        raise FailedError("holds values of the wrong kind: it was altered")
    if entry > len(chain.entries):
        raise FailedError(
            f"{LEDGER} had {entry} entries when this was signed, {len(chain.entries)} are here: the last were cut off"
        )
    if chain.digest(entry) != sha256:
        raise FailedError(
            f"entry {entry} of {LEDGER} was {sha256[:12]}… when this was signed, {chain.digest(entry)[:12]}… is here: "
            "the ledger was written anew"
        )
    return Head(entry, sha256)
