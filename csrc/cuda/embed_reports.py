"""Write the header with what the compiler was and what it said (run by CMake; standard library only).

embed_reports.py HEADER NVCC ARCHITECTURES REPORT...
"""

import re
import subprocess
import sys
from pathlib import Path


def main() -> None:
    header, nvcc, architectures, reports = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", version)
    said = "".join(Path(report).read_text() for report in reports)
    # Compilers bound the length of one string literal, not of their concatenation line by line.
    lines = "\n".join(f'    R"report({line})report" "\\n"' for line in said.splitlines())
    header.write_text(
        "#pragma once\n"
        f'#define LATENTFORGE_NVCC "{found[1] if found else "unknown"}"\n'
        f'#define LATENTFORGE_CUDA_ARCHITECTURES "{architectures}"\n'
        f"inline constexpr char kResourceReport[] =\n{lines or '    ' + chr(34) * 2};\n"
    )


if __name__ == "__main__":
    main()
