"""Compile one .cu file and keep what the assembler reports of it (run by CMake; standard library only).

    compile.py REPORT NVCC ARGUMENT...

The report, ``ptxas -v`` of every kernel for every architecture, is what the module tells of its kernels.
"""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    report, command = Path(sys.argv[1]), sys.argv[2:]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stdout + done.stderr)
        return done.returncode
    lines = done.stderr.splitlines()
    # Times differ from build to build, the module must not.
    report.write_text("".join(f"{line}\n" for line in lines if "ompile time" not in line))
    for line in lines:
        if "warning" in line:
            print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
