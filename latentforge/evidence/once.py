"""Writing a file once: whole, durable, and never over one that is there."""

from __future__ import annotations

import os
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.evidence.ledger import sync_folder


def write_once(path: Path, content: bytes, *, beside: Path | None = None, next: str | None = None) -> None:
    """Write ``content`` (mode 0444) and make it durable; RefusedError where ``path`` exists.

    Whole or not at all: a full disk must not leave half a file under the final name. What a crash leaves behind lies
    in ``beside`` (the file's own folder), under a name with a dot.
    """
    partial = (beside or path.parent) / f".{path.parent.name}.{path.name}.{os.getpid()}"
    partial.unlink(missing_ok=True)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o444)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.link(partial, path)  # refuses to replace
    except FileExistsError:
        raise RefusedError(f"{path} exists: evidence is written once", next=next) from None
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
