"""Write the header that tells which sources an extension was built from (run by CMake; standard library only).

The digest is the project's folder digest over ``CMakeLists.txt`` and ``csrc/``: SHA-256 of the sorted lines
``<relative path>\\0<sha256 of the file>\\n``. ``latentforge.kernels.native`` computes the same over the checkout.
"""

import hashlib
import sys
from pathlib import Path


def source_digest(root: Path) -> str:
    files = [root / "CMakeLists.txt"]
    files += [
        path
        for path in (root / "csrc").rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".py"} and path.is_file()
    ]
    lines = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    digest = hashlib.sha256()
    for name in sorted(lines, key=str.encode):
        digest.update(f"{name}\0{lines[name]}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    root, header = Path(sys.argv[1]), Path(sys.argv[2])
    header.write_text(f'#pragma once\n#define LATENTFORGE_SOURCE_DIGEST "{source_digest(root)}"\n')
