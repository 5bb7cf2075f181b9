"""How a model is named: ``owner/name@commit`` of a hub, or ``name@digest`` of a folder that a laptop sent."""

from __future__ import annotations

import re
from dataclasses import dataclass

from latentforge.errors import RefusedError

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REF = re.compile(rf"(?P<repo>(?:{_PART}/)?{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/+-]{{0,120}}))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelRef:
    """A model at one revision. It is pinned where the revision is a whole commit (40 hex digits)."""

    repo: str
    revision: str

    @property
    def pinned(self) -> bool:
        """Whether the same bytes are meant whenever it is asked."""
        return COMMIT.fullmatch(self.revision) is not None

    @property
    def folder(self) -> str:
        """The name of its folder below ``models/`` on a host."""
        return f"{self.repo.replace('/', '--')}@{self.revision}"

    def at(self, commit: str) -> ModelRef:
        """The same model at a commit."""
        return ModelRef(self.repo, commit)

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


def looks_like_path(text: str) -> bool:
    """Whether a user means a folder: it begins as one."""
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def parse_ref(text: str, *, revision: str | None = "main") -> ModelRef:
    """The model that a text names; without a revision in it the given one. RefusedError for what names none."""
    found = _REF.fullmatch(text)
    if found is None or "--" in found["repo"] or ".." in text:
        raise RefusedError(
            f"{text!r} is neither owner/name@revision of a hub nor a folder (which begins with /, ./, ../ or ~)",
            next="latentforge dispatch pull OWNER/NAME@COMMIT   or   latentforge dispatch pull ./FOLDER --name NAME",
        )
    wanted = found["revision"] or revision
    if wanted is None:
        raise RefusedError(f"{text!r} names no revision", next=f"{text}@COMMIT")
    return ModelRef(found["repo"], wanted)


def model_ref(text: str) -> ModelRef | None:
    """The model that a pipeline's field names by ``repo@revision``; None where the field is a folder's path."""
    if looks_like_path(text) or "@" not in text or _REF.fullmatch(text) is None:
        return None
    return parse_ref(text)
