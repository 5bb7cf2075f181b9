"""The code that a host builds from: a tar whose bytes depend on the files' names and contents alone."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from dataclasses import dataclass, field

from latentforge.errors import RefusedError
from latentforge.spec.code import CodeSource, digest_of


@dataclass(frozen=True)
class Bundle:
    """A packed source tree, addressed by the sha256 of its bytes."""

    sha256: str
    content: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes to send."""
        return len(self.content)


def pack(source: CodeSource) -> Bundle:
    """Pack the files that a build needs: sorted, owned by nobody, without times, so equal sources give equal bytes.

    RefusedError where a file changed since the code's digest was taken: what is built must be what is named.
    """
    tar = io.BytesIO()
    contents = {name: source.read(name) for name in sorted(source.files)}
    if digest_of((name, contents[name]) for name in sorted(source.digested)) != source.digest:
        raise RefusedError(f"the code in {source.root} was changed while it was read", next="the same command again")
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o644
            try:
                archive.addfile(entry, io.BytesIO(content))
            except ValueError as error:
                raise RefusedError(f"{name} cannot be packed for a host: {error}") from error
    packed = io.BytesIO()
    # Every plan asks for the digest, few send the bundle. Level 6 takes twice as long for a twentieth less.
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=4, mtime=0, filename="") as stream:
        stream.write(tar.getvalue())
    content = packed.getvalue()
    return Bundle(hashlib.sha256(content).hexdigest(), content)


def code_label(source: CodeSource) -> str:
    """The code in a user's words: the commit and how far the files are from it, or the digest of an installed wheel."""
    digest = f"code {source.digest[:12]}"
    if source.root is None:
        return f"{digest} of the installed package"
    tops = sorted({name.split("/")[0] for name in source.files})

    def git(*words: str) -> str:
        asked = ["git", "-C", str(source.root), *words]
        return subprocess.run(asked, capture_output=True, check=True).stdout.decode("utf-8", "surrogateescape")

    try:
        head = git("rev-parse", "--short=7", "HEAD").strip()
        diff = git("diff", "HEAD", "--numstat", "--no-renames", "--", *tops)
        untracked = git("ls-files", "-z", "--others", "--exclude-standard", "--", *tops).split("\0")
    except (OSError, subprocess.CalledProcessError):
        return digest
    # A file without lines counts as one line.
    counts = [part for line in diff.splitlines() for part in line.split("\t")[:2]]
    changed = sum(int(part) if part.isdigit() else 1 for part in counts)
    new = len(source.files.keys() & set(untracked))
    return head + (f" + {changed} changed lines" if changed else "") + (f" + {new} new files" if new else "")
