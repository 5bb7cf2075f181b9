"""Heads of the ledger, written down and signed: what shows that a ledger was cut, or chained anew, since."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import FailedError, LatentForgeError, RefusedError
from latentforge.evidence.ledger import LEDGER, Chain, read_chain
from latentforge.evidence.once import write_once
from latentforge.evidence.signatures import SUFFIX, Signature, check_signature, sign_bytes
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.reading import parse_json

HEADS = "heads"
"""The folder beside the ledger that holds its signed heads: ``<entry>.json`` and ``<entry>.json.sig``."""


@dataclass(frozen=True)
class Head:
    """What a signature of the ledger covers: its first ``entry`` lines, the last of which has the sha256 ``head``."""

    entry: int
    head: str

    @property
    def content(self) -> bytes:
        """The canonical bytes that are signed."""
        return canonical_bytes({"entry": self.entry, "head": self.head})


@dataclass(frozen=True)
class SignedHead:
    """A head that holds: the ledger's first ``entry`` lines are those that were signed."""

    entry: int
    signature: Signature


def sign_head(folder: Path, key: Path) -> tuple[Head, Path]:
    """Sign the head of the ledger in ``folder`` as it is now; returns it and the file of its signature.

    RefusedError where the ledger is empty, or this head is signed already; FailedError where the chain is broken.
    """
    chain = read_chain(folder / LEDGER)
    if not chain.entries:
        raise RefusedError(f"{folder / LEDGER} has no entries: there is nothing to sign")
    head = Head(len(chain.entries), chain.head)
    path = folder / HEADS / f"{head.entry:08d}.json"
    signature = path.with_name(path.name + SUFFIX)
    if signature.exists():
        raise RefusedError(
            f"entry {head.entry} of {folder / LEDGER} is signed already: {signature}",
            next=f"latentforge evidence verify {folder}/ --signers FILE",
        )
    content = sign_bytes(head.content, key)
    path.parent.mkdir(exist_ok=True)
    if not path.exists():  # one that a crash left without its signature says the same, or is found out below
        write_once(path, head.content)
    read_head(path, chain)
    write_once(signature, content)
    return head, signature


def check_heads(
    folder: Path, chain: Chain, signers: Path | None, kept: Sequence[Path] = ()
) -> Iterable[SignedHead | tuple[str, Exception]]:
    """Each head in ``folder`` and in ``kept`` (copies that lay elsewhere): as signed, or its name and what is wrong.

    A head without its signature must hold as well; it vouches for nothing, and is not among the results.
    """
    inside = sorted((folder / HEADS).glob("*.json")) if (folder / HEADS).is_dir() else []
    orphans = {path.with_suffix("") for path in (folder / HEADS).glob(f"*.json{SUFFIX}")} - set(inside)
    files = [*inside, *sorted(orphans)]  # of which a head is missing, and said to be
    for path in [*files, *kept]:
        name = f"{HEADS}/{path.name}" if path in files else str(path)
        try:
            head = read_head(path, chain)
            signature = path.with_name(path.name + SUFFIX)
            if signature.exists():
                yield SignedHead(head.entry, check_signature(head.content, signature, signers, name=f"{name}{SUFFIX}"))
            elif path not in files:
                raise FailedError(f"{signature} is missing: a head that is not signed shows nothing")
        except LatentForgeError as error:
            yield name, error


def read_head(path: Path, chain: Chain) -> Head:
    """A written head, held against the ledger; FailedError where the ledger is not the one that it names."""
    if path.exists() and not path.is_file():
        raise FailedError("is no file")  # a pipe would keep its reader waiting
    try:
        content = path.read_bytes()
        value: Any = parse_json(content)
    except OSError as error:
        raise FailedError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
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
