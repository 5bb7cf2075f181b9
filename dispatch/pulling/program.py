"""The program that pulls on a host: one deterministic zip, addressed by its sha256, which Python runs as it is."""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from pathlib import Path

_SOURCES = Path(__file__).with_name("onhost")
_PACKAGE = "latentforge_pull"
_MAIN = f"import sys\n\nfrom {_PACKAGE}.pull import main\n\nsys.exit(main())\n"


@functools.cache
def pull_program() -> tuple[bytes, str]:
    """The zip and its sha256: sorted, stored, with a fixed time, so that equal sources give equal bytes."""
    sources = {f"{_PACKAGE}/{path.name}": path.read_bytes() for path in _SOURCES.glob("*.py")}
    sources["__main__.py"] = _MAIN.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(sources):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, sources[name])
    content = buffer.getvalue()
    return content, hashlib.sha256(content).hexdigest()
